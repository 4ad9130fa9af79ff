"""Safety Preserving Adaptation (SPA): a model trains while its safety entries stay, bit for bit.

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
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeweights_peft.delta import DTYPES, check_indices
from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.freeze import FreezeGuard, FrozenEntries
from safeweights_peft.modeling.layout import check_shape
from safeweights_peft.modeling.tensors import check_entries, to_torch
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import State
from safeweights_peft.training.lora import (
    Correction,
    check_adapters,
    find_frozen_layers,
    find_parameters,
    has_adapters,
    is_copy,
    plain_name,
)

logger = logging.getLogger(__name__)

ArtifactOrPath = Artifact | str | os.PathLike[str]

_WHOLE = "train it whole, on one device or with DDP"


@contextmanager
def preserve(model: nn.Module, artifact: ArtifactOrPath) -> Iterator[None]:
    """Keep the entries of a safety map or patch as they are, bit for bit, while a model trains.

    Frozen entries get a zero gradient, before it is clipped or reduced over processes, and are
    restored after every step of every `torch.optim.Optimizer` that holds their parameters, and at
    the end, also after an exception. Everything is checked before anything is changed. Maps may be
    nested. Each entry takes at most 12 bytes of memory.

    Under LoRA on linear layers and on parameters (fused experts), with any number of adapters, the
    effective weight W + s·BA stays W at the frozen entries whenever the model runs. What is trained
    beside LoRA, `modules_to_save` included, is protected as in full training. A LoRA layer can be
    protected by one map at a time. Add adapters before, and merge none inside: hooks are set on
    entry. The adapter is saved as plain LoRA, which moves the entries wherever it runs without
    `preserve`; `training.preserve.compute_correction` says by how much.

    Pass the parameters that the optimizer trains: an optimizer that works on copies, as DeepSpeed's
    do, moves entries unseen until they are restored at the end.

    Args:
        model: The map's base, or the patch's base with the patch merged in, or what an earlier run
            under the same artifact made of it; with or without LoRA, DDP, `torch.compile`.
        artifact: The safety map or patch, or its directory.

    Yields:
        Nothing.

    Raises:
        BaseMismatchError: The model's entries are not those that the map was made for, or not the
            patch's merged ones; or a parameter is missing or has another shape.
        UnsupportedFeatureError: The model has adapters other than plain LoRA on linear layers or
            parameters, or merged ones, or a parameter is sharded, quantized, or without data.

    Example:
        >>> import torch, safeweights_peft
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("demo/base")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with safeweights_peft.preserve(model, "demo/run/map"):
        ...     model(input_ids=ids, labels=ids).loss.backward()
        ...     optimizer.step()
    """
    guard = _Guard(model, artifact)
    try:
        guard.attach()
        yield
    finally:
        guard.detach()


class SafetyPreservingCallback(TrainerCallback):
    """Keep entries as they are in `transformers.Trainer`, as `preserve` does in any loop.

    It works from the start of a training to its end, resumed ones included: their checkpoints
    hold the entries as they were. When an exception ends a training, the trainer calls no callback:
    the entries stay protected until the same callback sees another training begin, or until
    `detach` is called. Under LoRA the model runs as plain LoRA again after training, which moves
    the entries, merged or saved alike: to evaluate what was trained, use `preserve`; to keep it,
    call ``safeweights protect --lora`` on what was saved.

    Example:
        >>> from safeweights_peft import SafetyPreservingCallback
        >>> from transformers import AutoModelForCausalLM, Trainer
        >>> model = AutoModelForCausalLM.from_pretrained("demo/base")
        >>> trainer = Trainer(model, callbacks=[SafetyPreservingCallback("demo/run/map")])
    """

    def __init__(self, artifact: ArtifactOrPath) -> None:
        """Take a map or a patch, which is checked when training begins.

        Args:
            artifact: The safety map or patch, or its directory.
        """
        self._artifact = artifact
        self._guard: _Guard | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Protect the model that is about to train, and no other.

        Args:
            args: The trainer's arguments.
            state: Not used.
            control: Not used.
            **kwargs: The trainer's objects; `model` is used.

        Raises:
            UnsupportedFeatureError: The trainer uses DeepSpeed; see `preserve` for other errors.
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
            args: Not used.
            state: Not used.
            control: Not used.
            **kwargs: Not used.
        """
        if self._guard and self._guard.corrects_lora:
            logger.warning(
                "SafetyPreservingCallback: the training is over, and the model runs as plain LoRA "
                "again, which moves frozen entries, merged or saved alike; take its part out with "
                "safeweights_peft.training.preserve.compute_correction, or call `safeweights "
                "protect --lora` on what you save"
            )
        self.detach()

    def detach(self) -> None:
        """Restore the entries a last time and remove all hooks, if there are any.

        Only needed after a training that an exception ended, to continue unprotected.
        """
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.detach()


