"""A safety map as an adapter of PEFT: it adds nothing, and freezes entries while the base trains.

Loaded with ``is_trainable=True`` it does for full fine-tuning what ``training.preserve`` does, from
then on. It belongs to the modules that own the entries: it lasts as long as they do, sees to it
that what they save holds the entries as they were, and refuses to train what it can't protect:
copies of them, and adapters that were added later. How entries are frozen stands in ``freeze``.
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
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.loading import find_parameter

logger = logging.getLogger(__name__)

_SOURCE = "adapter_config.json"


def hold_back(model: nn.Module, config: SafeWeightsConfig) -> list[RemovableHandle]:
    """Check that a safety map may be loaded into a model, and let it not run until it is.

    Routes that never hand over the map's tensors would leave the model unprotected in silence.
    """
    if config.inference_mode:
        raise UnsupportedFeatureError(
            f"{_SOURCE}: mode: expected 'set', found 'spa': a safety map has no values to load; to "
            "protect a training give is_trainable=True, to read it use read_map"
        )
    tensors = config.to_metadata(_SOURCE).tensors
    for name, record in tensors.items():
        find_parameter(model, name, record)
    owners = {model, *(_owner(model, name) for name in tensors)}
    return [each.register_forward_pre_hook(_refuse_to_run) for each in owners]


def _refuse_to_run(*_: Any) -> None:
    raise ModelError(
        "model: expected a loaded safety map, found its config alone; load the base anew, then use "
        "PeftModel.from_pretrained(base, map, is_trainable=True)"
    )


def protect(
    model: nn.Module, metadata: AdapterMetadata, tensors: Mapping[str, Array]
) -> Callable[[], None]:
    """Freeze a safety map's entries from now on, for as long as the modules are there."""
    stored, entries = check_tensors(metadata, tensors, _SOURCE), []
    for name, record in metadata.tensors.items():
        indices = to_torch(stored[name].indices)
        frozen = FrozenEntries(name, find_parameter(model, name, record), indices)
        check_entries(name, frozen.originals, record, artifact=metadata.mode.artifact)
        entries.append(frozen)
    guard = FreezeGuard(entries)
    guard.attach()
    handles = [model.register_forward_pre_hook(_whole_model_check(metadata))]
    for each in entries:
        owner = _owner(model, each.name)
        handles.append(owner.register_forward_pre_hook(_copy_check(each, guard)))
        handles.append(owner.register_state_dict_pre_hook(_restoring(each, guard)))
    logger.warning(
        "model: %s entries stay as they are while the base trains in full; save what is trained "
        "with model.get_base_model().save_pretrained, and give a Trainer model.get_base_model()",
        f"{sum(each.indices.numel() for each in entries):,}",
    )

    def end() -> None:
        for handle in handles:
            handle.remove()
        guard.detach()

    return end


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _whole_model_check(metadata: AdapterMetadata) -> Callable[..., None]:
    """Make a hook on the model that refuses to train with adapters that were added later."""

    def check(model: nn.Module, _inputs: Any) -> None:
        if torch.is_grad_enabled():
            for name, record in metadata.tensors.items():
                find_parameter(model, name, record)

    return check


def _copy_check(frozen: FrozenEntries, guard: FreezeGuard) -> Callable[..., None]:
    """Make a hook on an owner that refuses to train another parameter; it keeps the guard alive."""
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


def _restoring(frozen: FrozenEntries, guard: FreezeGuard) -> Callable[..., None]:
    """Make a hook on an owner that writes the entries back before they are saved."""

    def restore(module: nn.Module, *_: Any, _guard: FreezeGuard = guard) -> None:
        if module._parameters.get(frozen.name.rpartition(".")[2]) is frozen.parameter:
            frozen.restore()

    return restore
