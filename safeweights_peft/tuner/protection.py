"""A safety map as an adapter of PEFT: it adds nothing, and freezes entries while the base trains.

Loaded with ``is_trainable=True`` it does for full fine-tuning what ``training.preserve`` does.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from safeweights_peft.delta import Array
from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.freeze import FreezeGuard, FrozenEntries
from safeweights_peft.modeling.tensors import check_entries, to_torch
from safeweights_peft.patch.artifacts import check_tensors
from safeweights_peft.patch.io import CONFIG_FILE
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.loading import find_parameter

logger = logging.getLogger(__name__)


def hold_back(model: nn.Module, config: SafeWeightsConfig) -> list[RemovableHandle]:
    """Check that a safety map may be loaded into a model, and let it not run until it is."""
    # Routes that never hand over the map's tensors would leave the model unprotected in silence.
    if config.inference_mode:
        raise UnsupportedFeatureError(
            f"{CONFIG_FILE}: mode: expected 'set', found 'spa': a safety map has no values to "
            "load; to protect a training give is_trainable=True, to read it use read_map"
        )
    records = config.to_metadata(CONFIG_FILE).tensors
    for name, record in records.items():
        find_parameter(model, name, record)
    modules = {model, *(_find_owner(model, name) for name in records)}
    return [module.register_forward_pre_hook(_refuse_to_run) for module in modules]


def _refuse_to_run(*_: Any) -> None:
    raise ModelError(
        "model: expected a loaded safety map, found its config alone; load the base anew, then use "
        "PeftModel.from_pretrained(base, map, is_trainable=True)"
    )


def protect(
    model: nn.Module, metadata: AdapterMetadata, tensors: Mapping[str, Array]
) -> Callable[[], None]:
    """Freeze a safety map's entries for as long as their modules are there; return how to end."""
    stored, entries = check_tensors(metadata, tensors, CONFIG_FILE), []
    for name, record in metadata.tensors.items():
        indices = to_torch(stored[name].indices).clone()  # a view of the file, which may go
        frozen = FrozenEntries(name, find_parameter(model, name, record), indices)
        check_entries(name, frozen.originals, record, artifact=metadata.mode.artifact)
        entries.append(frozen)
    guard = FreezeGuard(entries)
    guard.attach()
    handles = [model.register_forward_pre_hook(_make_model_check(metadata))]
    for frozen in entries:
        owner = _find_owner(model, frozen.name)
        handles.append(owner.register_forward_pre_hook(_make_copy_check(frozen, guard)))
        handles.append(owner.register_state_dict_pre_hook(_make_restore(frozen, guard)))
    logger.warning(
        "model: %s entries stay as they are while the base trains in full; save what is trained "
        "with model.get_base_model().save_pretrained, and give a Trainer model.get_base_model()",
        f"{sum(frozen.indices.numel() for frozen in entries):,}",
    )

    def end() -> None:
        for handle in handles:
            handle.remove()
        guard.detach()

    return end


def _find_owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _make_model_check(metadata: AdapterMetadata) -> Callable[..., None]:
    """Make a hook on the model that refuses to train with adapters that were added later."""

    def check(model: nn.Module, _inputs: Any) -> None:
        if torch.is_grad_enabled():
            for name, record in metadata.tensors.items():
                find_parameter(model, name, record)

    return check


# PEFT's wrapper may be dropped while the base goes on training. So the hooks on the modules that
# own the entries hold the guard, as default arguments: it lives as long as one of these modules.


def _make_copy_check(frozen: FrozenEntries, guard: FreezeGuard) -> Callable[..., None]:
    """Make a hook on an owner that refuses to train another parameter in its place."""
    own = frozen.name.rpartition(".")[2]

    def check(module: nn.Module, _inputs: Any, _guard: FreezeGuard = guard) -> None:
        parameter = module._parameters.get(own)
        is_trained = parameter is not None and parameter.requires_grad and torch.is_grad_enabled()
        if is_trained and parameter is not frozen.parameter:
            raise UnsupportedFeatureError(
                f"{frozen.name}: expected the parameter whose entries are frozen, found another, "
                "in a copy of the model or in its place; load the safety map into that model"
            )

    return check


def _make_restore(frozen: FrozenEntries, guard: FreezeGuard) -> Callable[..., None]:
    """Make a hook on an owner that writes the entries back before they are saved."""

    def restore(module: nn.Module, *_: Any, _guard: FreezeGuard = guard) -> None:
        # An optimizer of copies, such as DeepSpeed's, moves entries that no hook sees.
        if module._parameters.get(frozen.name.rpartition(".")[2]) is frozen.parameter:
            frozen.restore()

    return restore
