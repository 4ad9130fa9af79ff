"""What stands beside a selected parameter: indices, coded values, and hooks on its modules."""

from typing import Any, Self

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from safeweights_peft.errors import MergeError


class CodedValues(nn.Parameter):
    """Values in a coded form. Bytes have no gradient, so whether they train is kept for later."""

    is_trained = False

    def __new__(cls, data: Tensor, requires_grad: bool = False, **_: Any) -> Self:
        """Make it of bytes; PEFT passes on whatever attributes it finds."""
        return super().__new__(cls, data.detach(), False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Note whether the values are to be trained."""
        self.is_trained = requires_grad
        return self


class Indices(BufferDict):
    """The flat indices of one parameter, by adapter."""

    def __init__(self, layer: Any) -> None:
        super().__init__(persistent=True)
        self.__dict__["_layer"] = layer  # not as a child

    def __setattr__(self, name: str, value: Any) -> None:
        """Report tensors."""
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            self._layer.note_set("indices", name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for adapter, indices in self._buffers.items():
            new = state_dict.get(prefix + adapter)
            # Other indices than those that were checked must be checked before use.
            if new is not None and indices is not None and not _are_equal(new, indices):
                self._layer.distrust(adapter)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Door:
    """Hooks on a module that holds a parameter: what is saved from it, and loaded, is the base."""

    def __init__(self, layer: Any, own: str) -> None:
        self._layer = layer
        self._own = own
        self._is_loading = False

    def before_save(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Let the module hold the base, or what a forward uses where that is asked for."""
        if keep_vars:  # an exporter or tracer wants the parameters that a forward uses
            self._layer.selection.sync()
        elif not self._layer.is_merged:
            self._layer.selection.show_base()

    def after_save(
        self, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any
    ) -> None:
        """Give a copy of the base where a graph needs what the parameter holds."""
        found = state.get(prefix + self._own)
        is_variable = found is None or found is self._layer.selection.known
        if not is_variable and not self._layer.is_merged:
            base = self._layer.selection.hidden_base()
            if base is not None:
                state[prefix + self._own] = base

    def before_load(
        self, module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any
    ) -> None:
        """Let the module hold the base, unless adapters are merged into it."""
        self._is_loading = prefix + self._own in state
        if not self._is_loading:
            return
        if self._layer.is_merged:
            raise MergeError(
                f"{self._layer.name}: expected an unmerged base to load weights into, found "
                f"adapters {', '.join(self._layer.merged_adapters)} merged; call unmerge_adapter "
                "first"
            )
        self._layer.selection.show_base(force=True)

    def after_load(self, module: nn.Module, _keys: Any) -> None:
        """Take what was loaded for the base."""
        if self._is_loading:
            self._is_loading = False
            if self._layer.sharded is None:
                self._layer.selection.settle()
            self._layer.take_originals()
            self._layer.selection.sync()


def _are_equal(new: Tensor, indices: Tensor) -> bool:
    if new is indices:
        return True
    same = not indices.is_meta and new.dtype == indices.dtype
    return same and torch.equal(new.to(indices.device), indices)


def is_coded(tensor: Tensor) -> bool:
    """Tell whether indices or values are in a coded form."""
    return tensor.dtype is torch.uint8


def is_stored(indices: Tensor, values: Tensor) -> bool:
    """Tell whether indices and values are still as in the file: coded, or by rows or columns."""
    return is_coded(indices) or is_coded(values) or indices.shape != values.shape
