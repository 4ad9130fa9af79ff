"""Safety Enhancement Tuning (SET): train the selected entries, and only them, to refuse.

The loss is a refusal term on harmful requests plus a retain term on benign ones: the KL divergence
to the base on the base's own answers. Source: arXiv 2604.08297, which has only the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer

from safeweights_peft.data import IGNORED, Batch, Example, Layout, collate, shuffle_endlessly
from safeweights_peft.errors import TrainingError
from safeweights_peft.modeling.answers import answer_logits, find_layout
from safeweights_peft.settings import TrainSettings
from safeweights_peft.training.finetune import make_arguments, run_trainer
from safeweights_peft.tuner.adapter import saving_checkpoints
from safeweights_peft.tuner.selfcheck import check_adapter


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, counted from 1: each term in nats per token, weighted."""

    step: int
    refusal: float
    retain: float


def train_to_refuse(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    settings: TrainSettings,
    work_dir: Path,
    on_step: Callable[..., None] = lambda step, **losses: None,
) -> list[StepLoss]:
    """Train an adapter's values in place; resume from the last checkpoint in the directory."""
    if not harmful or not benign:
        raise TrainingError(
            f"examples: expected harmful and benign ones, found {len(harmful)} and {len(benign)}"
        )
    arguments = make_arguments(
        settings,
        work_dir,
        next(model.parameters()).device,
        per_device_train_batch_size=1,  # an item holds a whole step
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,  # of differences, it would pull the model back to its base
        max_grad_norm=0.0,
    )
    layout = find_layout(model)
    check_adapter(model)
    generator = torch.Generator().manual_seed(settings.seed)
    harmful_steps = _deal(harmful, settings.harmful_batch_size, settings.steps, generator)
    benign_steps = _deal(benign, settings.benign_batch_size, settings.steps, generator)
    trainer = _RefusalTrainer(
        settings,
        model=model,
        args=arguments,
        train_dataset=list(zip(harmful_steps, benign_steps, strict=True)),
        data_collator=lambda items: _collate_step(items, tokenizer.pad_token_id, layout),
    )
    with saving_checkpoints(model):
        log = run_trainer(trainer, on_step)
    return [StepLoss(int(entry["step"]), entry["refusal"], entry["retain"]) for entry in log]


def _deal(
    examples: Sequence[Example], size: int, steps: int, generator: torch.Generator
) -> list[list[Example]]:
    dealt = shuffle_endlessly(examples, generator)
    return [[next(dealt) for _ in range(size)] for _ in range(steps)]


def _collate_step(
    items: list[tuple[list[Example], list[Example]]], pad_token_id: int, layout: Layout
) -> dict[str, Batch]:
    ((harmful, benign),) = items
    # The benign rows come alone as well, because the base answers them alone.
    return {
        "whole": collate(harmful + benign, pad_token_id, layout),
        "benign": collate(benign, pad_token_id, layout),
    }


class _RefusalTrainer(Trainer):
    """`Trainer` with SET's loss, whose terms it logs."""

    def __init__(self, settings: TrainSettings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings
        self._terms: dict[str, float] = {}

    def compute_loss(
        self,
        model: PeftModel,
        inputs: dict[str, Batch],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        device = self.args.device
        whole, benign = inputs["whole"].to(device), inputs["benign"].to(device)
        refusal, retain = compute_losses(model, whole, benign, self._settings.token_decay)
        self._terms = {"refusal": refusal.item(), "retain": retain.item()}
        return refusal + self._settings.retain_weight * retain

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Into the trainer's own log, which its checkpoints keep: a resumed run returns all steps.
        super().log(logs | self._terms if "loss" in logs else logs, start_time)


def compute_losses(
    model: PeftModel, whole: Batch, benign: Batch, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both terms of SET's loss, for a batch whose last rows are the benign ones."""
    with torch.no_grad(), model.disable_adapter():
        base = answer_logits(model, benign)
    logits = answer_logits(model, whole)
    harmful = len(logits) - len(base)
    refusal = compute_refusal_loss(logits[:harmful], whole.answer_ids[:harmful], decay)
    retain = compute_retain_loss(logits[harmful:, : base.shape[1]], base, benign.answer_ids, decay)
    return refusal, retain


def compute_refusal_loss(
    logits: torch.Tensor, answer_ids: torch.Tensor, decay: float
) -> torch.Tensor:
    """Compute the weighted negative log-likelihood of refusals."""
    losses = F.cross_entropy(
        logits.transpose(1, 2), answer_ids, ignore_index=IGNORED, reduction="none"
    )
    return (losses * weigh_tokens(answer_ids, decay)).sum()


def compute_retain_loss(
    logits: torch.Tensor, base_logits: torch.Tensor, answer_ids: torch.Tensor, decay: float
) -> torch.Tensor:
    """Compute the weighted KL(base || model) over the base's own answers."""
    scored = answer_ids != IGNORED
    base = F.log_softmax(base_logits[scored], -1)
    tuned = F.log_softmax(logits[scored], -1)
    divergence = F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
    return (divergence * weigh_tokens(answer_ids, decay)[scored]).sum()


def weigh_tokens(answer_ids: torch.Tensor, decay: float) -> torch.Tensor:
    """Weight answer tokens so that each has `decay` times the weight of the one before; sum 1."""
    # The first answer tokens decide between refusing and helping.
    steps = torch.arange(answer_ids.shape[1], device=answer_ids.device)
    weights = decay**steps * (answer_ids != IGNORED)
    return weights / weights.sum()
