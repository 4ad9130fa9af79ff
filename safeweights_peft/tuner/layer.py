"""One wrapper for any module that owns selected parameters: Linear, Embedding, norm, experts.

Here lives what PEFT asks of a wrapped module: its adapters, merging, and keeping the base right
wherever it is saved, copied or moved. The parameters' own arithmetic stands in ``parameter``, the
model around the wrappers in ``model``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from safeweights_peft.errors import MergeError, ModelError
from safeweights_peft.patch.artifacts import stored_arrays
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Encoding, indices_key, values_key
from safeweights_peft.tuner.containers import Indices, Values, indices_room, values_room
from safeweights_peft.tuner.loading import Content, decode_loaded, put
from safeweights_peft.tuner.parameter import ForwardMode, SelectedParameter


class SafeWeightsLayer(nn.Module, BaseTunerLayer):
    """Wraps a module that owns selected parameters, or shares one with a module that does.

    ``selected`` holds the parameters, by their own name here; a tied one belongs to another layer.
    ``scaling`` holds the factor on the values, by adapter.
    """

    _active_adapter: str | list[str]
    _disable_adapters: bool

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.selected: dict[str, SelectedParameter] = {}
        self.scaling: dict[str, float] = {}
        self.forward_mode = ForwardMode.AUTO
        self.merged_adapters: list[str] = []
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = (
            "scaling",
            "_metadata",
            "_unchecked",
            "_awaited",
        )
        self._metadata: dict[str, AdapterMetadata] = {}
        self._unchecked: dict[str, None] = {}  # a dict, because PEFT deletes by key
        self._awaited: dict[str, set[str]] = {}  # coded ones: what was not set so far

    def __getattr__(self, name: str) -> Any:
        """Look up what the wrapped module has, such as ``in_features`` or ``num_experts``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet, as while unpickling
                raise
            return getattr(self.base_layer, name)

    @property
    def owned(self) -> list[SelectedParameter]:
        """The selected parameters whose values are held here."""
        return [each for each in self.selected.values() if each.layer is self]

    def add_adapter(self, adapter: str, metadata: AdapterMetadata) -> None:
        """Make room for an adapter; its content is loaded later, and checked before use."""
        for name in metadata.tensors:
            self._add_parameter(name, adapter, metadata)
        self.scaling[adapter] = metadata.scale
        self._metadata[adapter] = metadata
        self._unchecked[adapter] = None
        if any(record.encoding is not Encoding.PLAIN for record in metadata.tensors.values()):
            owned = [each for each in self.owned if adapter in each.values]
            self._awaited[adapter] = {key for each in owned for key in each.containers}

    def _add_parameter(self, name: str, adapter: str, metadata: AdapterMetadata) -> None:
        own = name.rpartition(".")[2]
        if own not in self.selected:
            selected = self.selected[own] = SelectedParameter(self, own)
            values, indices = selected.containers
            self.add_module(values, Values(partial(self._arrived, values)))
            self.add_module(indices, Indices(partial(self._arrived, indices)))
            self.adapter_layer_names += (values,)
            self.other_param_names += (indices,)
        selected, layouts = self.selected[own], stored_arrays(metadata, name)
        device = selected.parameter.device
        selected.values[adapter] = values_room(layouts[values_key(name)], device)
        selected.indices[adapter] = indices_room(layouts[indices_key(name)], device)

    def share(self, own: str, selected: SelectedParameter) -> None:
        """Use another layer's selected parameter, which this module's parameter is tied to."""
        self.selected[own] = selected
        self._active_adapter = selected.layer._active_adapter
        self._disable_adapters = selected.layer._disable_adapters
        self.forward_mode = selected.layer.forward_mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module with the active adapters' entries."""
        weights = {}
        for own, selected in self.selected.items():
            if selected.layer is not self:
                self._check_tied(own, selected)
            weight = selected.weight()
            if weight is not None:
                weights[own] = weight
        if not weights:
            return self.base_layer(*args, **kwargs)
        return functional_call(self.base_layer, weights, args, kwargs)

    def _check_tied(self, own: str, selected: SelectedParameter) -> None:
        if getattr(self.base_layer, own) is not selected.parameter:
            raise ModelError(
                f"{self.path}.{own}: expected the parameter of {selected.name}, found another; "
                "load the adapter after untying, and use DDP rather than DataParallel"
            )

    def check(self, adapters: Iterable[str]) -> None:
        """Check adapters that were loaded but not checked yet, and that the base is theirs."""
        if self._unchecked:
            for adapter in adapters:
                if adapter in self._unchecked:
                    self._check(adapter)

    @torch.compiler.disable
    def _check(self, adapter: str) -> None:
        held = [each for each in self.owned if adapter in each.values]
        if not any(each.parameter.is_meta for each in held):  # when there are entries to see
            self.accept(adapter, decode_loaded(held, adapter, self._metadata[adapter]))

    def _arrived(self, container: str, adapter: str) -> None:
        """Decode an adapter as transformers sets the last of its tensors.

        Its check could wait for the first use; an optimizer that asks for its values could not.
        """
        awaited = self._awaited.get(adapter, set())
        if container in awaited:
            awaited.remove(container)
            if not awaited:
                self.check([adapter])

    def accept(self, adapter: str, content: Mapping[str, Content]) -> None:
        """Use an adapter's content from now on."""
        self._awaited.pop(adapter, None)
        for each in self.owned:
            if adapter in each.values:
                put(each, adapter, content[each.name])
        self.mark_checked(adapter)

    def described(self, adapter: str) -> AdapterMetadata:
        """Give an adapter's description, as :meth:`add_adapter` got it."""
        return self._metadata[adapter]

    def mark_checked(self, adapter: str) -> None:
        """Note that an adapter's indices and values may be used."""
        self._unchecked.pop(adapter, None)

    def is_checked(self, adapter: str) -> bool:
        """Tell whether an adapter's indices and values may be used."""
        return adapter in self._metadata and adapter not in self._unchecked

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor on an adapter's values, relative to the scale in its config."""
        if not math.isfinite(scale):
            raise ModelError(f"scale: expected a finite number, found {scale}; nothing was set")
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self._metadata[adapter].scale

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
        """Write adapters' entries into the base, to stay until :meth:`unmerge`.

        Adapters that are merged already are folded in again, so that the result is rounded once.
        """
        adapters = [*self.merged_adapters, *self._to_merge(adapter_names)]
        self.check(adapters)
        if safe_merge:
            self.check_merge(adapter_names)
        for each in self.owned:
            if held := each.held(adapters):
                each.overwrite(held)
        self.merged_adapters = adapters

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Check, without writing, that a merge gives finite entries."""
        for each in self.owned:
            if held := each.held([*self.merged_adapters, *self._to_merge(adapter_names)]):
                each.check_finite(held)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        adapters = check_adapters_to_merge(self, adapter_names)
        return [name for name in adapters if name in self._metadata]

    def unmerge(self) -> None:
        """Put back the base's own entries, bit by bit; nothing happens if nothing is merged."""
        if self.merged:
            for each in self.owned:
                each.restore()
            self.merged_adapters = []

    def restore_base(self) -> None:
        """Make the base's parameters hold their own entries, or the merged ones while merged."""
        for each in self.selected.values():
            if not each.layer.merged:
                each.restore()

    def _release(self) -> None:
        for each in self.owned:
            if not self.merged:
                each.release()

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the copied parameters again."""
        super().__setstate__(state)
        for each in self.owned:
            each.settle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.restore_base()
        super()._apply(fn, recurse)
        for each in self.owned:
            each.move(fn)
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
        for each in self.owned:
            each.forget_plan()
            self._distrust_new_indices(each, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _distrust_new_indices(
        self, selected: SelectedParameter, state_dict: dict[str, Tensor], prefix: str
    ) -> None:
        """Check again, before use, an adapter whose indices are about to be replaced."""
        for adapter, indices in selected.indices.items():
            new = state_dict.get(f"{prefix}safeweights_indices__{selected.own}.{adapter}")
            if new is None:
                continue
            same = not indices.is_meta and new.dtype == indices.dtype
            if not same or not torch.equal(new.to(indices.device), indices):
                self._unchecked[adapter] = None


def named_layers(model: nn.Module) -> Iterator[tuple[str, SafeWeightsLayer]]:
    """List a model's wrapped modules."""
    for name, module in model.named_modules():
        if isinstance(module, SafeWeightsLayer):
            yield name, module


def layers(model: nn.Module) -> Iterator[SafeWeightsLayer]:
    """List a model's wrapped modules."""
    return (layer for _, layer in named_layers(model))


def selected_parameters(model: nn.Module, adapter: str) -> list[SelectedParameter]:
    """List the parameters in which an adapter selects entries."""
    return [each for layer in layers(model) for each in layer.owned if adapter in each.values]
