"""A safety map as an adapter of PEFT: it adds nothing, and freezes entries while the base trains.

Loaded with ``is_trainable=True`` it is the same as ``training.preserve`` around all that follows.
How entries are frozen stands in ``freeze``.
"""

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from safeweights_peft.delta import Array
from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.format import AdapterMetadata, check_tensors, indices_key
from safeweights_peft.freeze import FreezeGuard, FrozenEntries
from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.entries import check_base, to_torch
from safeweights_peft.tuner.fit import find_parameter

logger = logging.getLogger(__name__)

_SOURCE = "adapter_config.json"


def hold_back(model: nn.Module, config: SafeWeightsConfig) -> RemovableHandle:
    """Check that a safety map may be loaded into a model, and let the model not run until it is.

    Routes that never hand over the map's tensors would leave the model unprotected in silence.

    Args:
        model: The base model.
        config: The map's config.

    Returns:
        What lets the model run when it is removed.

    Raises:
        BaseMismatchError: A parameter is missing or has another shape.
        UnsupportedFeatureError: It is loaded for inference, or a parameter cannot be frozen.
    """
    if config.inference_mode:
        raise UnsupportedFeatureError(
            f"{_SOURCE}: mode: expected 'set', found 'spa': a safety map has no values to load; to "
            "protect a training give is_trainable=True, to read it use read_map"
        )
    for name, record in config.to_metadata(_SOURCE).tensors.items():
        find_parameter(model, name, record)
    return model.register_forward_pre_hook(_refuse_to_run)


def _refuse_to_run(*_: Any) -> None:
    raise ModelError(
        "model: expected a loaded safety map, found its config alone; load the base anew, then use "
        "PeftModel.from_pretrained(base, map, is_trainable=True)"
    )


def protect(
    model: nn.Module, metadata: AdapterMetadata, tensors: Mapping[str, Array]
) -> Callable[[], Any]:
    """Freeze a safety map's entries from now on, for as long as the model is there.

    Args:
        model: The map's base.
        metadata: The map's description.
        tensors: What the map's file holds, by key.

    Returns:
        What ends the protection before.

    Raises:
        BaseMismatchError: The model's entries are not those that the map was made for.
    """
    check_tensors(metadata, tensors, _SOURCE)
    entries = []
    for name, record in metadata.tensors.items():
        indices = to_torch(tensors[indices_key(name)])
        frozen = FrozenEntries(name, find_parameter(model, name, record), indices)
        check_base(name, frozen.originals, record, metadata.mode.artifact)
        entries.append(frozen)
    guard = FreezeGuard(entries)
    guard.attach()
    logger.warning(
        "model: %s entries stay as they are while the base trains; save what is trained with "
        "model.get_base_model().save_pretrained, and give a Trainer model.get_base_model()",
        f"{sum(each.indices.numel() for each in entries):,}",
    )
    end = weakref.finalize(model, guard.detach)
    end.atexit = False
    return end
