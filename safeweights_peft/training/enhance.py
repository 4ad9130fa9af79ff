"""Safety Enhancement Tuning (SET): train the selected entries to refuse harmful requests only.

The loss is a refusal term on harmful requests plus a retain term on benign ones: KL divergence to
the base model on the base's own answers. Both are weighted towards the first answer tokens, which
decide between refusing and helping. The loop is `transformers.Trainer`'s.

Source: arXiv 2604.08297, section on SET, which has the refusal term only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from safeweights_peft.data import IGNORED, Batch, Example, collate
from safeweights_peft.errors import TrainingError
from safeweights_peft.modeling import answer_logits

ROWS_TOGETHER = 12
"""Rows in a forward pass: of like length, so that little of it is padding."""


@dataclass(frozen=True)
class EnhanceSettings:
    """How SET trains.

    Attributes:
        steps: optimizer steps.
        learning_rate: peak learning rate of AdamW, reached after `warmup_steps`, then cosine to 0.
        retain_weight: weight of the retain term against the refusal term.
        harmful_batch_size: harmful requests per step.
        benign_batch_size: benign requests per step.
        token_decay: weight of an answer token relative to the one before it, in (0, 1].
        warmup_steps: steps of linear warm-up.
        checkpoint_steps: a checkpoint to resume from is written every so many steps.
        seed: fixes the order of examples.
    """

    steps: int = 100
    learning_rate: float = 6e-4
    retain_weight: float = 16.0
    harmful_batch_size: int = 4
    benign_batch_size: int = 12
    token_decay: float = 0.7
    warmup_steps: int = 5
    checkpoint_steps: int = 25
    seed: int = 0


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step.

    Attributes:
        step: from 1.
        refusal: weighted negative log-likelihood of the refusals, in nats per token.
        retain: weighted KL(base || model) on benign answers, in nats per token.
    """

    step: int
    refusal: float
    retain: float


def enhance(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    settings: EnhanceSettings,
    work_dir: Path,
    on_step: Callable[[StepLoss], None] = lambda _: None,
) -> list[StepLoss]:
    """Trains an adapter's values in place.

    A run that was interrupted goes on from the last checkpoint in `work_dir`, and ends with the
    values that a straight run has.

    Args:
        model: a PeftModel with one trainable safeweights adapter; float32 values.
        tokenizer: pads the batches.
        harmful: harmful requests with refusals.
        benign: benign requests with the base model's own answers.
        settings: steps, rates, weights, seed.
        work_dir: where checkpoints are kept; give each run its own.
        on_step: called after each step.

    Returns:
        The losses of all steps, those before an interruption included.

    Raises:
        TrainingError: there are no examples, or the loss is not finite.
    """
    if not harmful or not benign:
        raise TrainingError(
            f"examples: expected harmful and benign ones, found {len(harmful)} and {len(benign)}"
        )
    trainer = _EnhanceTrainer(
        model=model,
        args=_arguments(settings, work_dir, next(model.parameters()).device),
        train_dataset=_Steps(harmful, benign, settings, tokenizer.pad_token_id),
        data_collator=_only,
    )
    trainer.settings = settings
    trainer.on_step = on_step
    trainer.remove_callback(PrinterCallback)
    with _exact_checkpoints(model):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work_dir)))
    model.eval()
    return [StepLoss(**entry) for entry in trainer.state.log_history if "refusal" in entry]


@contextmanager
def _exact_checkpoints(model: PeftModel) -> Iterator[None]:
    """Stores float32 values while training: rounded ones would not continue the same run."""
    config = model.peft_config[model.active_adapter]
    values_dtype, config.values_dtype = config.values_dtype, "float32"
    try:
        yield
    finally:
        config.values_dtype = values_dtype


