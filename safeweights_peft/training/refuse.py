"""Safety Enhancement Tuning (SET): train the selected entries, and only them, to refuse.

The loss is a refusal term on harmful requests plus a retain term on benign ones: the KL divergence
to the base on the base's own answers. Source: arXiv 2604.08297, which has only the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from safeweights_peft.data import Batch, Example, collate, shuffle_endlessly
from safeweights_peft.errors import TrainingError
from safeweights_peft.modeling.answers import answer_logits, find_layout, without_dropout
from safeweights_peft.progress import Progress, Quiet
from safeweights_peft.settings import TrainSettings
from safeweights_peft.training.finetune import make_arguments, run_trainer
from safeweights_peft.training.losses import (
    Targets,
    compute_losses,
    compute_refusal_loss,
    compute_targets,
)
from safeweights_peft.tuner.adapter import saving_checkpoints
from safeweights_peft.tuner.selfcheck import check_adapter

GRADIENT_ROWS = 64  # by which a learning rate is found
Step = tuple[list[Example], list[Example]]  # harmful and benign examples


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, counted from 1: each term in nats, not weighted."""

    step: int
    refusal: float
    retain: float
    hinge: float = 0.0


def train_to_refuse(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    settings: TrainSettings,
    work_dir: Path,
    on_step: Callable[..., None] = lambda step, **losses: None,
    boundary: Sequence[Example] = (),
    progress: Progress | None = None,
) -> list[StepLoss]:
    """Train an adapter's values in place; resume from the last checkpoint in the directory.

    Boundary examples are benign ones that look harmful, drawn by `settings.boundary_fraction`.
    """
    if not harmful or not (benign or boundary):
        raise TrainingError(
            f"examples: expected harmful and benign ones, found {len(harmful)} and {len(benign)}"
        )
    check_adapter(model)
    with saving_checkpoints(model):
        return train_steps(
            *(model, tokenizer, harmful, benign, settings, work_dir, on_step, boundary, progress)
        )


def train_steps(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    settings: TrainSettings,
    work_dir: Path,
    on_step: Callable[..., None] = lambda step, **losses: None,
    boundary: Sequence[Example] = (),
    progress: Progress | None = None,
) -> list[StepLoss]:
    """Train an adapter of any kind by SET's loss; resume from the last checkpoint."""
    rate = settings.learning_rate or find_learning_rate(model, tokenizer, harmful, settings)
    steps = deal_steps(harmful, benign, boundary, settings)
    kept = list_answers(steps)
    task = (progress or Quiet()).task("Read the base's answers", len(kept))
    with task as advance, model.disable_adapter():
        targets = compute_targets(model, tokenizer, kept, settings, harmful, advance)
    settings = replace(settings, learning_rate=rate)
    return take_steps(model, tokenizer, steps, targets, settings, work_dir, on_step)


def list_answers(steps: Sequence[Step]) -> list[Example]:
    """List the benign examples of steps, of which targets are computed, each once."""
    return list(dict.fromkeys(example for _, answers in steps for example in answers))


def take_steps(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    steps: Sequence[Step],
    targets: Targets,
    settings: TrainSettings,
    work_dir: Path,
    on_step: Callable[..., None] = lambda step, **losses: None,
    **options: Any,
) -> list[StepLoss]:
    """Train what requires a gradient; the targets are of the steps' answers, as listed above."""
    arguments = make_arguments(
        settings,
        work_dir,
        next(model.parameters()).device,
        per_device_train_batch_size=1,  # an item holds a whole step
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        # Of differences, it pulls the model back to its base: what the losses don't ask for again
        # and again is noise of single steps, which changes all answers a little. AdamW multiplies
        # it by the rate, on which it must not depend.
        weight_decay=settings.shrink / (settings.learning_rate or 1.0),
        max_grad_norm=0.0,
        **options,
    )
    layout = find_layout(model)
    rows = {example: row for row, example in enumerate(list_answers(steps))}

    def collate_step(items: list[Step]) -> dict[str, Any]:
        ((refusals, answers),) = items
        return {
            "whole": collate(refusals + answers, tokenizer.pad_token_id, layout),
            "targets": targets.pick([rows[example] for example in answers]),
        }

    trainer = _RefusalTrainer(
        settings, model=model, args=arguments, train_dataset=steps, data_collator=collate_step
    )
    return [
        StepLoss(int(entry["step"]), entry["refusal"], entry["retain"], entry.get("hinge", 0.0))
        for entry in run_trainer(trainer, on_step)
    ]


