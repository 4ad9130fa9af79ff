"""What a job needs: parameters, memory and disk, from the headers of files before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.evaluation.judge_kinds import find_model
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import is_patch
from safeweights_peft.jobs.score import find_judges
from safeweights_peft.selection.pattern import find_place
from safeweights_peft.selection.scores import SCORES, Reads, split_by_layer
from safeweights_peft.settings import (
    EvaluateSettings,
    PreserveMethod,
    PreserveSettings,
    ScoreSettings,
    TrainSettings,
)


@dataclass(frozen=True)
class Estimate:
    """What a job needs."""

    parameters: int  # entries in the checkpoint
    memory_bytes: int  # the largest need of any step
    patch_bytes: int  # 0 where no patch is written


def estimate(
    job: Job,
    *,
    score: ScoreSettings | None = None,
    train: TrainSettings | None = None,
    preserve: PreserveSettings | None = None,
    evaluate: EvaluateSettings | None = None,
    adapter: Path | None = None,
) -> Estimate:
    """Estimate the steps that have settings, and measuring an adapter if there is one."""
    counts, weight_bytes = _read_sizes(job, job.base, is_trained=preserve is not None)
    parameters = sum(counts.values())
    extra_bytes = [0]
    if score:
        # Tensors outside of numbered layers, such as embeddings, hold nothing that is scored.
        scored = [key for key in counts if find_place(key).layer is not None] or list(counts)
        passes = split_by_layer(scored, score.layers_per_pass)
        gradients = max(sum(counts[key] for key in keys) for keys in passes)
        judge_bytes = sum(_read_sizes(job, judge)[1] for judge in find_judges(score))
        # Sums in float32: of gradients, and of squares; a rank-1 LoRA needs next to nothing.
        sums = {Reads.HARM: 2, Reads.CHANGE: 0}.get(SCORES[score.method].reads, 1)
        extra_bytes.append(judge_bytes + 4 * sums * gradients)
    if train:
        extra_bytes.append(parameters // 4)  # activations: a guess
    judges = filter(None, map(find_model, evaluate.judge if evaluate else ()))
    extra_bytes += [_read_sizes(job, resolve_base(judge))[1] for judge in judges]  # one at a time
    if adapter and not is_patch(adapter):
        extra_bytes.append(weight_bytes)  # a LoRA is merged into a second model
    if preserve and preserve.method is PreserveMethod.FULL:
        # Gradients and AdamW's two moments in float32, and gradients of the anchor.
        extra_bytes.append((16 if preserve.anchor else 12) * parameters)
    return Estimate(
        parameters=parameters,
        memory_bytes=weight_bytes + max(extra_bytes),
        patch_bytes=round(6 * score.density * parameters) if score and train else 0,
    )


def _read_sizes(job: Job, model: BaseModel, is_trained: bool = False) -> tuple[dict[str, int], int]:
    """Count the entries of each tensor, and the bytes of all in memory."""
    reader = CheckpointReader(model.path)
    infos = {key: reader.info(key) for key in reader.keys()}
    counts = {key: math.prod(info.shape) for key, info in infos.items()}
    if is_trained or job.dtype == torch.float32:
        return counts, 4 * sum(counts.values())
    return counts, sum(info.size_bytes for info in infos.values())
