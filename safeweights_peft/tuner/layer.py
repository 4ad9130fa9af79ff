"""What PEFT sees of an adapter in a parameter: values and indices beside it, in its own module."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.tuner.beside import CodedValues, Door, Indices, is_coded
from safeweights_peft.tuner.entries import gather, move, same_bits
from safeweights_peft.tuner.parameter import Selection, Term
from safeweights_peft.tuner.sharded import Sharded, write_shard

_PREFIXES = ("safeweights_values__", "safeweights_indices__")
_SAMPLED = 64  # entries


class SafeWeightsLayer(nn.ParameterDict, BaseTunerLayer):
    """The values of one parameter, by adapter: a child of the module that owns the parameter."""

    # PEFT walks these by name, to train and delete adapters.
    adapter_layer_names = ("_values",)
    other_param_names = (
        "_indices",
        "_scaling",
        "_metadata",
        "_originals",
        "_unchecked",
        "_awaited",
    )
    _indices: Indices
    _active_adapter: str | list[str]
    _disable_adapters: bool
    merged_adapters: list[str]

    def __init__(
        self,
        module: nn.Module,
        own: str,
        name: str,
        check: Callable[["SafeWeightsLayer", str], None],
    ) -> None:
        super().__init__()
        # In the dictionary, so that they don't become children of this layer.
        self.__dict__["_module"] = module
        self.__dict__["_indices"] = Indices(self)
        self._own, self._name = own, name
        self._numel = getattr(module, own).numel()
        self._scaling: dict[str, float] = {}  # factor on the values
        self._metadata: dict[str, AdapterMetadata] = {}
        self._originals: dict[str, Tensor] = {}  # the base's entries; of accepted adapters only
        self._unchecked: dict[str, None] = {}  # a dict, because PEFT deletes by key
        self._awaited: dict[str, set[str]] = {}  # containers still to be set by transformers
        self.merged_adapters = []
        self._frozen: set[str] = set()  # adapters that weren't trained as all were switched off
        self._check = check  # decodes what was loaded, and calls accept
        self._handles: list[RemovableHandle] = []
        self._sharded: Sharded | None = None
        self._holders: list[tuple[nn.Module, str]] = []  # in a list: not as children
        self._selection = Selection(self)

    # An adapter's name is an attribute here, so all other attributes begin with an underscore, or
    # are PEFT's; check_name refuses those.

    @property
    def _values(self) -> Self:
        return self

    @property
    def active(self) -> list[str]:
        """The active adapters, also those that select no entries here."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    @property
    def _shown(self) -> list[str]:
        shown: list[str] = [] if self._disable_adapters else self.active
        return self.merged_adapters or shown

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameter."""
        return self.__dict__["_module"]

    @property
    def name(self) -> str:
        """The parameter's whole name."""
        return self._name

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stands in the module now."""
        return getattr(self.module, self._own)

    @property
    def sharded(self) -> Sharded | None:
        """What stands in for the selection where the parameter is sharded."""
        return self._sharded

    @property
    def numel(self) -> int:
        """How many entries the whole parameter has."""
        return self._numel

    @property
    def holders(self) -> list[tuple[nn.Module, str]]:
        """All modules that the parameter stands in, and its name there; tied ones have several."""
        return self._holders

    @property
    def indices(self) -> Indices:
        """The indices, by adapter."""
        return self.__dict__["_indices"]

    @property
    def selection(self) -> Selection:
        """What the parameter holds and shows."""
        return self._selection

    @property
    def is_merged(self) -> bool:
        """Whether the parameter holds entries for good."""
        return bool(self.merged_adapters)

    @property
    def is_trained(self) -> bool:
        """Whether an adapter that is seen has values that require a gradient."""
        return any(term.values.requires_grad for term in self.terms())

    def get_base_layer(self) -> nn.Module:
        """Return the module that owns the parameter."""
        return self.module

    def metadata_of(self, adapter: str) -> AdapterMetadata | None:
        """Return the description of an adapter that selects entries here."""
        return self._metadata.get(adapter)

    def lacks_data(self) -> bool:
        """Tell whether the base's entries, which checks and decoding need, are not here yet."""
        return self.parameter.is_meta

    # Content.

    def add_adapter(
        self, adapter: str, metadata: AdapterMetadata, values: nn.Parameter, indices: Tensor
    ) -> None:
        """Take room for an adapter's values and indices, which are checked before their use."""
        self[adapter], self.indices[adapter] = values, indices
        self._scaling[adapter] = metadata.scale
        self._metadata[adapter] = metadata
        self._unchecked[adapter] = None
        if is_coded(values) or is_coded(indices):
            self._awaited[adapter] = {"values", "indices"}

    def copy_adapter(self, source: str, adapter: str) -> None:
        """Take another adapter's content; one that wasn't loaded yet stays to be loaded."""
        if source in self._originals and adapter in self._unchecked:
            with torch.inference_mode(False), torch.no_grad():
                self.indices[adapter] = self.indices[source].clone()
                is_trained = self[adapter].requires_grad
                self[adapter] = nn.Parameter(self[source].detach().clone(), is_trained)
            self._scaling[adapter] = self._scaling[source]
            self.accept(adapter)

    def check(self, adapters: Iterable[str]) -> None:
        """Check adapters that were loaded but not checked yet, and that the base is theirs."""
        if self._unchecked:
            for adapter in adapters:
                if adapter in self._unchecked and not self.lacks_data():
                    self._check(self, adapter)

    def check_active(self) -> None:
        """Check active adapters that were loaded but not checked yet."""
        if self._unchecked and not self._disable_adapters and not self.is_merged:
            self.check(self.active)

    def note_set(self, container: str, adapter: str) -> None:
        """Decode an adapter as transformers sets the last of its tensors."""
        # The check could wait for the first use; an optimizer that asks for values could not.
        self._selection.forget()
        if container in (awaited := self._awaited.get(adapter, set())):
            awaited.remove(container)
            if not awaited:
                self.check([adapter])

    def distrust(self, adapter: str) -> None:
        """Check an adapter again before it is used."""
        if adapter in self._originals:
            self._originals.pop(adapter)
            self._selection.sync(force=True)  # while its indices are still those that were used
        self._unchecked[adapter] = None

    @torch.compiler.disable
    def accept(self, adapter: str, entries: Tensor | None = None) -> None:
        """Allow checked indices and values to be used; entries are the base's, if known."""
        self._awaited.pop(adapter, None)
        self._unchecked.pop(adapter, None)
        self._take_originals(adapter, entries)
        self._selection.sync()

    def is_accepted(self, adapter: str) -> bool:
        """Tell whether an adapter's indices and values may be used."""
        return adapter in self._originals

    def base_entries(self, adapter: str) -> Tensor:
        """Return the base's entries, in the checkpoint's dtype where they were loaded from it."""
        if self.parameter.requires_grad:
            return self._selection.gather(self.indices[adapter])
        return self._originals[adapter]

    def sample(self) -> Tensor:
        """Gather a few of the parameter's entries, selected ones and others, as they stand."""
        own = [term.indices[:_SAMPLED].long() for term in self.terms()]
        step = max(1, self._numel // _SAMPLED)
        spread = torch.arange(0, self._numel, step, device=self.parameter.device)
        return gather(self.parameter, torch.cat([spread, *own]))

    def take_originals(self) -> None:
        """Set the base's entries aside anew."""
        for adapter in [*self._originals]:
            self._take_originals(adapter)

    def _take_originals(self, adapter: str, entries: Tensor | None = None) -> None:
        if entries is None:
            entries = self._selection.gather(self.indices[adapter])
        dtype = getattr(torch, self._metadata[adapter].tensors[self._name].dtype)
        with torch.inference_mode(False):
            stored = entries.to(dtype)
            # A base in a dtype that the checkpoint's can't hold is put back as it is. What corrects
            # a LoRA beside it stays as wide as the LoRA, or it would not cancel the LoRA's part.
            exact = same_bits(stored.to(entries.dtype), entries)
            is_rounded = exact and not self._metadata[adapter].is_correction
        self._originals[adapter] = stored if is_rounded else entries

    def terms(self, adapters: Iterable[str] | None = None) -> list[Term]:
        """List what adapters add; by default those that are to be seen."""
        names = self._shown if adapters is None else adapters
        return [
            Term(
                name,
                self.indices[name],
                self[name].detach() if self.is_merged else self[name],
                self._originals[name],
                self._scaling[name],
            )
            for name in names
            if name in self._originals
        ]

    # Switching.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the factor on an adapter's values, relative to the scale in its config."""
        if not math.isfinite(scale):
            raise ModelError(f"scale: expected a finite number, found {scale}; nothing was set")
        if adapter in self._scaling:
            self._scaling[adapter] = scale * self._metadata[adapter].scale
            self._selection.sync()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters, as in PEFT."""
        super().set_adapter(adapter_names, inference_mode)
        if not self._disable_adapters:  # enable_adapters begins with this
            self._selection.sync()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Choose whether adapters are trained, as in PEFT."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._selection.sync()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Choose whether all adapters are trained, as in torch."""
        super().requires_grad_(requires_grad)
        self._selection.sync()
        return self

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, as in PEFT, but leave frozen ones frozen."""
        # PEFT trains whatever it switches on. Steps of training round entries less, so that
        # a look at the base would change the logits of a 16-bit base that is loaded wider.
        if not enabled:
            self.merged_adapters = []
            if not self._disable_adapters:
                self._frozen = self._list_frozen()
        still_frozen = self._frozen & self._list_frozen() if self._disable_adapters else ()
        super().enable_adapters(enabled)
        for name in still_frozen:
            self[name].requires_grad_(False)
        self._selection.sync()

    def _list_frozen(self) -> set[str]:
        # Coded values have no gradient, and note whether they are to have one.
        return {
            name
            for name, own in self._parameters.items()
            if own is not None and not (own.requires_grad or getattr(own, "is_trained", False))
        }

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, as in PEFT."""
        super().delete_adapter(adapter_name)
        self._selection.sync()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters' entries into the base, to stay until :meth:`unmerge`."""
        # Those that are merged already are added again, so that the sum is rounded once.
        adapters = [*self.merged_adapters, *self._to_merge(adapter_names)]
        self.check(adapters)
        if safe_merge:
            self.check_merge(adapter_names)
        self.merged_adapters = adapters
        self._selection.sync(force=True)

    def check_whole(self) -> None:
        """Check that a merge can write the parameter: no process holds a sharded one whole."""
        if self._sharded is not None:
            raise UnsupportedFeatureError(
                f"{self._name}: expected a whole parameter to merge into, found a sharded one; "
                "save the adapter, and merge it into the checkpoint"
            )

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Check, without writing, that a merge gives finite entries."""
        terms = self.terms([*self.merged_adapters, *self._to_merge(adapter_names)])
        if terms:
            self._selection.check_finite(terms)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        adapters = check_adapters_to_merge(self, adapter_names)
        return [name for name in adapters if name in self._metadata]

    def unmerge(self) -> None:
        """Let the base's own entries be seen again wherever they were before the merge."""
        if self.merged_adapters:
            self.merged_adapters = []
            self._selection.sync()

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype | None]:
        # PEFT moves a loaded adapter here; without a dtype, the values stay float32.
        return self.parameter.device, None

    # What torch does to modules.

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep coded values what they are when loaded ones take their place."""
        if not isinstance(value, Tensor | nn.Module | None):
            object.__setattr__(self, name, value)  # torch's own is slow
            return
        present = self.__dict__.get("_parameters", {}).get(name)
        if isinstance(present, CodedValues) and isinstance(value, Tensor) and is_coded(value):
            value = CodedValues(value).requires_grad_(present.is_trained)
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            if isinstance(value, DTensor):
                self._become_sharded()
            self.note_set("values", name)

    def _become_sharded(self) -> None:
        """Leave the parameter alone, and change copies of it: FSDP2 has sharded it."""
        if self.is_merged:
            raise UnsupportedFeatureError(
                f"{self._name}: expected an adapter that is not merged to shard, found a merged "
                "one; call unmerge_adapter first, or merge_and_unload"
            )
        if self._sharded is None:
            if isinstance(self.parameter, DTensor):
                self._selection.give_up(partial(write_shard, self.parameter))
            else:  # it comes next
                self._selection.show_base(force=True)
                self._selection.let_go()
                self._selection.give_up()
            self._sharded = Sharded(self._selection, self._holders)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._selection.prepare_to_move()
        super()._apply(lambda tensor: move(tensor, fn), recurse)
        self._originals.update({name: move(own, fn) for name, own in self._originals.items()})
        self._selection.move(fn)
        return self

    def attach(self, holders: Iterable[tuple[nn.Module, str]]) -> None:
        """Become a part of the module, and watch all modules that hold the parameter."""
        children: tuple[nn.Module, nn.Module] = self, self.indices
        for prefix, child in zip(_PREFIXES, children, strict=True):
            self.module.add_module(prefix + self._own, child)
        self._holders = list(holders)
        for module, own in self._holders:
            door = Door(self, own)
            self._handles += [
                module.register_state_dict_pre_hook(door.before_save),
                module._register_state_dict_hook(door.after_save),
                module.register_load_state_dict_pre_hook(door.before_load),
                module.register_load_state_dict_post_hook(door.after_load),
            ]

    def detach(self) -> None:
        """Leave the module, with merged entries in the parameter or the base's own."""
        if self._sharded is not None:
            self._sharded.detach()
        if not self.is_merged:
            self._selection.show_base(force=True)
        self._selection.let_go()
        for prefix in _PREFIXES:
            delattr(self.module, prefix + self._own)
        while self._handles:
            self._handles.pop().remove()


def layers(model: nn.Module, adapter: str | None = None) -> list[SafeWeightsLayer]:
    """List a model's layers; those in which an adapter selects entries, if one is named."""
    found = [module for module in model.modules() if isinstance(module, SafeWeightsLayer)]
    return found if adapter is None else [layer for layer in found if adapter in layer]
