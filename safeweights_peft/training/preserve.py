"""Safety Preserving Adaptation (SPA): a model learns something else, its safety entries stay.

The entries of a safety map, or of a safety patch that has been merged, are frozen bit for bit
while everything else trains, in any loop (`preserve`) or in `transformers.Trainer` and the trainers
that build on it, such as TRL's (`SafetyPreservingCallback`). The hooks that do it live in
``freeze``; here a map or a patch meets a model.

Source: arXiv 2604.08297, section on SPA.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeweights_peft.delta import DTYPES, check_indices
from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.format import Adapter, Mode, SafetyMap, TensorRecord, read_artifact
from safeweights_peft.training.freeze import FreezeGuard, FrozenEntries
from safeweights_peft.tuner.entries import check_base, check_merged, to_torch

logger = logging.getLogger(__name__)

Artifact = SafetyMap | Adapter | str | os.PathLike[str]
"""A safety map or a safety patch, or its directory."""

_WHOLE = "train it whole, on one device or with DDP"


@contextmanager
def preserve(model: nn.Module, artifact: Artifact) -> Iterator[None]:
    """Keeps the entries of a safety map or patch bit for bit as they are while the model trains.

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

    Enter it with the parameters that the optimizer trains: an optimizer that works on copies of
    its own, as DeepSpeed's do, moves entries unseen until the end. The entries are put back then.

    Args:
        model: the map's base, or the patch's base with the patch merged in, or what an earlier run
            under the same artifact made of it; perhaps wrapped in DDP or compiled.
        artifact: the safety map or patch, or its directory.

    Yields:
        Nothing.

    Raises:
        BaseMismatchError: the model's entries are not those that the map was made for, or not the
            patch's merged ones.
        ModelError: a parameter is missing or has another shape.
        UnsupportedFeatureError: the model has adapters, or a parameter is sharded, quantized, or
            without data.
    """
    guard = _guard(model, artifact)
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
    until `detach` is called.
    """

    def __init__(self, artifact: Artifact) -> None:
        """Takes a map or a patch, which is checked when training begins.

        Args:
            artifact: the safety map or patch, or its directory.
        """
        self._artifact = artifact
        self._guard: FreezeGuard | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to protect the model that is about to train, and that one only.

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
        self._guard = _guard(kwargs["model"], self._artifact)
        self._guard.attach()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the protection.

        Args:
            args: not used.
            state: not used.
            control: not used.
            **kwargs: not used.
        """
        self.detach()

    def detach(self) -> None:
        """Restores the entries a last time and removes all hooks; does nothing if there are none.

        Needed only after a training that was broken off, to go on with the model unprotected.
        """
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.detach()


def _guard(model: nn.Module, artifact: Artifact) -> FreezeGuard:
    """Makes a guard that is not attached yet, with all checks done."""
    if not isinstance(artifact, SafetyMap | Adapter):
        artifact = read_artifact(artifact)
    metadata, model = artifact.metadata, _unwrap(model)
    kind = metadata.mode.artifact
    _check_model(model, next(iter(artifact.indices), kind))
    # A tied parameter is found by each of its names.
    everything = model.named_parameters(remove_duplicate=False)
    parameters = {name.replace("_orig_mod.", ""): each for name, each in everything}
    entries = []
    for name, indices in artifact.indices.items():
        record = metadata.tensors[name]
        check_indices(name, indices, record.shape)
        frozen = FrozenEntries(name, _find(parameters, name, record, kind), to_torch(indices))
        if metadata.mode is Mode.SPA:
            check_base(name, frozen.originals, record, kind)
        else:
            check_merged(name, frozen.originals, record, metadata.scale)
        entries.append(frozen)
    _warn_of_untrained(entries, kind)
    return FreezeGuard(entries)


def _unwrap(model: nn.Module) -> nn.Module:
    """Looks under what DDP and `torch.compile` put around a whole model."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _check_model(model: nn.Module, first: str) -> None:
    modules = list(model.modules())
    if isinstance(model, PeftModel) or any(isinstance(each, BaseTunerLayer) for each in modules):
        configs = getattr(model, "peft_config", {}).values()
        kinds = ", ".join(sorted({str(each.peft_type.value) for each in configs})) or "PEFT"
        raise UnsupportedFeatureError(
            f"model: expected one without adapters, found {kinds}: under an adapter the base is "
            "frozen already, and only its effective weights move, which is not prevented yet; "
            "train the base itself, or merge the adapter first"
        )
    if any(isinstance(each, FullyShardedDataParallel) for each in modules):
        raise UnsupportedFeatureError(
            f"{first}: expected a whole parameter, found a model whose parameters FSDP has "
            f"flattened; {_WHOLE}"
        )


def _find(
    parameters: dict[str, nn.Parameter], name: str, record: TensorRecord, kind: str
) -> nn.Parameter:
    parameter = parameters.get(name)
    if parameter is None:
        raise ModelError(
            f"{name}: expected a parameter of the model, found none; train the base that the "
            f"{kind} was made for"
        )
    _check_kind(parameter, name)
    if tuple(parameter.shape) != record.shape:
        raise ModelError(
            f"{name}: expected shape {list(record.shape)}, found {list(parameter.shape)}; train "
            f"the base that the {kind} was made for"
        )
    return parameter


def _check_kind(parameter: nn.Parameter, name: str) -> None:
    """Refuses what holds only a part of its entries, or none, or not as plain floats."""
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


def _warn_of_untrained(entries: Sequence[FrozenEntries], kind: str) -> None:
    untrained = [each.name for each in entries if not each.parameter.requires_grad]
    if untrained:
        logger.warning(
            "%s: expected a parameter that requires gradients, found none; %d of the %s's %d "
            "parameters are not trained anyway",
            untrained[0],
            len(untrained),
            kind,
            len(entries),
        )
