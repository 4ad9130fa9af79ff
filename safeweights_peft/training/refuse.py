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

from safeweights_peft.data import IGNORED, Batch, Example, collate, endless_shuffle
from safeweights_peft.errors import TrainingError
from safeweights_peft.modeling.answers import answer_logits
from safeweights_peft.settings import TrainSettings


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
    settings: TrainSettings,
    work_dir: Path,
    on_step: Callable[[StepLoss], None] = lambda _: None,
) -> list[StepLoss]:
    """Train an adapter's values in place.

    A run that was interrupted goes on from the last checkpoint in `work_dir`, and ends with the
    values that a straight run has.
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
    """Store float32 values while training: rounded ones would not continue the same run."""
    config = model.peft_config[model.active_adapter]
    values_dtype, config.values_dtype = config.values_dtype, "float32"
    try:
        yield
    finally:
        config.values_dtype = values_dtype


def _arguments(settings: TrainSettings, work_dir: Path, device: torch.device) -> TrainingArguments:
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


class _Steps(Dataset[tuple[Batch, Batch]]):
    """The examples of each step: item i is step i's whole batch, and its benign rows alone."""

    def __init__(
        self,
        harmful: Sequence[Example],
        benign: Sequence[Example],
        settings: TrainSettings,
        pad_token_id: int,
    ) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        self._pad_token_id = pad_token_id
        self._harmful = _deal(harmful, settings.harmful_batch_size, settings.steps, generator)
        self._benign = _deal(benign, settings.benign_batch_size, settings.steps, generator)

    def __len__(self) -> int:
        return len(self._harmful)

    def __getitem__(self, step: int) -> tuple[Batch, Batch]:
        benign = self._benign[step]
        return (
            collate(self._harmful[step] + benign, self._pad_token_id),
            collate(benign, self._pad_token_id),
        )


def _deal(
    examples: Sequence[Example], size: int, steps: int, generator: torch.Generator
) -> list[list[Example]]:
    dealt = endless_shuffle(examples, generator)
    return [[next(dealt) for _ in range(size)] for _ in range(steps)]


def _only(items: list[tuple[Batch, Batch]]) -> dict[str, Batch]:
    ((whole, benign),) = items
    return {"whole": whole, "benign": benign}


class _EnhanceTrainer(Trainer):
    """`Trainer` with SET's loss, and examples in the order in which they were dealt."""

    settings: TrainSettings
    on_step: Callable[[StepLoss], None]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: PeftModel,
        inputs: dict[str, Batch],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        device = self.args.device
        whole, benign = inputs["whole"].to(device), inputs["benign"].to(device)
        refusal, retain = step_losses(model, whole, benign, self.settings.token_decay)
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


def step_losses(
    model: PeftModel, whole: Batch, benign: Batch, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both terms of SET's loss."""
    with torch.no_grad(), model.disable_adapter():
        base = answer_logits(model, benign)
    logits = answer_logits(model, whole)
    harmful = len(logits) - len(base)
    refusal = refusal_loss(logits[:harmful], whole.answer_ids[:harmful], decay)
    retain = retain_loss(logits[harmful:, : base.shape[1]], base, benign.answer_ids, decay)
    return refusal, retain


def refusal_loss(logits: torch.Tensor, answer_ids: torch.Tensor, decay: float) -> torch.Tensor:
    """Compute the weighted negative log-likelihood of refusals."""
    losses = F.cross_entropy(
        logits.transpose(1, 2), answer_ids, ignore_index=IGNORED, reduction="none"
    )
    return (losses * token_weights(answer_ids, decay)).sum()


def retain_loss(
    logits: torch.Tensor, base_logits: torch.Tensor, answer_ids: torch.Tensor, decay: float
) -> torch.Tensor:
    """Compute the weighted KL(base || model) over the base's own answers."""
    scored = answer_ids != IGNORED
    base = F.log_softmax(base_logits[scored], -1)
    tuned = F.log_softmax(logits[scored], -1)
    divergence = F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
    return (divergence * token_weights(answer_ids, decay)[scored]).sum()


def token_weights(answer_ids: torch.Tensor, decay: float) -> torch.Tensor:
    """Weight answer tokens: geometrically less from each to the next, 1 in all."""
    steps = torch.arange(answer_ids.shape[1], device=answer_ids.device)
    weights = decay**steps * (answer_ids != IGNORED)
    return weights / weights.sum()
