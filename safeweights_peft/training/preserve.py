"""Safety Preserving Adaptation (SPA): a model learns something else, its safety entries stay.

The entries of a safety map, or of a safety patch that has been merged, are frozen bit for bit
while everything else trains, in any loop (`preserve`) or in `transformers.Trainer` and the trainers
that build on it, such as TRL's (`SafetyPreservingCallback`); under LoRA, those of the effective
weights. The hooks that do it live in ``safeweights_peft.freeze`` and in ``lora``, what adapters a
model may have is told in ``adapters``; here a map or a patch meets a model.

Source: arXiv 2604.08297, section on SPA.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeweights_peft.delta import DTYPES, check_indices
from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.freeze import FreezeGuard, FrozenEntries
from safeweights_peft.modeling.layout import check_shape
from safeweights_peft.modeling.tensors import check_entries, to_torch
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import State, TensorRecord
from safeweights_peft.training.adapters import (
    check_adapters,
    has_adapters,
    is_copy,
    lora_layers,
    parameters_by_name,
    plain_name,
)
from safeweights_peft.training.lora import LoraCorrection, frozen_part

logger = logging.getLogger(__name__)

ArtifactOrPath = Artifact | str | os.PathLike[str]
"""A safety map or a safety patch, or its directory."""

_WHOLE = "train it whole, on one device or with DDP"


@contextmanager
def preserve(model: nn.Module, artifact: ArtifactOrPath) -> Iterator[None]:
    """Keep the entries of a safety map or patch bit for bit as they are while the model trains.

    ::

        with preserve(model, "path/to/map"):
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Frozen entries get a zero gradient, before it is clipped or reduced over processes, and are
    written back after every step of every `torch.optim.Optimizer` that holds their parameters;
    the same once more at the end, also after an exception. Everything is checked before anything
    is changed. Several maps may be nested. Beyond the model it takes 12 bytes per entry at most.

    Under LoRA on linear layers, with any number of adapters, the effective weight W + s·BA stays W
    at the frozen entries whenever the model runs: what each adapter would add there is taken out of
    its output. What is trained beside LoRA, `modules_to_save` included, is protected as in full
    training. One map at a time can protect a LoRA layer. Add adapters before, and merge none
    meanwhile: the hooks set at the beginning don't see it. The adapter is saved as plain LoRA,
    which moves the entries wherever it runs without `preserve`; `training.lora_correction` tells by
    how much.

    Enter it with the parameters that the optimizer trains: an optimizer that works on copies of
    its own, as DeepSpeed's do, moves entries unseen until the end. The entries are put back then.

    Args:
        model: the map's base, or the patch's base with the patch merged in, or what an earlier run
            under the same artifact made of it; perhaps with LoRA, wrapped in DDP, or compiled.
        artifact: the safety map or patch, or its directory.

    Yields:
        Nothing.

    Raises:
        BaseMismatchError: the model's entries are not those that the map was made for, or not the
            patch's merged ones; or a parameter is missing or has another shape.
        UnsupportedFeatureError: the model has adapters other than plain LoRA on linear layers, or
            merged ones, or a parameter is sharded, quantized, or without data.
    """
    guard = _Guard(model, artifact)
    try:
        guard.attach()
        yield
    finally:
        guard.detach()


class SafetyPreservingCallback(TrainerCallback):
    """Keeps entries as they are in `transformers.Trainer`, as `preserve` does in any loop.

    ::

        Trainer(model=model, ..., callbacks=[SafetyPreservingCallback("path/to/map")])

    It works from the start of a training to its end, resumed ones included: their checkpoints
    hold the entries as they were. Where training is broken off by an exception, the trainer tells
    no callback: the entries stay protected until the same callback sees another training begin, or
    until `detach` is called. Under LoRA the model runs as plain LoRA again when training has ended;
    to evaluate what was trained, use `preserve`.
    """

    def __init__(self, artifact: ArtifactOrPath) -> None:
        """Take a map or a patch, which is checked when training begins.

        Args:
            artifact: the safety map or patch, or its directory.
        """
        self._artifact = artifact
        self._guard: _Guard | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to protect the model that is about to train, and that one only.

        Args:
            args: the trainer's arguments.
            state: not used.
            control: not used.
            **kwargs: the trainer's objects; `model` is used.

        Raises:
            UnsupportedFeatureError: the trainer uses DeepSpeed, or see `preserve`, whose other
                errors come from here too.
        """
        self.detach()
        if args.deepspeed_plugin is not None:
            raise UnsupportedFeatureError(
                "args.deepspeed: expected none, found DeepSpeed, whose optimizer moves copies of "
                f"the parameters; {_WHOLE}"
            )
        self._guard = _Guard(kwargs["model"], self._artifact)
        self._guard.attach()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the protection.

        Args:
            args: not used.
            state: not used.
            control: not used.
            **kwargs: not used.
        """
        self.detach()

    def detach(self) -> None:
        """Restore the entries a last time and removes all hooks; does nothing if there are none.

        Needed only after a training that was broken off, to go on with the model unprotected.
        """
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.detach()


def lora_correction(
    model: nn.Module, artifact: ArtifactOrPath, adapter: str = "default"
) -> dict[str, Tensor]:
    """Tell what takes a LoRA adapter's part at the entries of a safety map or patch out again.

    Added to the merged weights, or to the base beside the adapter, it makes of the effective weight
    W + s·BA what `preserve` made of it in training.
    """
    artifact, model = _read(artifact), _unwrap(model)
    if adapter not in getattr(model, "peft_config", {}):
        raise ModelError(f"model: expected an adapter {adapter!r}, found none; name one it has")
    correction = {}
    for each in _frozen_entries(model, artifact):
        for found in lora_layers(model, [each]):
            if adapter in found.layer.lora_A:
                correction[each.name] = -frozen_part(found, adapter).cpu()
    return correction


class _Guard:
    """All hooks that protect one model, from ``attach`` to ``detach``."""

    def __init__(self, model: nn.Module, artifact: ArtifactOrPath) -> None:
        """Do all checks, and changes nothing yet."""
        artifact, model = _read(artifact), _unwrap(model)
        entries, adapted = _frozen_entries(model, artifact), has_adapters(model)
        layers = lora_layers(model, entries) if adapted else []
        corrected = {each.layer.get_base_layer().weight for each in layers}
        _warn_of_untrained(entries, corrected, artifact.metadata.mode.artifact)
        if adapted:  # no optimizer holds the rest of the base
            entries = [e for e in entries if e.parameter.requires_grad or is_copy(e.name)]
        self._corrections = [LoraCorrection(each) for each in layers]
        self._freeze = FreezeGuard(entries)

    def attach(self) -> None:
        self._forget_compiled()
        for each in self._corrections:
            each.attach()
        self._freeze.attach()

    def detach(self) -> None:
        self._forget_compiled()
        for each in self._corrections:
            each.detach()
        self._freeze.detach()

    def _forget_compiled(self) -> None:
        """Compiled code doesn't notice hooks on modules that come or go."""
        if self._corrections:
            torch.compiler.reset()