def deal_steps(
    harmful: Sequence[Example],
    benign: Sequence[Example],
    boundary: Sequence[Example],
    settings: TrainSettings,
) -> list[Step]:
    """Deal the examples of each step in random order, all of a kind before any comes again."""
    generator = torch.Generator().manual_seed(settings.seed)
    size, fraction = settings.benign_batch_size, settings.boundary_fraction or 0.0
    if fraction:
        # The fraction holds over the steps so far, as one of so few rows can't at each.
        ends = [math.floor(step * size * fraction + 1e-9) for step in range(settings.steps + 1)]
        drawn = [end - start for start, end in pairwise(ends)]
    else:
        benign, drawn = [*benign, *boundary], [0] * settings.steps
    refusals = _deal(harmful, [settings.harmful_batch_size] * settings.steps, generator)
    answers = _deal(benign, [size - count for count in drawn], generator)
    borderline = _deal(boundary, drawn, generator)
    return [
        (first, second + third)
        for first, second, third in zip(refusals, answers, borderline, strict=True)
    ]


def _deal(
    examples: Sequence[Example], sizes: Sequence[int], generator: torch.Generator
) -> list[list[Example]]:
    if not examples and any(sizes):
        raise TrainingError(
            "boundary_fraction: expected benign examples that look harmful and others, found only "
            "one kind; give --boundary builtin:boundary_train, or leave --boundary-fraction out"
        )
    dealt = shuffle_endlessly(examples, generator)
    return [list(islice(dealt, size)) for size in sizes]


def find_learning_rate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    settings: TrainSettings,
) -> float:
    """Find the rate at which a step gains `settings.step_gain` nats of refusals, to first order."""
    # Adam moves each value by about the rate, whatever its gradient: the gain of a step is the rate
    # times the sum of absolute gradients, of which selections and densities have very different
    # ones. At equal rates they would be compared at steps of different size.
    count = min(GRADIENT_ROWS, len(harmful))
    # Evenly spaced, as rows are sorted by category; and the same ones for every seed.
    examples = [harmful[row * len(harmful) // count] for row in range(count)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _add_gradient(model, tokenizer, examples, settings)
    total = 0.0
    for parameter in trained:
        if parameter.grad is not None:
            total += float(parameter.grad.abs().sum())
            parameter.grad = None
    if not 0 < total < math.inf:
        raise TrainingError(
            f"--lr auto: expected a finite gradient of the refusal loss, found a sum of {total:g}; "
            "give --lr a number"
        )
    # Few digits are enough, easy to give again, and the same where a device sums in any order.
    return float(f"{settings.step_gain / total:.3g}")


def _add_gradient(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: TrainSettings,
) -> None:
    """Add the gradient of the refusal loss of examples, as of one batch."""
    decay, size = settings.token_decay, settings.harmful_batch_size + settings.benign_batch_size

    def weigh(rows: Sequence[Example]) -> float:
        return sum(decay**place for row in rows for place in range(len(row.answer_ids)))

    layout, device = find_layout(model), next(model.parameters()).device
    with torch.enable_grad(), without_dropout(model):
        for start in range(0, len(examples), size):  # no more rows at once than a step has
            rows = examples[start : start + size]
            batch = collate(rows, tokenizer.pad_token_id, layout).to(device)
            loss = compute_refusal_loss(answer_logits(model, batch), batch.answer_ids, decay)
            (weigh(rows) / weigh(examples) * loss).backward()


class _RefusalTrainer(Trainer):
    """`Trainer` with SET's loss, whose terms it logs."""

    def __init__(self, settings: TrainSettings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings
        self._terms: dict[str, float] = {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        whole: Batch = inputs["whole"].to(self.args.device)
        targets: Targets = inputs["targets"].to(self.args.device)
        losses = compute_losses(model, whole, targets, self._settings)
        terms = losses._asdict().items()
        self._terms = {name: loss.item() for name, loss in terms if loss is not None}
        return losses.weigh(self._settings)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Trainer's own leaves out whatever stands below a module that is named like a norm.
        return [name for name, _ in model.named_parameters()]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Into the trainer's own log, which its checkpoints keep: a resumed run returns all steps.
        super().log(logs | self._terms if "loss" in logs else logs, start_time)
