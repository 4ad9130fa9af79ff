"""A model trains and stays safe: its answers are held, its safety entries keep their bits (SPA).

Source of the second: arXiv 2604.08297, section on SPA.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeweights_peft.delta import check_indices
from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.freeze import FreezeGuard, FrozenEntries
from safeweights_peft.modeling.layout import check_shape
from safeweights_peft.modeling.tensors import check_entries, to_torch
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import State
from safeweights_peft.training.anchor import Anchor, AnchorGuard, AnchorLog
from safeweights_peft.training.lora import (
    Correction,
    check_adapters,
    find_frozen_layers,
    find_parameters,
    has_adapters,
    is_copy,
    plain_name,
)
from safeweights_peft.training.wrapping import (
    WHOLE,
    Watch,
    check_kind,
    check_whole,
    find_trained,
    is_distributed,
    unwrap,
)

logger = logging.getLogger(__name__)

ArtifactOrPath = Artifact | str | os.PathLike[str]


@contextmanager
def preserve(
    model: nn.Module, artifact: ArtifactOrPath | None = None, anchor: Anchor | None = None
) -> Iterator[None]:
    """Keep a model safe while it trains: hold its answers, and the entries of a map or patch.

    An anchor holds the model's answers: see `Anchor`. That is what keeps safety. It needs no map,
    and costs at most a quarter of a step.

    Entries of a safety map or patch stay as they are, bit for bit. Frozen entries get a zero
    gradient, before it is clipped or reduced over processes, and are
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
        artifact: The safety map or patch, or its directory; None freezes nothing.
        anchor: What the model answered before it was trained; None holds nothing.

    Yields:
        Nothing.

    Raises:
        ModelError: There is neither an artifact nor an anchor.
        TrainingError: More of the anchor's rows have drifted than it allows.
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
    guard = _Guard(model, artifact, anchor)
    try:
        guard.attach()
        yield
        guard.finish()
    finally:
        guard.detach()


class SafetyPreservingCallback(TrainerCallback):
    """Keep a model safe in `transformers.Trainer`, as `preserve` does in any loop.

    An anchor holds its answers; what it measures of their drift is in the trainer's log. Entries
    stay as they are, from the start of a training to its end, resumed ones included: their
    checkpoints hold the entries as they were. When an exception ends a training, the trainer calls
    no callback: the entries stay protected until the same callback sees another training begin, or
    until `detach` is called. Under LoRA the model runs as plain LoRA again after training, which
    moves the entries, merged or saved alike: to evaluate what was trained, use `preserve`; to keep
    it, call ``safeweights protect --lora`` on what was saved.

    Example:
        >>> from safeweights_peft import SafetyPreservingCallback
        >>> from transformers import AutoModelForCausalLM, Trainer
        >>> model = AutoModelForCausalLM.from_pretrained("demo/base")
        >>> trainer = Trainer(model, callbacks=[SafetyPreservingCallback("demo/run/map")])
    """

    def __init__(
        self, artifact: ArtifactOrPath | None = None, anchor: Anchor | None = None
    ) -> None:
        """Take a map or a patch, which is checked when training begins, or an anchor, or both.

        Args:
            artifact: The safety map or patch, or its directory; None freezes nothing.
            anchor: What the model answered before it was trained; None holds nothing.
        """
        self._artifact, self._anchor = artifact, anchor
        self._log = AnchorLog(anchor) if anchor else TrainerCallback()
        self._guard: _Guard | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Protect the model that is about to train, and no other.

        Args:
            args: The trainer's arguments.
            state: Where a resumed training is.
            control: Not used.
            **kwargs: The trainer's objects; `model` is used.

        Raises:
            UnsupportedFeatureError: The trainer uses DeepSpeed; see `preserve` for other errors.
        """
        self.detach()
        if args.deepspeed_plugin is not None:
            raise UnsupportedFeatureError(
                "args.deepspeed: expected none, found DeepSpeed, whose optimizer moves copies of "
                f"the parameters; {WHOLE}"
            )
        self._log.on_train_begin(args, state, control)
        self._guard = _Guard(
            kwargs["model"], self._artifact, self._anchor, has_twins=args.world_size > 1
        )
        self._guard.attach()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the anchor how many steps are done.

        Args:
            args: Not used.
            state: How many steps are done.
            control: Not used.
            **kwargs: Not used.
        """
        self._log.on_step_begin(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the anchor's drift, if it was measured, in the trainer's log.

        Args:
            args: Not used.
            state: Holds the log.
            control: Not used.
            **kwargs: Not used.
        """
        self._log.on_step_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the protection.

        Args:
            args: Not used.
            state: Holds the log.
            control: Not used.
            **kwargs: Not used.
        """
        if self._guard:
            self._guard.finish()
        self._log.on_step_end(args, state, control)
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
    artifact, model = _read(artifact), unwrap(model)
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

    def __init__(
        self,
        model: nn.Module,
        artifact: ArtifactOrPath | None,
        anchor: Anchor | None,
        has_twins: bool = False,
    ) -> None:
        # All checks are done here, before anything is changed.
        if artifact is None and anchor is None:
            raise ModelError(
                "preserve: expected a map, a patch or an anchor, found none of them; give one"
            )
        has_twins = has_twins or is_distributed(model)
        model, names = unwrap(model), dict[nn.Parameter, str]()
        self._corrections: list[Correction] = []
        self._hooks: list[Correction | FreezeGuard | AnchorGuard | Watch] = []
        if artifact is not None:
            entries = self._freeze(model, _read(artifact))
            names |= {frozen.parameter: frozen.name for frozen in entries}
        self._anchor: AnchorGuard | None = None
        if anchor is not None:
            names |= find_trained(model)
            self._anchor = AnchorGuard(anchor, model, has_twins)
            self._hooks.append(self._anchor)
        self._hooks.append(Watch(model, names))

    def _freeze(self, model: nn.Module, artifact: Artifact) -> list[FrozenEntries]:
        """Make the hooks that keep an artifact's entries, and list those that may train."""
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
        # Before the anchor's, which measures what is left after a step.
        self._hooks += [*self._corrections, FreezeGuard(entries)]
        return entries

    @property
    def corrects_lora(self) -> bool:
        """Whether a LoRA is kept from moving entries only as long as the guard is attached."""
        return bool(self._corrections)

    def finish(self) -> None:
        if self._anchor:
            self._anchor.finish()

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
            check_kind(parameter, label)
            check_shape(label, parameter, record, fit)
            frozen = FrozenEntries(label, parameter, to_torch(indices))
            check_entries(label, frozen.originals, record, state, kind, hint)
            entries.append(frozen)
    return entries


def _check_model(model: nn.Module, first: str) -> None:
    if has_adapters(model):
        check_adapters(model)
    check_whole(model, first)


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