def compute_correction(
    model: nn.Module, artifact: ArtifactOrPath, adapter: str = "default"
) -> dict[str, Tensor]:
    """Compute what takes a LoRA adapter's part out of the entries of a map or patch, float32."""
    # Added to the merged weights, or to the base beside the adapter, it makes W + s·BA the
    # effective weight that `preserve` made of it in training.
    artifact, model = _read(artifact), _unwrap(model)
    if adapter not in getattr(model, "peft_config", {}):
        raise ModelError(f"model: expected an adapter {adapter!r}, found none; name one it has")
    correction = {}
    for frozen in _find_entries(model, artifact):
        for layer in find_frozen_layers(model, [frozen]):
            if adapter in layer.layer.lora_A:
                correction[frozen.name] = -layer.part_of(adapter).cpu()
    return correction


class _Guard:
    """All hooks that protect one model, from ``attach`` to ``detach``."""

    def __init__(self, model: nn.Module, artifact: ArtifactOrPath) -> None:
        # All checks are done here, before anything is changed.
        artifact, model = _read(artifact), _unwrap(model)
        entries, is_adapted = _find_entries(model, artifact), has_adapters(model)
        layers = find_frozen_layers(model, entries) if is_adapted else []
        corrected = {layer.parameter for layer in layers}
        _warn_of_untrained(entries, corrected, artifact.metadata.mode.artifact)
        if is_adapted:  # no optimizer holds the rest of the base
            entries = [
                frozen
                for frozen in entries
                if frozen.parameter.requires_grad or is_copy(frozen.name)
            ]
        self._corrections = [layer.make_correction() for layer in layers]
        self._hooks: list[Correction | FreezeGuard | _Watch] = [
            *self._corrections,
            FreezeGuard(entries),
            _Watch(model, entries),
        ]

    @property
    def corrects_lora(self) -> bool:
        """Whether a LoRA is kept from moving entries only as long as the guard is attached."""
        return bool(self._corrections)

    def attach(self) -> None:
        self._forget_compiled()
        for hooks in self._hooks:
            hooks.attach()

    def detach(self) -> None:
        self._forget_compiled()
        for hooks in self._hooks:
            hooks.detach()

    def _forget_compiled(self) -> None:
        # Compiled code doesn't notice hooks on modules that come or go.
        if self._corrections:
            torch.compiler.reset()


class _Watch:
    """Refuse a forward pass once a model's protected parameters are no longer the model's."""

    # Sharding replaces parameters, and the protection would stay with those that nobody trains.

    def __init__(self, model: nn.Module, entries: Sequence[FrozenEntries]) -> None:
        names = {frozen.parameter: frozen.name for frozen in entries}
        self._model = model
        self._places = [
            (names[parameter], module, own, parameter)
            for module in model.modules()
            for own, parameter in module._parameters.items()
            if parameter in names
        ]
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        self._handles.append(self._model.register_forward_pre_hook(self._check))

    def detach(self) -> None:
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
                    f"trained, and {_WHOLE}"
                )


def _read(artifact: ArtifactOrPath) -> Artifact:
    return artifact if isinstance(artifact, Artifact) else read_artifact(artifact)


def _find_entries(model: nn.Module, artifact: Artifact) -> list[FrozenEntries]:
    """Find and check the entries of whatever stands for an artifact's parameters in a model."""
    metadata = artifact.metadata
    kind, state, hint = metadata.mode.artifact, metadata.mode.safe_state, "load that one"
    if state is State.MERGED:
        hint += f", merged at scale {metadata.scale}"
    _check_model(model, next(iter(artifact.indices), kind))
    parameters = find_parameters(model)
    entries = []
    for name, indices in artifact.indices.items():
        record = metadata.tensors[name]
        check_indices(name, indices, record.shape)
        fit = f"train the base that the {kind} was made for"
        if name not in parameters:
            check_shape(name, None, record, fit)
        for label, parameter in parameters[name].items():
            _check_kind(parameter, label)
            check_shape(label, parameter, record, fit)
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
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedFeatureError(
            f"{first}: expected a whole parameter, found a model whose parameters FSDP has "
            f"flattened; {_WHOLE}"
        )


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
        plain_name(frozen.name)
        for frozen in entries
        if frozen.parameter.requires_grad or frozen.parameter in corrected or is_copy(frozen.name)
    }
    names = list(dict.fromkeys(plain_name(frozen.name) for frozen in entries))
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
