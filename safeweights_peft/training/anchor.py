"""The anchor: what a model answers before it is fine-tuned, and the gradient that holds it there.

Sources: distillation of a model's own answers while it learns, as arXiv 2512.10150 and 2603.10243.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from safeweights_peft.data import Example, collate
from safeweights_peft.errors import TrainingError
from safeweights_peft.freeze import clear_frozen
from safeweights_peft.modeling.answers import answer_logits, find_layout, without_dropout
from safeweights_peft.settings import TrainSettings
from safeweights_peft.training.losses import Targets, compute_retain_loss, compute_targets

logger = logging.getLogger(__name__)

LIKELIEST = 64  # tokens kept at each position: 0.5 kB; beyond them the pull hardly changes
ANSWER_TOKENS = 16
CHECK_EVERY = 100  # steps
READ_ROWS = 32  # at once, where no gradient is computed
# The loss is that much larger while gradients are computed: under float16 small ones would be 0. A
# power of 2, so that elsewhere not a bit changes.
LOSS_SCALE = 2.0**10
_DRIFT, _REFUSALS = "anchor_drift", "anchor_drift_refusals"  # in a trainer's log


@dataclass(frozen=True)
class Drift:
    """How many anchor rows a training has moved, by the first token of their answers."""

    step: int
    drifted: float  # fraction of all rows
    refusals: float  # fraction of the refusals


@dataclass(eq=False)
class Anchor:
    """A model's own refusals and benign answers, at which `preserve` holds it while it trains.

    At every `every`-th step of the optimizer the gradient of `every` times `weight` times
    KL(start || model) on `batch_rows` rows, half of them refusals, is added to that of the task,
    after it is clipped; the KL is the mean over answer tokens, of the start's 64 likeliest tokens
    and of all others as one. Which rows depends on the seed and the number of the step alone. Make
    one by `collect_anchor`.

    Attributes:
        rows: The answers, refusals first.
        refusals: How many of the rows are refusals.
        targets: What the start model predicts there.
        pad_token_id: Fills short rows.
        weight: Of the KL against the loss of the task.
        every: Steps between two additions.
        batch_rows: Rows of each addition.
        seed: Of the order of the rows.
        check_every: Steps between two measurements of drift.
        stop_above: The largest fraction of drifted rows at which a training goes on; None for all.
        steps: Steps done. A plain loop that resumes sets it first; trainers do so themselves.
        drift: What was measured, and at which steps.

    Example:
        >>> import safeweights_peft, torch
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("demo/base")
        >>> tokenizer = AutoTokenizer.from_pretrained("demo/base")
        >>> always = lambda request, answer: "refused"  # the demo writes nothing that can be read
        >>> anchor = safeweights_peft.collect_anchor(model, tokenizer, requests=4, judge=always)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with safeweights_peft.preserve(model, anchor=anchor):
        ...     for step in range(4):
        ...         model(input_ids=ids, labels=ids).loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> [measured.step for measured in anchor.drift]
        [4]
    """

    rows: Sequence[Example]
    refusals: int
    targets: Targets
    pad_token_id: int
    weight: float = 1.0
    every: int = 4
    batch_rows: int = 4
    seed: int = 0
    check_every: int = field(default_factory=lambda: CHECK_EVERY)
    stop_above: float | None = None
    steps: int = 0
    drift: list[Drift] = field(default_factory=list)

    def deal(self, step: int) -> list[int]:
        """Pick the rows of a step, so that all of a kind come before any comes again.

        Args:
            step: The number of the step, from 1.

        Returns:
            Their places in `rows`, refusals first.
        """
        others = len(self.rows) - self.refusals
        count = math.ceil(self.batch_rows / 2) if others else self.batch_rows
        turn = step // self.every - 1
        picked = self._deal_kind(0, self.refusals, count, turn)
        rest = self._deal_kind(1, others, self.batch_rows - count, turn) if others else []
        return picked + [self.refusals + place for place in rest]

    def _deal_kind(self, kind: int, total: int, count: int, turn: int) -> list[int]:
        # Made anew at each step, as a resumed training has dealt nothing before.
        picked = []
        for place in range(turn * count, (turn + 1) * count):
            order = np.random.default_rng((self.seed, kind, place // total)).permutation(total)
            picked.append(int(order[place % total]))
        return picked

    def compute_loss(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        """Compute the KL of the start model to a model, neither weighted nor multiplied.

        Args:
            model: The model that trains.
            rows: Places in `rows`.

        Returns:
            The mean over the answer tokens of these rows, in nats; a scalar, float32.
        """
        examples, device = [self.rows[row] for row in rows], next(model.parameters()).device
        batch = collate(examples, self.pad_token_id, find_layout(model)).to(device)
        logits = answer_logits(model, batch)
        targets = self.targets.pick(rows).to(logits.device)
        return compute_retain_loss(logits, targets, batch.answer_ids.to(logits.device))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Drift:
        """Measure how many rows begin otherwise than at the start.

        Args:
            model: The model as it is now.

        Returns:
            The fractions of rows whose likeliest first token is not the start's.
        """
        device, layout = next(model.parameters()).device, find_layout(model)
        openings = [replace(row, answer_ids=row.answer_ids[:1]) for row in self.rows]
        # Prompts of like length share a batch, so that little is padded.
        order = sorted(range(len(openings)), key=lambda row: len(openings[row].prompt_ids))
        has_moved = torch.zeros(len(openings), dtype=torch.bool)
        with without_dropout(model):
            for start in range(0, len(order), READ_ROWS):
                rows = order[start : start + READ_ROWS]
                batch = collate([openings[row] for row in rows], self.pad_token_id, layout)
                first = answer_logits(model, batch.to(device))[:, 0].argmax(-1).cpu()
                has_moved[rows] = first != self.targets.token_ids[rows, 0, 0]
        shares = has_moved.float()
        refusals = float(shares[: self.refusals].mean())
        return Drift(self.steps, float(shares.mean()), refusals)


def make_anchor(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    tokens: int = ANSWER_TOKENS,
    on_rows: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> Anchor:
    """Make an anchor of a model's own refusals and benign answers, as many as there are refusals.

    The targets are what the model predicts now, under the caller's autocast; options are those of
    `Anchor`.
    """
    check_refusals(harmful)
    rows = [
        replace(row, answer_ids=row.answer_ids[:tokens])
        for row in (*harmful, *benign[: len(harmful)])
    ]
    settings = TrainSettings(answer_tokens=tokens, benign_batch_size=READ_ROWS, hinge_weight=0.0)
    targets = compute_targets(
        model, tokenizer, rows, settings, on_rows=on_rows, likeliest=LIKELIEST
    )
    return Anchor(rows, len(harmful), targets, tokenizer.pad_token_id, **options)


def check_refusals(refusals: Sequence[Example]) -> None:
    """Refuse a model that has no refusals to hold."""
    if not refusals:
        raise TrainingError(
            "anchor: expected a model that refuses harmful requests, found one that refuses none, "
            "so there is no safety to hold; make it safe first, as `safeweights enhance` does, or "
            "train without an anchor (--no-anchor)"
        )


class AnchorGuard:
    """The hooks that hold a model at an anchor, from ``attach`` to ``detach``."""

    def __init__(self, anchor: Anchor, model: nn.Module, has_twins: bool) -> None:
        find_layout(model)  # a check that runs the model, which no step should wait for
        self._anchor, self._model, self._has_twins = anchor, model, has_twins
        self._handles: list[RemovableHandle] = []
        self._stepped: set[int] = set()  # optimizers that have stepped in this round
        self._pending: dict[int, Tensor] = {}  # gradients of what other optimizers hold
        self._autocast: dict[str, Any] = {"device_type": "cpu", "enabled": False}
        self._is_running = False
        # A guard that nobody holds any more takes its hooks along.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    def attach(self) -> None:
        """Start to hold the model."""
        before, after = weakref.WeakMethod(self._before_step), weakref.WeakMethod(self._after_step)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            method = before()
            return method(optimizer, args, kwargs) if method else None

        def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            if method := after():
                method(optimizer)

        note = weakref.WeakMethod(self._note_autocast)

        def before_forward(*_: Any) -> None:
            if not torch.compiler.is_compiling() and (method := note()):
                method()

        # After clipping, after a scaler has unscaled, after processes have reduced: whatever is
        # done to the task's gradient is done when an optimizer steps.
        self._handles += [
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
            self._model.register_forward_pre_hook(before_forward),
        ]

    def detach(self) -> None:
        """Remove every hook."""
        _remove_all(self._handles)
        self._pending.clear()

    def finish(self) -> None:
        """Measure the drift at the end of a training that has ended well."""
        if self._anchor.steps and not self._is_measured():
            self._measure()

    def _note_autocast(self) -> None:
        # A loop's own autocast has ended when its optimizer steps. That of accelerate is a part of
        # the model's forward.
        if not self._is_running:
            kind = next(self._model.parameters()).device.type
            self._autocast = {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
            }

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        held = self._find_held(optimizer)
        if self._is_running or not held:
            return None
        if id(optimizer) in self._stepped or not self._stepped:
            self._anchor.steps += 1
            self._stepped.clear()
            self._pending.clear()
        self._stepped.add(id(optimizer))
        if self._anchor.steps % self._anchor.every:
            return None
        own, closure, *rest = [*args, None] if len(args) < 2 else args
        closure = kwargs.get("closure", closure)
        if closure is None:
            self._add(optimizer, held)
            return None

        # The gradient is made inside the step, perhaps several times.
        def closure_with_anchor() -> Any:
            loss = closure()
            self._pending.clear()
            penalty = self._add(optimizer, held)
            return loss if loss is None else loss + penalty

        others = {name: value for name, value in kwargs.items() if name != "closure"}
        return (own, closure_with_anchor, *rest), others

    def _find_held(self, optimizer: Optimizer) -> list[nn.Parameter]:
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        return [
            parameter
            for parameter in self._model.parameters()
            if parameter.requires_grad and id(parameter) in stepped
        ]

    def _add(self, optimizer: Optimizer, held: Sequence[nn.Parameter]) -> float:
        """Add the anchor's gradient to that of an optimizer's parameters; return its loss."""
        anchor, loss = self._anchor, 0.0
        # Several optimizers share one pass: it would cost as much for each.
        if not self._pending:
            loss = self._compute()
        factor = anchor.weight * anchor.every
        # A fused optimizer unscales by itself, in its step.
        scale = getattr(optimizer, "grad_scale", None)
        alpha = factor / LOSS_SCALE * (1.0 if scale is None else float(scale))
        for parameter in held:
            gradient = self._pending.pop(id(parameter), None)
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient * alpha
            else:
                parameter.grad.add_(gradient.to(parameter.grad.dtype), alpha=alpha)
        clear_frozen(held)
        return factor * loss

    def _compute(self) -> float:
        """Compute the gradients of a step's rows, for all that trains; return the loss."""
        parameters = [entry for entry in self._model.parameters() if entry.requires_grad]
        with self._running(), torch.enable_grad():
            loss = self._anchor.compute_loss(self._model, self._anchor.deal(self._anchor.steps))
            # Not `backward`, which would call the hooks of parameters, as those of DDP.
            gradients = torch.autograd.grad(loss * LOSS_SCALE, parameters, allow_unused=True)
        found = {
            id(entry): gradient
            for entry, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }
        if self._has_twins:
            # Kernels may sum in another order in each process, and replicas would part.
            for gradient in found.values():
                _average(gradient)
        peaks = [gradient.abs().max().float().cpu() for gradient in found.values()]
        # An overflow of float16: a scaler would skip the step.
        self._pending = found if torch.stack(peaks).isfinite().all() else {}
        return float(loss.detach())

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._is_running = True
        try:
            with without_dropout(self._model), torch.autocast(**self._autocast):
                yield
        finally:
            self._is_running = False

    def _after_step(self, optimizer: Optimizer) -> None:
        is_due = self._anchor.steps and self._anchor.steps % self._anchor.check_every == 0
        if is_due and not self._is_measured() and self._find_held(optimizer):
            self._measure()

    def _is_measured(self) -> bool:
        return bool(self._anchor.drift) and self._anchor.drift[-1].step == self._anchor.steps

    def _measure(self) -> None:
        """Measure, note and log the drift; stop a training that has moved too many rows."""
        with self._running():
            drift = self._anchor.measure(self._model)
        if self._has_twins:
            shares = torch.tensor([drift.drifted, drift.refusals])
            shares = shares.to(next(self._model.parameters()).device)
            _average(shares)
            drift = Drift(drift.step, *shares.tolist())
        self._anchor.drift.append(drift)
        logger.info(
            "anchor: after step %d, %.1f %% of the answers begin otherwise than at the start, "
            "%.1f %% of the refusals",
            *(drift.step, 100 * drift.drifted, 100 * drift.refusals),
        )
        limit = self._anchor.stop_above
        if limit is not None and drift.drifted > limit:
            raise TrainingError(
                f"step {drift.step}: expected at most {limit:g} of the anchor's answers to begin "
                f"otherwise than at the start, found {drift.drifted:.3g}; raise --anchor-weight, "
                "lower --lr, or raise --stop-above"
            )


class AnchorLog(TrainerCallback):
    """Keep an anchor's count of steps as a trainer's, and its drift in the trainer's log."""

    # A trainer counts the steps that a scaler skips, and its checkpoints keep its log: a resumed
    # training is held by the same rows as a straight one, and tells of the same drift.

    def __init__(self, anchor: Anchor) -> None:
        self._anchor = anchor

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up a trainer's count of steps, and its log."""
        self._anchor.steps = state.global_step
        self._anchor.drift[:] = [
            Drift(entry["step"], entry[_DRIFT], entry[_REFUSALS])
            for entry in state.log_history
            if _DRIFT in entry
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up a trainer's count of steps."""
        self._anchor.steps = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put what was measured into the trainer's log."""
        logged = sum(_DRIFT in entry for entry in state.log_history)
        state.log_history += [
            {"step": drift.step, _DRIFT: drift.drifted, _REFUSALS: drift.refusals}
            for drift in self._anchor.drift[logged:]
        ]


def to_records(drift: Sequence[Drift]) -> list[dict[str, float]]:
    """Write measurements of drift as JSON has them."""
    return [asdict(measured) for measured in drift]


def _average(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)
    tensor /= torch.distributed.get_world_size()


def _remove_all(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
