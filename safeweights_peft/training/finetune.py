"""Fine-tune a model, in full or by LoRA, while the entries of a safety map or patch stay.

The loop is `transformers.Trainer`'s, the protection ``preserve``'s. What is here lays instructions
and answers out for them: only answers count, and rows of like length stand together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from safeweights_peft.data import IGNORED, Example, endless_shuffle
from safeweights_peft.errors import TrainingError
from safeweights_peft.settings import PreserveMethod, PreserveSettings
from safeweights_peft.training.preserve import ArtifactOrPath, preserve

BATCHES_SORTED = 16
"""Batches sorted by length together; unsorted, a third or more of their tokens is padding."""


LEARNING_RATES = {PreserveMethod.FULL: 2e-5, PreserveMethod.LORA: 2e-4}
"""Peak learning rates where none is given."""


def fine_tune(
    model: PreTrainedModel | PeftModel,
    pad_token_id: int,
    examples: Sequence[Example],
    artifact: ArtifactOrPath,
    settings: PreserveSettings,
    work_dir: Path,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train a model in place, but for the entries of a safety map or patch.

    What is trained is the model's LoRA where it has one, else all weights. A run that was
    interrupted goes on from the last checkpoint in `work_dir`, and ends with the weights that a
    straight run has.
    """
    if not isinstance(model, PeftModel):
        model.requires_grad_(True)
    with preserve(model, artifact), _contiguous_logits(model):
        trainer = Trainer(
            model=model,
            args=_arguments(settings, work_dir, model.device, dtype),
            train_dataset=deal(examples, settings),
            data_collator=lambda rows: collate_answers(rows, pad_token_id),
            callbacks=[_StepWatch(on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(work_dir))
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def add_lora(model: PreTrainedModel, settings: PreserveSettings) -> PeftModel:
    """Wrap a model in LoRA on all linear layers but the output."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config)


@contextmanager
def _contiguous_logits(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Hand the output layer a copy of the last columns; see `modeling.last_columns`.

    Not its tensor of columns: torch's DataParallel would share that out over devices.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    hook = plain.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(),)
    )
    try:
        yield
    finally:
        hook.remove()


def _last_checkpoint(work_dir: Path) -> str | None:
    return get_last_checkpoint(str(work_dir)) if work_dir.is_dir() else None


def _arguments(
    settings: PreserveSettings, work_dir: Path, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",  # they come as they were dealt
        learning_rate=settings.learning_rate or LEARNING_RATES[settings.method],
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
    )


class _StepWatch(TrainerCallback):
    """Tells of each step, and breaks off where the loss is lost."""

    def __init__(self, on_step: Callable[[int, float], None]) -> None:
        self._on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:  # the trainer's summary at the end
            return
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"step {state.global_step}: expected a finite loss, found {logs['loss']}; "
                "lower --lr"
            )
        self._on_step(state.global_step, logs["loss"])


def deal(examples: Sequence[Example], settings: PreserveSettings) -> list[Example]:
    """Deal examples out for all steps: in random order, all of them before any comes again.

    Within some batches they are then put in order of length, and these batches in random order.
    """
    if not examples:
        raise TrainingError("examples: expected at least one, found none; give more data")
    generator = torch.Generator().manual_seed(settings.seed)
    size, total = settings.batch_size, settings.steps * settings.batch_size
    order = list(islice(endless_shuffle(examples, generator), total))
    dealt: list[Example] = []
    for start in range(0, total, BATCHES_SORTED * size):
        chosen = order[start : start + BATCHES_SORTED * size]
        chosen.sort(key=lambda each: len(each.prompt_ids) + len(each.answer_ids))
        for batch in torch.randperm(len(chosen) // size, generator=generator).tolist():
            dealt += chosen[batch * size : (batch + 1) * size]
    return dealt


def collate_answers(examples: Sequence[Example], pad_token_id: int) -> dict[str, Any]:
    """Lay examples out for a causal language model that computes its own loss."""
    rows = [torch.tensor(each.prompt_ids + each.answer_ids) for each in examples]
    labels = [row.clone() for row in rows]
    for each, label in zip(examples, labels, strict=True):
        label[: len(each.prompt_ids)] = IGNORED
    start = min(len(each.prompt_ids) for each in examples) - 1
    padded = pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, start:]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": padded,
        "logits_to_keep": padded.shape[1],
    }