def _read(artifact: ArtifactOrPath) -> Artifact:
    return artifact if isinstance(artifact, Artifact) else read_artifact(artifact)


def _frozen_entries(model: nn.Module, artifact: Artifact) -> list[FrozenEntries]:
    """Find the entries of whatever stands for an artifact's parameters in a model, all checked."""
    metadata = artifact.metadata
    kind, state, hint = metadata.mode.artifact, metadata.mode.safe_state, "load that one"
    if state is State.MERGED:
        hint += f", merged at scale {metadata.scale}"
    _check_model(model, next(iter(artifact.indices), kind))
    parameters = parameters_by_name(model)
    entries = []
    for name, indices in artifact.indices.items():
        record = metadata.tensors[name]
        check_indices(name, indices, record.shape)
        for label, parameter in _find(parameters, name, record, kind).items():
            frozen = FrozenEntries(label, parameter, to_torch(indices))
            check_entries(label, frozen.originals, record, state, kind, hint)
            entries.append(frozen)
    return entries


def _unwrap(model: nn.Module) -> nn.Module:
    """Look under what DDP and `torch.compile` put around a whole model."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _check_model(model: nn.Module, first: str) -> None:
    if has_adapters(model):
        check_adapters(model)
    if any(isinstance(each, FullyShardedDataParallel) for each in model.modules()):
        raise UnsupportedFeatureError(
            f"{first}: expected a whole parameter, found a model whose parameters FSDP has "
            f"flattened; {_WHOLE}"
        )


def _find(
    parameters: dict[str, dict[str, nn.Parameter]], name: str, record: TensorRecord, kind: str
) -> dict[str, nn.Parameter]:
    owners = parameters.get(name, {})
    for label, parameter in owners.items() or [(name, None)]:
        if parameter is not None:
            _check_kind(parameter, label)
        check_shape(label, parameter, record, f"train the base that the {kind} was made for")
    return owners


def _check_kind(parameter: nn.Parameter, name: str) -> None:
    """Refuse what holds only a part of its entries, or none, or not as plain floats."""
    if hasattr(parameter, "ds_id"):
        raise UnsupportedFeatureError(
            f"{name}: expected a whole parameter, found a partition of ZeRO-3; {_WHOLE}"
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
            f"a {kind.__name__}; load the model unquantized, and {_WHOLE}"
        )


def _warn_of_untrained(
    entries: Sequence[FrozenEntries], corrected: set[nn.Parameter], kind: str
) -> None:
    trained = {
        plain_name(each.name)
        for each in entries
        if each.parameter.requires_grad or each.parameter in corrected or is_copy(each.name)
    }
    names = list(dict.fromkeys(plain_name(each.name) for each in entries))
    untrained = [name for name in names if name not in trained]
    if untrained:
        logger.warning(
            "%s: expected a parameter that requires gradients, found none; %s of the %s's %d "
            "parameters are not trained anyway",
            untrained[0],
            len(untrained) if trained else "all",
            kind,
            len(names),
        )
