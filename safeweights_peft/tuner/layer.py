"""A wrapper for any module that owns selected parameters: Linear, Embedding, norm, experts."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from safeweights_peft.errors import MergeError, ModelError
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.tuner.parameter import SelectedParameter, Term


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


class Values(nn.ParameterDict):
    """The values of one parameter, by adapter; ``model.half()`` and the like leave their dtype."""

    def __init__(self, on_set: Callable[[str], None]) -> None:
        super().__init__()
        self.on_set = on_set

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep coded values what they are when loaded ones take their place."""
        present = self.__dict__.get("_parameters", {}).get(name)
        if isinstance(present, CodedValues) and isinstance(value, Tensor) and is_coded(value):
            value = CodedValues(value).requires_grad_(present.is_trained)
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            self.on_set(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Indices(BufferDict):
    """The flat indices of one parameter, by adapter."""

    def __init__(self, on_set: Callable[[str], None]) -> None:
        super().__init__(persistent=True)
        self.on_set = on_set

    def __setattr__(self, name: str, value: Any) -> None:
        """Report tensors."""
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            self.on_set(name)


class SafeWeightsLayer(nn.Module, BaseTunerLayer):
    """Wraps a module that owns selected parameters, or has one tied to another module's."""

    _active_adapter: str | list[str]
    _disable_adapters: bool

    def __init__(
        self, base_layer: nn.Module, path: str, check: Callable[["SafeWeightsLayer", str], None]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.selected: dict[str, SelectedParameter] = {}  # by their own names in the module
        self.tied: dict[str, tuple[SafeWeightsLayer, SelectedParameter]] = {}  # with their owners
        self.scaling: dict[str, float] = {}  # factor on the values, by adapter
        self.may_write = True  # False: every forward is functional
        self.merged_adapters: list[str] = []
        self.metadata: dict[str, AdapterMetadata] = {}
        self._check = check  # decodes what was loaded, and calls accept
        self._unchecked: dict[str, None] = {}  # a dict, because PEFT deletes by key
        self._awaited: dict[str, set[str]] = {}  # coded adapters: containers still to be set
        # PEFT walks these by name, to move, train and delete adapters.
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = ("scaling", "metadata", "_unchecked", "_awaited")

    def __getattr__(self, name: str) -> Any:
        """Look up what the wrapped module has, such as ``in_features`` or ``num_experts``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet, as while unpickling
                raise
            return getattr(self.base_layer, name)

    def parameters_of(self, adapter: str) -> list[SelectedParameter]:
        """List the parameters of this module in which an adapter selects entries."""
        return [selected for selected in self.selected.values() if adapter in selected.values]

    def lacks_data(self, adapter: str) -> bool:
        """Tell whether the base's entries, which checks and decoding need, are not here yet."""
        return any(selected.parameter.is_meta for selected in self.parameters_of(adapter))

    def add_adapter(
        self,
        adapter: str,
        metadata: AdapterMetadata,
        rooms: Mapping[str, tuple[nn.Parameter, Tensor]],
    ) -> None:
        """Take room for an adapter's values and indices, which are checked before their use."""
        for own, (values, indices) in rooms.items():
            selected = self.selected.get(own) or self._select(own)
            selected.values[adapter], selected.indices[adapter] = values, indices
        self.scaling[adapter] = metadata.scale
        self.metadata[adapter] = metadata
        self._unchecked[adapter] = None
        if any(is_coded(tensor) for room in rooms.values() for tensor in room):
            self._awaited[adapter] = {name for own in rooms for name in _container_names(own)}

    def _select(self, own: str) -> SelectedParameter:
        values_name, indices_name = _container_names(own)
        values = Values(partial(self._note_set, values_name))
        indices = Indices(partial(self._note_set, indices_name))
        self.add_module(values_name, values)
        self.add_module(indices_name, indices)
        self.adapter_layer_names += (values_name,)
        self.other_param_names += (indices_name,)
        name = f"{self.path}.{own}"
        self.selected[own] = SelectedParameter(self.base_layer, own, name, values, indices)
        return self.selected[own]

    def tie(self, own: str, owner: "SafeWeightsLayer", selected: SelectedParameter) -> None:
        """Use another layer's selected parameter, which this module's parameter is tied to."""
        self.tied[own] = owner, selected
        self._active_adapter = owner._active_adapter
        self._disable_adapters = owner._disable_adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module with the active adapters' entries."""
        weights = {own: self._weight(selected) for own, selected in self.selected.items()}
        for own, (owner, selected) in self.tied.items():
            if getattr(self.base_layer, own) is not selected.parameter:
                raise ModelError(
                    f"{self.path}.{own}: expected the parameter of {selected.name}, found another; "
                    "load the adapter after untying, and use DDP rather than DataParallel"
                )
            weights[own] = owner._weight(selected)
        replaced = {own: weight for own, weight in weights.items() if weight is not None}
        if not replaced:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, replaced, args, kwargs)

    def _weight(self, selected: SelectedParameter) -> Tensor | None:
        """Return what a forward is to use in place of a parameter; None if that is right."""
        if self.disable_adapters:
            self.unmerge()
            return selected.weight([], self.may_write)
        if self.merged:
            return None
        self.check(self.active_adapters)
        return selected.weight(self.terms(selected, self.active_adapters), self.may_write)

    def terms(self, selected: SelectedParameter, adapters: Iterable[str]) -> list[Term]:
        """List what adapters add to a parameter, in their order."""
        return [
            Term(name, selected.indices[name], selected.values[name], self.scaling[name])
            for name in adapters
            if name in selected.values
        ]

    def check(self, adapters: Iterable[str]) -> None:
        """Check adapters that were loaded but not checked yet, and that the base is theirs."""
        if self._unchecked:
            for adapter in adapters:
                if adapter in self._unchecked:
                    self._check_loaded(adapter)

    @torch.compiler.disable
    def _check_loaded(self, adapter: str) -> None:
        if not self.lacks_data(adapter):
            self._check(self, adapter)

    def _note_set(self, container: str, adapter: str) -> None:
        """Decode an adapter as transformers sets the last of its tensors."""
        # The check could wait for the first use; an optimizer that asks for values could not.
        if container in (awaited := self._awaited.get(adapter, set())):
            awaited.remove(container)
            if not awaited:
                self.check([adapter])

    def accept(self, adapter: str) -> None:
        """Allow an adapter's indices and values to be used: they are decoded and checked."""
        self._awaited.pop(adapter, None)
        self._unchecked.pop(adapter, None)

    def is_accepted(self, adapter: str) -> bool:
        """Tell whether an adapter's indices and values may be used."""
        return adapter in self.metadata and adapter not in self._unchecked

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor on an adapter's values, relative to the scale in its config."""
        if not math.isfinite(scale):
            raise ModelError(f"scale: expected a finite number, found {scale}; nothing was set")
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.metadata[adapter].scale

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, as in PEFT."""
        super().set_adapter(adapter_names, inference_mode)
        self._release()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, as in PEFT."""
        super().enable_adapters(enabled)
        self._release()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, as in PEFT."""
        super().delete_adapter(adapter_name)
        self._release()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters' entries into the base, to stay until :meth:`unmerge`."""
        # Those that are merged already are added again, so that the sum is rounded once.
        adapters = [*self.merged_adapters, *self._to_merge(adapter_names)]
        self.check(adapters)
        if safe_merge:
            self.check_merge(adapter_names)
        for selected in self.selected.values():
            if terms := self.terms(selected, adapters):
                selected.overwrite(terms)
        self.merged_adapters = adapters

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Check, without writing, that a merge gives finite entries."""
        adapters = [*self.merged_adapters, *self._to_merge(adapter_names)]
        for selected in self.selected.values():
            if terms := self.terms(selected, adapters):
                selected.check_finite(terms)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        adapters = check_adapters_to_merge(self, adapter_names)
        return [name for name in adapters if name in self.metadata]

    def unmerge(self) -> None:
        """Put back the base's own entries, bit by bit; nothing happens if nothing is merged."""
        if self.merged:
            for selected in self.selected.values():
                selected.restore()
            self.merged_adapters = []

    def restore_base(self) -> None:
        """Make the base's parameters hold their own entries, or the merged ones while merged."""
        own = [(self, selected) for selected in self.selected.values()]
        for owner, selected in [*own, *self.tied.values()]:
            if not owner.merged:
                selected.restore()

    def _release(self) -> None:
        if not self.merged:
            for selected in self.selected.values():
                selected.release()

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype | None]:
        # PEFT moves a loaded adapter here; without a dtype, the values stay float32.
        return next(base_layer.parameters()).device, None

    # Wherever the base can be seen, it must be right.

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the base's own entries."""
        self.restore_base()
        return self.__dict__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.restore_base()
        super()._apply(fn, recurse)
        for selected in self.selected.values():
            selected.move(fn)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore_base()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.merged and any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            raise MergeError(
                f"{self.path}: expected an unmerged base to load weights into, found adapters "
                f"{', '.join(self.merged_adapters)} merged; call unmerge_adapter first"
            )
        self.restore_base()
        for own, selected in self.selected.items():
            selected.settle()
            for adapter, indices in selected.indices.items():
                new = state_dict.get(f"{prefix}{_container_names(own)[1]}.{adapter}")
                # Other indices than those that were checked must be checked before use.
                if new is not None and not _are_equal(new, indices):
                    self._unchecked[adapter] = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _container_names(own: str) -> tuple[str, str]:
    """Name the layer's containers of a parameter's values and indices."""
    return f"safeweights_values__{own}", f"safeweights_indices__{own}"


def _are_equal(new: Tensor, indices: Tensor) -> bool:
    if new is indices:
        return True
    same = not indices.is_meta and new.dtype == indices.dtype
    return same and torch.equal(new.to(indices.device), indices)


def is_coded(tensor: Tensor) -> bool:
    """Tell whether indices or values are in a coded form."""
    return tensor.dtype is torch.uint8


def layers(model: nn.Module) -> list[SafeWeightsLayer]:
    """List a model's wrapped modules."""
    return [module for module in model.modules() if isinstance(module, SafeWeightsLayer)]


def selected_parameters(model: nn.Module, adapter: str) -> list[SelectedParameter]:
    """List the parameters in which an adapter selects entries."""
    return [selected for layer in layers(model) for selected in layer.parameters_of(adapter)]