def _arguments(
    settings: EnhanceSettings, work_dir: Path, device: torch.device
) -> TrainingArguments:
    work_dir.mkdir(parents=True, exist_ok=True)
    return TrainingArguments(
        output_dir=str(work_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )


@dataclass(frozen=True)
class _Part:
    """Rows of one forward pass, with the weight of each answer token in the step's loss."""

    batch: Batch
    weights: torch.Tensor

    def to(self, device: torch.device) -> _Part:
        return _Part(self.batch.to(device), self.weights.to(device))


class _Steps(Dataset[tuple[list[_Part], list[_Part]]]):
    """The examples of each step: item i is step i's harmful parts, and its benign ones."""

    def __init__(
        self,
        harmful: Sequence[Example],
        benign: Sequence[Example],
        settings: EnhanceSettings,
        pad_token_id: int,
    ) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        self._pad_token_id = pad_token_id
        self._decay = settings.token_decay
        self._harmful = _deal(harmful, settings.harmful_batch_size, settings.steps, generator)
        self._benign = _deal(benign, settings.benign_batch_size, settings.steps, generator)

    def __len__(self) -> int:
        return len(self._harmful)

    def __getitem__(self, step: int) -> tuple[list[_Part], list[_Part]]:
        return self._parts(self._harmful[step]), self._parts(self._benign[step])

    def _parts(self, examples: list[Example]) -> list[_Part]:
        ordered = sorted(examples, key=lambda each: len(each.prompt_ids))
        batches = [
            collate(ordered[start : start + ROWS_TOGETHER], self._pad_token_id)
            for start in range(0, len(ordered), ROWS_TOGETHER)
        ]
        weights = token_weights([batch.answer_ids for batch in batches], self._decay)
        return [_Part(*pair) for pair in zip(batches, weights, strict=True)]


def _deal(
    examples: Sequence[Example], size: int, steps: int, generator: torch.Generator
) -> list[list[Example]]:
    """Deals examples out in random order, all of them before any comes again."""

    def endless() -> Iterator[Example]:
        while True:
            for position in torch.randperm(len(examples), generator=generator).tolist():
                yield examples[position]

    dealt = endless()
    return [[next(dealt) for _ in range(size)] for _ in range(steps)]


def _only(items: list[tuple[list[_Part], list[_Part]]]) -> dict[str, list[_Part]]:
    ((harmful, benign),) = items
    return {"harmful": harmful, "benign": benign}


class _EnhanceTrainer(Trainer):
    """`Trainer` with SET's loss, and examples in the order in which they were dealt."""

    settings: EnhanceSettings
    on_step: Callable[[StepLoss], None]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: PeftModel,
        inputs: dict[str, list[_Part]],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        harmful, benign = ([p.to(self.args.device) for p in parts] for parts in inputs.values())
        with torch.no_grad(), model.disable_adapter():
            base = [answer_logits(model, part.batch) for part in benign]
        refusal = torch.stack(
            [
                refusal_loss(answer_logits(model, part.batch), part.batch.answer_ids, part.weights)
                for part in harmful
            ]
        ).sum()
        retain = torch.stack(
            [
                retain_loss(answer_logits(model, part.batch), logits, part.weights)
                for part, logits in zip(benign, base, strict=True)
            ]
        ).sum()
        self._report(refusal.item(), retain.item())
        return refusal + self.settings.retain_weight * retain

    def _report(self, refusal: float, retain: float) -> None:
        step = StepLoss(self.state.global_step + 1, refusal, retain)
        if not torch.isfinite(torch.tensor([refusal, retain])).all():
            raise TrainingError(
                f"step {step.step}: expected a finite loss, found refusal {refusal}, "
                f"retain {retain}; lower --lr"
            )
        self.state.log_history.append(asdict(step))  # kept in checkpoints, unlike the trainer
        self.on_step(step)


def refusal_loss(
    logits: torch.Tensor, answer_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Computes the weighted negative log-likelihood of refusals.

    Args:
        logits: (B, A, V) of the model in training.
        answer_ids: (B, A) refusals, `IGNORED` where one has ended.
        weights: (B, A) from `token_weights`.

    Returns:
        A scalar, nats per token.
    """
    losses = F.cross_entropy(
        logits.transpose(1, 2), answer_ids, ignore_index=IGNORED, reduction="none"
    )
    return (losses * weights).sum()


def retain_loss(
    logits: torch.Tensor, base_logits: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Computes the weighted KL(base || model) over the base's own answers.

    Args:
        logits: (B, A, V) of the model in training.
        base_logits: (B, A, V) of the base.
        weights: (B, A) from `token_weights`.

    Returns:
        A scalar, nats per token.
    """
    scored = weights > 0
    base = F.log_softmax(base_logits[scored], -1)
    tuned = F.log_softmax(logits[scored], -1)
    divergence = F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
    return (divergence * weights[scored]).sum()


def token_weights(answers: Sequence[torch.Tensor], decay: float) -> list[torch.Tensor]:
    """Weights answer tokens: geometrically less from each to the next, 1 in all.

    Args:
        answers: the answers of one step's batches, each (B, A); `IGNORED` where one has ended.
        decay: weight of a token relative to the one before it, in (0, 1].

    Returns:
        (B, A) float32 for each batch, 0 where an answer has ended; together they sum to 1.
    """
    weights = [decay ** torch.arange(ids.shape[1]) * (ids != IGNORED) for ids in answers]
    total = sum(each.sum() for each in weights)
    return [each / total for each in weights]
