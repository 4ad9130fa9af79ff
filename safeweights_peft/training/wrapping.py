"""What is around a model that trains, and whether its parameters are whole, and stay its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import ModelError, UnsupportedFeatureError

WHOLE = "train it whole, on one device or with DDP"


class Watch:
    """Refuse a forward pass once a model's protected parameters are no longer the model's."""

    # Sharding replaces parameters, and the protection would stay with those that nobody trains.

    def __init__(self, model: nn.Module, names: Mapping[nn.Parameter, str]) -> None:
        self._model = model
        self._places = [
            (names[parameter], module, own, parameter)
            for module in model.modules()
            for own, parameter in module._parameters.items()
            if parameter is not None and parameter in names
        ]
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Start to watch."""
        self._handles.append(self._model.register_forward_pre_hook(self._check))

    def detach(self) -> None:
        """Remove the hook."""
        while self._handles:
            self._handles.pop().remove()

    def _check(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for name, module, own, parameter in self._places:
            if module._parameters.get(own) is not parameter:
                raise UnsupportedFeatureError(
                    f"{name}: expected the parameter that is protected, found another in its "
                    "place, as sharding a model leaves it; use preserve on the model as it is "
                    f"trained, and {WHOLE}"
                )


def unwrap(model: nn.Module) -> nn.Module:
    """Look under what DDP and `torch.compile` put around a whole model."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def is_distributed(model: nn.Module) -> bool:
    """Return whether DDP is among what is around a model."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return False
        model = inner
    return True


def find_trained(model: nn.Module) -> dict[nn.Parameter, str]:
    """Find the parameters that train; refuse those that an anchor can't reach."""
    trained = {entry: name for name, entry in model.named_parameters() if entry.requires_grad}
    if not trained:
        raise ModelError(
            "model: expected parameters that require gradients, found none; add a LoRA, or call "
            "requires_grad_(), before it is held"
        )
    check_whole(model, next(iter(trained.values())))
    for parameter, name in trained.items():
        check_kind(parameter, name)
    return trained


def check_whole(model: nn.Module, first: str) -> None:
    """Refuse a model that FSDP has flattened."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedFeatureError(
            f"{first}: expected a whole parameter, found a model whose parameters FSDP has "
            f"flattened; {WHOLE}"
        )


def check_kind(parameter: nn.Parameter, name: str) -> None:
    """Refuse what holds only a part of its entries, or none, or not as plain floats."""
    if hasattr(parameter, "ds_id"):
        raise UnsupportedFeatureError(
            f"{name}: expected a whole parameter, found a partition of ZeRO-3; {WHOLE}"
        )
    if parameter.is_meta:
        raise UnsupportedFeatureError(
            f"{name}: expected a parameter with data, found one on the meta device; load the "
            "model's weights, and without offloading"
        )
    kind = type(parameter.data)
    if kind is not Tensor or str(parameter.dtype).removeprefix("torch.") not in DTYPES:
        raise UnsupportedFeatureError(
            f"{name}: expected a whole tensor of {', '.join(DTYPES)}, found {parameter.dtype} in "
            f"a {kind.__name__}; load the model unquantized, and {WHOLE}"
        )
