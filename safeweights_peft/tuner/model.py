"""The hooks by which PEFT wraps a model, runs, merges, saves and loads an adapter of this method.

Here lives the class that PEFT instantiates. What one wrapped module does stands in ``layer``, what
adapters hold in ``content``, whether they fit a model in ``fit``. PEFT calls several of these hooks
internal; ``tests/tuner/test_contract.py`` pins them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safeweights_peft.delta import Array
from safeweights_peft.errors import ModelError, SafeWeightsError, UnsupportedFeatureError
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.records import Mode
from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.content import (
    create_adapter,
    describe_deltas,
    fill,
    round_values,
    stored_tensors,
    weighted_sum,
)
from safeweights_peft.tuner.fit import check_fit, share_tied
from safeweights_peft.tuner.layer import SafeWeightsLayer, layers, selected_parameters
from safeweights_peft.tuner.loading import take_in
from safeweights_peft.tuner.parameter import ForwardMode
from safeweights_peft.tuner.protection import hold_back, protect

__all__ = ["SafeWeightsModel", "create_adapter", "round_values", "set_forward_mode"]

_FILE_PREFIX = "base_model.model."


class SafeWeightsModel(BaseTuner):
    """Wraps the modules that own an adapter's parameters; PEFT puts it into a PeftModel."""

    prefix = "safeweights_"
    tuner_layer_cls = SafeWeightsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name and type

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the factor on an adapter's values, relative to the scale in its config."""
        for layer in layers(self.model):
            layer.set_scale(adapter_name, scale)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter that is a weighted sum of others, over the union of their entries.

        Its values are summed in float32 with each adapter's present scale; its own scale is 1. Like
        any further adapter it is not active yet.
        """
        if combination_type != "linear":
            raise UnsupportedFeatureError(
                f"combination_type: expected 'linear', found {combination_type!r}; the others are "
                "made for low-rank matrices"
            )
        known = self.peft_config
        if not adapters or adapter_name in known or not set(adapters) <= set(known):
            raise ModelError(
                f"adapters: expected some of {', '.join(known)} and a new name, found "
                f"{', '.join(adapters) or 'none'} as {adapter_name}; load or rename adapters"
            )
        if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
            raise ModelError(
                f"weights: expected {len(adapters)} finite numbers, found {list(weights)}; "
                "give one per adapter"
            )
        terms = list(zip(adapters, weights, strict=True))
        metadata, deltas = weighted_sum(self.model, known, terms)
        metadata = describe_deltas(self.model, metadata, deltas)
        known[adapter_name] = SafeWeightsConfig.from_metadata(metadata)
        self.inject_adapter(self.model, adapter_name)
        fill(self.model, adapter_name, deltas)

    # Wrapping.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Wrap a model, as PEFT does."""
        self._held_back: dict[str, list[RemovableHandle]] = {}  # maps to be loaded, by adapter
        self._end_protection: dict[str, Callable[[], None]] = {}  # loaded ones
        super().__init__(*args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Wrap a model's modules for an adapter; those with tied parameters too.

        Nothing is wrapped for a safety map, which freezes entries once its tensors are loaded.
        """
        own = [each for each in self.peft_config.values() if isinstance(each, SafeWeightsConfig)]
        if len({config.mode for config in own}) > 1:
            raise UnsupportedFeatureError(
                f"adapter {adapter_name!r}: expected patches alone or maps alone in a model, "
                "found both; merge the patch first, and use a map of the merged model"
            )
        if self.peft_config[adapter_name].mode == Mode.SPA:
            self._held_back[adapter_name] = hold_back(model, self.peft_config[adapter_name])
            return
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        share_tied(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, as in PEFT; the entries of a safety map are free from then on."""
        super().delete_adapter(adapter_name)
        self._release(adapter_name)

    def _take_out(self, adapter_name: str) -> None:
        """Leave the model as it was before a broken adapter came; one that is in use stays."""
        parts = selected_parameters(self.model, adapter_name)
        is_used = bool(parts) and all(each.layer.is_checked(adapter_name) for each in parts)
        if not is_used and adapter_name not in self._end_protection:
            self.delete_adapter(adapter_name)
            if not self.peft_config:
                self.unload()

    def _prepare_adapter_config(
        self, peft_config: SafeWeightsConfig, model_config: dict[str, Any]
    ) -> SafeWeightsConfig:
        return peft_config

    def _prepare_model(self, peft_config: SafeWeightsConfig, model: nn.Module) -> None:
        metadata = peft_config.to_metadata("adapter_config.json")
        check_fit(model, metadata, peft_config.parameters_by_module)
        self._incoming = metadata

    @staticmethod
    def _check_target_module_exists(peft_config: SafeWeightsConfig, key: str) -> bool:
        return key in peft_config.parameters_by_module

    def _create_and_replace(
        self,
        peft_config: SafeWeightsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, SafeWeightsLayer):
            layer = SafeWeightsLayer(target, current_key)
            setattr(parent, target_name, layer)
        names = (f"{current_key}.{own}" for own in peft_config.parameters_by_module[current_key])
        records = {name: self._incoming.tensors[name] for name in names}
        layer.add_adapter(adapter_name, replace(self._incoming, tensors=records))

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)

    def _protect(
        self, adapter_name: str, config: SafeWeightsConfig, arrays: dict[str, Array]
    ) -> None:
        """Freeze a loaded safety map's entries; loaded again, it is checked again."""
        metadata = config.to_metadata(f"adapter {adapter_name!r}")
        self._let_run(adapter_name)
        end_protection = protect(self.model, metadata, arrays)
        self._release(adapter_name)  # of what was loaded before
        self._end_protection[adapter_name] = end_protection

    def _let_run(self, adapter_name: str) -> None:
        for handle in self._held_back.pop(adapter_name, []):
            handle.remove()

    def _release(self, adapter_name: str) -> None:
        """Let the base run and train as if a safety map had never been named."""
        self._let_run(adapter_name)
        if adapter_name in self._end_protection:
            self._end_protection.pop(adapter_name)()

    # Merging.

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Write adapters' entries into the base, to stay until ``unmerge_adapter``."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        for layer in layers(self.model):
            layer.restore_base()
        for adapter_name in self.peft_config:
            self._release(adapter_name)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, adapter_names=adapter_names
        )

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Check all layers before the first is written: a merge happens whole or not at all."""
        for layer in layers(self.model):
            layer.check(layer.active_adapters if adapter_names is None else adapter_names)
            if safe_merge:
                layer.check_merge(adapter_names)

    def _check_merge_allowed(self) -> None:
        """PEFT warns of tied weights here; they are merged once, in the shared parameter."""

    # Running.

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedFeatureError(
                "adapter_names: expected the same adapters for the whole batch, found "
                f"{kwargs['adapter_names']}; use set_adapter and one batch per adapter"
            )
        yield

    # Saving and loading.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SafeWeightsConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        if config.mode == Mode.SPA:
            raise UnsupportedFeatureError(
                f"adapter {adapter_name!r}: expected a safety patch to save, found a safety map, "
                "which training doesn't change; what was trained is the base: save it with "
                "model.get_base_model().save_pretrained, and give a Trainer the base"
            )
        return stored_tensors(model, config, adapter_name, state_dict)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f".{cls.prefix}" not in key:
            raise UnsupportedFeatureError(
                f"{key}: expected to save the adapter's own tensors, found one of the base; use "
                "save_embedding_layers=False, and a base whose embeddings were not resized"
            )
        return key.removesuffix(f".{adapter_name}")

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise UnsupportedFeatureError(
            "path_initial_model_for_weight_conversion: expected None, found a path; "
            "a safety patch never changes the base that it is trained on"
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SafeWeightsConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        stored = {
            _FILE_PREFIX + key.removeprefix(_FILE_PREFIX): tensor
            for key, tensor in state_dict.items()
        }
        try:
            if config.mode == Mode.SPA:
                arrays = {key: to_numpy(tensor) for key, tensor in stored.items()}
                _tuner(model)._protect(adapter_name, config, arrays)
                return {}
            loaded = take_in(selected_parameters(model, adapter_name), adapter_name, stored)
        except SafeWeightsError:
            tuner = getattr(model, "base_model", None)
            if isinstance(tuner, SafeWeightsModel):
                tuner._take_out(adapter_name)
            raise
        return {f"{key}.{adapter_name}": tensor for key, tensor in loaded.items()}


def _tuner(model: nn.Module) -> SafeWeightsModel:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, SafeWeightsModel):
        raise UnsupportedFeatureError(
            "model: expected a PeftModel to load a safety map into, found a "
            f"{type(model).__name__}; use PeftModel.from_pretrained(model, map, is_trainable=True)"
        )
    return tuner


def set_forward_mode(model: nn.Module, mode: ForwardMode | str) -> None:
    """Choose how forward passes get their weights; see :mod:`safeweights_peft.tuner.parameter`.

    Args:
        model: The PeftModel, or a model into which an adapter was loaded.
        mode: "auto", "in_place" or "functional".

    Raises:
        ModelError: It is none of these.
    """
    if mode not in list(ForwardMode):
        raise ModelError(f"mode: expected auto, in_place or functional, found {mode!r}")
    for layer in layers(model):
        layer.restore_base()
        layer.forward_mode = ForwardMode(mode)
