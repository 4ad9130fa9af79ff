"""All that PEFT calls and reads: the model's hooks, and the tables by which it knows the method.

PEFT calls several of these hooks internal; ``tests/tuner/test_contract.py`` pins every name that
this room relies on.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, functional
from peft.config import PeftConfigMixin
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import save_and_load
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safeweights_peft.delta import Array
from safeweights_peft.errors import (
    FormatError,
    ModelError,
    SafeWeightsError,
    UnsupportedFeatureError,
)
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.io import CONFIG_FILE, TENSORS_FILE, inspect
from safeweights_peft.patch.records import Mode
from safeweights_peft.tuner.adapter import (
    describe_deltas,
    fill,
    new_deltas,
    stored_tensors,
    weighted_sum,
)
from safeweights_peft.tuner.beside import Indices
from safeweights_peft.tuner.config import SafeWeightsConfig, SafeWeightsPeftType
from safeweights_peft.tuner.layer import SafeWeightsLayer, layers
from safeweights_peft.tuner.loading import check_fit, check_loaded, make_room, take_in
from safeweights_peft.tuner.protection import hold_back, protect
from safeweights_peft.tuner.root import Root

_FILE_PREFIX = "base_model.model."


class SafeWeightsModel(BaseTuner):
    """Puts layers beside the selected parameters; PEFT puts it into a PeftModel."""

    prefix = "safeweights_"
    tuner_layer_cls = SafeWeightsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name and type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Wrap a model, as PEFT does."""
        self._held_back: dict[str, list[RemovableHandle]] = {}  # maps to be loaded, by adapter
        self._end_protection: dict[str, Callable[[], None]] = {}  # loaded ones
        super().__init__(*args, **kwargs)

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
        """Add an adapter, not active yet, that sums others at their present scales, in float32."""
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

    # Injecting.

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put layers for an adapter beside the parameters that it selects from."""
        configs = self.peft_config.values()
        if len({config.mode for config in configs if isinstance(config, SafeWeightsConfig)}) > 1:
            raise UnsupportedFeatureError(
                f"adapter {adapter_name!r}: expected patches alone or maps alone in a model, "
                "found both; merge the patch first, and use a map of the merged model"
            )
        if self.peft_config[adapter_name].mode == Mode.SPA:
            # A map needs no layers. It freezes entries once its tensors are loaded.
            self._held_back[adapter_name] = hold_back(model, self.peft_config[adapter_name])
            return
        config = self.peft_config[adapter_name]
        if not config.tensors:
            raise ModelError(
                f"adapter {adapter_name!r}: expected a config that names parameters, found one "
                "without any; give SafeWeightsConfig(map=DIRECTORY), or load a patch"
            )
        deltas = new_deltas(model, config)
        self._incoming = config.to_metadata(CONFIG_FILE)
        check_fit(model, adapter_name, self._incoming)
        self._holders = _find_holders(model, config.tensors)
        self.__dict__["_injected"] = model
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        fill(model, adapter_name, deltas)
        # With a config that is in use already, TRL asks for a copy of that adapter to refer to.
        for other, known in self.peft_config.items():
            if other != adapter_name and known is config:
                for layer in layers(model, adapter_name):
                    layer.copy_adapter(other, adapter_name)
                break

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, as in PEFT; the entries of a safety map are free from then on."""
        super().delete_adapter(adapter_name)
        self._release(adapter_name)

    def _take_out(self, adapter_name: str) -> None:
        """Leave the model as it was before a broken adapter came; one that is in use stays."""
        owners = layers(self.model, adapter_name)
        is_used = bool(owners) and all(layer.is_accepted(adapter_name) for layer in owners)
        if not is_used and adapter_name not in self._end_protection:
            self.delete_adapter(adapter_name)
            if not self.peft_config:
                self.unload()

    def _prepare_adapter_config(
        self, peft_config: SafeWeightsConfig, model_config: dict[str, Any]
    ) -> SafeWeightsConfig:
        return peft_config

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
        for own in peft_config.parameters_by_module[current_key]:
            layer = target._modules.get(f"safeweights_values__{own}")
            if not isinstance(layer, SafeWeightsLayer):
                name = f"{current_key}.{own}"
                layer = SafeWeightsLayer(target, own, name, check_loaded)
                layer.attach(self._holders[name])
                Root.of(self.__dict__["_injected"]).add(layer)
            layer.add_adapter(adapter_name, self._incoming, *make_room(layer, self._incoming))

    def _protect(
        self, adapter_name: str, config: SafeWeightsConfig, arrays: dict[str, Array]
    ) -> None:
        """Freeze a loaded safety map's entries; loaded again, it is checked again."""
        end_protection = protect(self.model, config.to_metadata(CONFIG_FILE), arrays)
        self._release(adapter_name)  # of what was loaded before
        self._end_protection[adapter_name] = end_protection

    def _release(self, adapter_name: str) -> None:
        """Let the base run and train as if a safety map had never been named."""
        for handle in self._held_back.pop(adapter_name, []):
            handle.remove()
        self._end_protection.pop(adapter_name, lambda: None)()

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
                layer.merge(adapter_names=adapter_names)
        if layers(self.model):
            Root.of(self.model).detach()
        for adapter_name in self.peft_config:
            self._release(adapter_name)
        return super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Check all layers before the first is written: a merge happens whole or not at all."""
        for layer in layers(self.model):
            layer.check(layer.active if adapter_names is None else adapter_names)
            layer.check_whole()
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
        tuner = getattr(model, "base_model", None)
        tuner = tuner if isinstance(tuner, SafeWeightsModel) else None
        try:
            if config.mode == Mode.SPA:
                if tuner is None:
                    raise UnsupportedFeatureError(
                        "model: expected a PeftModel to load a safety map into, found a "
                        f"{type(model).__name__}; use PeftModel.from_pretrained(model, map, "
                        "is_trainable=True)"
                    )
                arrays = {key: to_numpy(tensor) for key, tensor in stored.items()}
                tuner._protect(adapter_name, config, arrays)
                return {}
            loaded = take_in(model, adapter_name, stored)
        except SafeWeightsError:
            if tuner is not None:
                tuner._take_out(adapter_name)
            raise
        return {f"{key}.{adapter_name}": tensor for key, tensor in loaded.items()}


def _find_holders(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Find the modules that hold each parameter: its own, and those that are tied to it."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, own))
    return {name: holders[id(model.get_parameter(name))] for name in names}


def register() -> None:
    """Register the method with PEFT; once is enough, more does no harm."""
    # PEFT has no plug-in interface, and ``register_peft_method`` takes only names of its own
    # enumeration: so the method's name is put where that function would put it.
    name = SafeWeightsPeftType.SAFEWEIGHTS
    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(name, SafeWeightsConfig)
    if holder is not SafeWeightsConfig:
        raise UnsupportedFeatureError(
            f"{name.value}: expected a free name among PEFT's methods, found "
            f"{holder.__module__}.{holder.__qualname__}; remove that package or use another peft"
        )
    if PEFT_TYPE_TO_TUNER_MAPPING.get(name) is SafeWeightsModel:
        return
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = SafeWeightsConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = SafeWeightsModel
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = SafeWeightsModel.prefix
    _check_files_with_config()
    _refuse_pickles()
    _show_layers_beside_parameters()


def _refuse_pickles() -> None:
    """Have PEFT refuse to write a safety patch as a pickle, which no route would read."""
    plain = PeftModel.save_pretrained

    @functools.wraps(plain)
    def save_pretrained(
        self: PeftModel,
        save_directory: str,
        safe_serialization: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        is_ours = any(isinstance(own, SafeWeightsConfig) for own in self.peft_config.values())
        if is_ours and not safe_serialization:
            raise UnsupportedFeatureError(
                "safe_serialization: expected True, found False: a pickle can run code, so no "
                "route loads a safety patch from one; leave the option out"
            )
        plain(self, save_directory, safe_serialization, *args, **kwargs)

    PeftModel.save_pretrained = save_pretrained


def _show_layers_beside_parameters() -> None:
    """Have PEFT delete from our layers, and tell their tensors from the base's."""
    plain = functional.delete_adapter
    plain_prefixes = save_and_load._get_adapter_state_dict_key_prefixes

    @functools.wraps(plain)
    def delete_adapter(
        model: nn.Module, adapter_name: str, prefix: str, *args: Any, **kwargs: Any
    ) -> list[str] | None:
        # PEFT skips modules with the prefix in their name, for it takes them for parts of layers.
        # Ours are layers; none has this in its name.
        prefix = ".." if prefix == SafeWeightsModel.prefix else prefix
        return plain(model, adapter_name, prefix, *args, **kwargs)

    @functools.wraps(plain_prefixes)
    def find_prefixes(model: PeftModel) -> set[str]:
        modules = model.base_model.model.named_modules()
        indices = {name for name, module in modules if isinstance(module, Indices)}
        return plain_prefixes(model) | indices

    functional.delete_adapter = tuners_utils.delete_adapter = delete_adapter
    save_and_load._get_adapter_state_dict_key_prefixes = find_prefixes


def _check_files_with_config() -> None:
    """Have PEFT check an adapter's config and header whenever it reads the config."""
    # PEFT and transformers read files as they come, and transformers puts whatever a file holds
    # into the model, the base's own weights too. All routes read a config.
    plain = PeftConfigMixin.from_pretrained.__func__

    @functools.wraps(plain)
    def from_pretrained(
        cls: type[PeftConfigMixin],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfigMixin:
        config = plain(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SafeWeightsConfig):
            options = cls._split_kwargs(kwargs)[0]
            inspect(_find_files(pretrained_model_name_or_path, subfolder, options))
        return config

    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)


def _find_files(
    source: str | os.PathLike[str], subfolder: str | None, options: dict[str, Any]
) -> Path:
    """Find an adapter's directory; of a Hub id, with the tensors that will be needed next."""
    folder = Path(source, subfolder or "")
    if (folder / CONFIG_FILE).is_file():
        return folder
    try:
        path = hf_hub_download(str(source), TENSORS_FILE, subfolder=subfolder, **options)
    except EntryNotFoundError as reason:
        raise FormatError(
            f"{source}: expected {TENSORS_FILE}, found none; ask the author for {TENSORS_FILE}"
        ) from reason
    return Path(path).parent
