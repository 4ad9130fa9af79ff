"""Time steps of one training, with something kept and with nothing, in turn."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from safeweights_peft.data import Example
from safeweights_peft.jobs.anchor import collect_anchor
from safeweights_peft.jobs.job import Job
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.settings import PreserveMethod, PreserveSettings
from safeweights_peft.sources import Row
from safeweights_peft.training.finetune import add_lora, collate_answers, compute_answer_loss, deal
from safeweights_peft.training.preserve import preserve

Keep = Callable[[nn.Module], AbstractContextManager[Any]]
USUAL_ROWS = 8  # per step, by the job's default
TINY_RATE = 1e-7  # the model must not become another while its steps are timed


def time_anchor(
    job: Job, rows: Sequence[Row], settings: PreserveSettings, requests: int, blocks: int
) -> dict[str, dict[str, Any]]:
    """Time steps with an anchor and without, of as many rows as in the study and as usual."""
    dtype = job.take_model().dtype
    model: PreTrainedModel = load_model(job.base, torch.float32, job.device)
    examples = job.chat.encode_rows(rows, settings.max_answer_tokens)
    anchor = collect_anchor(model, job.tokenizer, requests=requests)
    model.requires_grad_(True)
    if settings.method is PreserveMethod.LORA:
        model = add_lora(model, settings)
    times = {}
    for size in (settings.batch_size, USUAL_ROWS):
        held = replace(anchor, batch_rows=min(2 * size, 8), drift=[])  # as many as the job's
        times[str(size)] = time_steps(
            *(model, job.tokenizer.pad_token_id, examples),
            replace(settings, batch_size=size, steps=anchor.every * blocks),
            *(dtype, partial(preserve, anchor=held), anchor.every),
        )
    return times


def time_steps(
    model: PreTrainedModel,
    pad_token_id: int,
    examples: Sequence[Example],
    settings: PreserveSettings,
    dtype: torch.dtype,
    keep: Keep,
    block: int,
) -> dict[str, Any]:
    """Time `settings.steps` steps of each kind, in blocks; a block has all that comes regularly."""
    # The same batches for both, and each block of one beside one of the other: whatever else the
    # machine does then slows both.
    size, blocks = settings.batch_size, max(2, settings.steps // block)
    dealt = deal(examples, settings)
    batches = [
        collate_answers(dealt[start : start + size], pad_token_id)
        for start in range(0, len(dealt), size)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TINY_RATE)
    is_mixed = dtype is torch.bfloat16

    def step(batch: dict[str, Any]) -> None:
        inputs = {key: _move(value, model.device) for key, value in batch.items()}
        labels = inputs.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=is_mixed):
            outputs = model(**inputs)
        compute_answer_loss(outputs, labels).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    seconds: dict[str, list[float]] = {"plain": [], "kept": []}
    feeds = {name: cycle(batches) for name in seconds}
    for number in range(blocks + 1):  # the first of each warms up
        for name, times in seconds.items():
            with keep(model) if name == "kept" else nullcontext():
                started = _read_clock(model.device)
                for _ in range(block):
                    step(next(feeds[name]))
                if number:
                    times.append((_read_clock(model.device) - started) / block)
    ratios = [kept / plain for plain, kept in zip(*seconds.values(), strict=True)]
    return {
        **{name: statistics.median(times) for name, times in seconds.items()},
        "ratios": ratios,
        "block": block,
    }


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _read_clock(device: torch.device) -> float:
    """Read the time that this process has computed; on an accelerator, that has passed."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()
