"""Make a start model whose safety is deep: all weights trained by SET's loss, not a few.

    python benchmarks/safer_start.py BASE --out DIR [--steps 600] [--settings FILE] [--device cuda]

It stands in for a maker's alignment in `preserving_study.py`. The data, loss and schedule are those
of `safeweights train` (--settings changes them), at a rate by which a step gains τ nats to first
order, unless --lr is given. DIR is a checkpoint as BASE is; a call that was broken off resumes.
"""

import argparse
import sys
from dataclasses import asdict, replace
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.writer import draft_copy
from safeweights_peft.errors import CheckpointError
from safeweights_peft.files import write_json
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import write_parameters
from safeweights_peft.jobs.train import read_requests
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.settings import ComputeSettings, RunSettings, TrainSettings
from safeweights_peft.sources import LOOKS_HARMFUL, data_digest
from safeweights_peft.training.losses import compute_targets
from safeweights_peft.training.refuse import (
    deal_steps,
    find_learning_rate,
    list_answers,
    take_steps,
)

RECORD_FILE = "safer_start.json"
SAID = 20  # steps between lines


def main() -> None:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, help="peak learning rate; by --step-gain unless given")
    parser.add_argument("--step-gain", type=float, help="nats that a step gains, to first order")
    parser.add_argument("--settings", type=Path, help="TOML or JSON: what differs from the recipe")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto", help="computed in; trained weights are float32")
    arguments = parser.parse_args()
    recipe = RunSettings.read(arguments.settings).train if arguments.settings else TrainSettings()
    gain = arguments.step_gain or recipe.step_gain
    # Nothing shrinks: the weights themselves would, not differences.
    recipe = replace(recipe, steps=arguments.steps, shrink=0.0)
    settings = replace(recipe, learning_rate=arguments.lr, step_gain=gain)
    compute = ComputeSettings(device=arguments.device, dtype=arguments.dtype)
    make_safer(Job(arguments.base, compute), arguments.out, settings)


def make_safer(job: Job, out: Path, settings: TrainSettings) -> dict[str, Any]:
    """Train all weights of a base to refuse, and write a checkpoint as the base's is."""
    harmful_rows, benign_rows = read_requests(settings)
    job.check(benign_rows, harmful_rows, out=out, error=CheckpointError)
    record = job.record(
        "safer start",
        None,
        settings,
        harmful_digest=data_digest(harmful_rows),
        benign_digest=data_digest(benign_rows),
    )
    with job.work(out, record) as work_dir:
        harmful = job.chat.encode_rows(harmful_rows, settings.refusal_tokens)
        answers = job.ask("the base benign", benign_rows, settings.benign_tokens)
        is_drawn = [
            bool(settings.boundary_fraction) and row.category == LOOKS_HARMFUL
            for row in benign_rows
        ]
        benign, boundary = [*compress(answers, map(not_, is_drawn))], [*compress(answers, is_drawn)]
        is_mixed = job.take_model().dtype is torch.bfloat16
        # In float32: steps are smaller than what bfloat16 resolves.
        model = load_model(job.base, torch.float32, job.device).requires_grad_(True)
        rate = settings.learning_rate or find_learning_rate(model, job.tokenizer, harmful, settings)
        settings = replace(settings, learning_rate=rate)
        steps = deal_steps(harmful, benign, boundary, settings)
        kept = list_answers(steps)
        targets = compute_targets(model, job.tokenizer, kept, settings, harmful)
        losses = take_steps(
            *(model, job.tokenizer, steps, targets, settings, work_dir, say),
            bf16=is_mixed,
        )
        record |= {"learning_rate": rate, "losses": [asdict(loss) for loss in losses]}
        write_model(job, model, out, record)
    return record


def write_model(
    job: Job, model: PreTrainedModel, out: Path, record: dict[str, Any] | None = None
) -> None:
    """Publish a copy of the base with a model's weights, rounded once to the base's dtypes."""
    layout = describe(job.empty, [name for name, _ in job.empty.named_parameters()], job.base.path)
    with draft_copy(job.reader, out) as draft:
        write_parameters(draft, model, layout)
        if record is not None:
            write_json(draft.reader.directory / RECORD_FILE, record)


def say(step: int, /, **losses: float) -> None:
    """Print a step's losses now and then."""
    if step % SAID == 0:
        parts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"step {step}: {parts}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
