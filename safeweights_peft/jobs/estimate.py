"""What a job will need, before it starts: parameters, memory and time, from the files' headers.

Times rest on a matrix product measured on the spot, so they are a guess to within a factor of
about two; nothing is loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.data import Row, read_rows
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.modeling.loading import pick_device, pick_dtype
from safeweights_peft.selection.pattern import find_place
from safeweights_peft.selection.scores import split_by_layer
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    PreserveMethod,
    PreserveSettings,
    ScoreSettings,
    TrainSettings,
)

PROMPT_TOKENS = 48
"""Usual length of a rendered request; part of the guess."""
TOKEN_CHARACTERS = 4
"""Usual length of a token of text; part of the guess."""
EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a small model reaches; part of the guess."""


@dataclass(frozen=True)
class Estimate:
    """What a job will need.

    Attributes:
        parameters: entries in the checkpoint.
        memory_bytes: the largest need of any step: weights, gradients, activations, and AdamW's
            moments where all weights are trained.
        patch_bytes: size of the patch to be written, 0 where none is.
        seconds: guessed time of each step, by name.
    """

    parameters: int
    memory_bytes: int
    patch_bytes: int
    seconds: dict[str, float]


def estimate(
    base: str,
    *,
    score: ScoreSettings | None = None,
    train: TrainSettings | None = None,
    evaluate: EvaluateSettings | None = None,
    evaluations: int = 1,
    preserve: PreserveSettings | None = None,
    data: str = "",
    compute: ComputeSettings | None = None,
) -> Estimate:
    """Estimate the steps for which settings are given."""
    compute = compute or ComputeSettings()
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    weights_of = _read_sizes(found, bool(preserve), compute.dtype, device)
    parameters = sum(weights_of.counts.values())
    speed = EFFICIENCY * _measure_speed(device)
    tokens = _tokens(train, evaluate, evaluations)
    scoring_bytes = 0
    if score:
        judge = _Sizes({}, 0)
        if name := score.guard or score.classifier:
            judge = _read_sizes(resolve_base(name), False, compute.dtype, device)
        tokens["score"] = _tokens_of_scoring(score, judge, weights_of)
        scoring_bytes = judge.memory_bytes + 4 * _accumulated(score, weights_of)
    if preserve:
        tokens["preserve"] = _tokens_of_lessons(preserve, read_rows(data, needs_output=True))
    seconds = {step: 2 * parameters * count / speed for step, count in tokens.items()}
    extra = max(
        scoring_bytes,
        parameters // 4 if train else 0,
        weights_of.memory_bytes if evaluations > 1 else 0,
        parameters * 12 if preserve and preserve.method is PreserveMethod.FULL else 0,
    )
    return Estimate(
        parameters=parameters,
        memory_bytes=weights_of.memory_bytes + extra,
        patch_bytes=round(6 * score.density * parameters) if score and train else 0,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Sizes:
    """Entries of each tensor of a checkpoint, and what all of them take in memory."""

    counts: dict[str, int]
    memory_bytes: int


def _read_sizes(base: BaseModel, is_trained: bool, dtype: str, device: torch.device) -> _Sizes:
    reader = CheckpointReader(base.path)
    infos = {key: reader.info(key) for key in reader.keys()}
    counts = {key: math.prod(info.shape) for key, info in infos.items()}
    if is_trained or pick_dtype(dtype, device) == torch.float32:
        return _Sizes(counts, 4 * sum(counts.values()))
    return _Sizes(counts, sum(info.size_bytes for info in infos.values()))


def _accumulated(score: ScoreSettings, base: _Sizes) -> int:
    """Count the entries whose gradients are summed at once."""
    passes = split_by_layer(_scored(base), score.layers_per_pass)
    return max(sum(base.counts[key] for key in keys) for keys in passes)


def _scored(base: _Sizes) -> list[str]:
    """List the tensors of numbered layers: those of others hold nothing that is scored."""
    return [key for key in base.counts if find_place(key).layer is not None] or list(base.counts)


def _tokens_of_scoring(score: ScoreSettings, judge: _Sizes, base: _Sizes) -> float:
    """Count the model's tokens, a judge's in proportion to its size."""
    passes = len(split_by_layer(_scored(base), score.layers_per_pass))
    answer = score.answer_tokens if judge.counts else score.refusal_tokens
    own: float = 3 * passes * (PROMPT_TOKENS + answer)
    if judge.counts:
        share = sum(judge.counts.values()) / sum(base.counts.values())
        own += PROMPT_TOKENS + answer + 3 * passes * share * (2 * PROMPT_TOKENS + answer)
    contrast = 3 * passes + 1 if score.contrast else 0
    return score.examples * (own + contrast * (PROMPT_TOKENS + score.answer_tokens))


def _tokens(
    train: TrainSettings | None, evaluate: EvaluateSettings | None, evaluations: int
) -> dict[str, float]:
    """Count tokens of forward passes; a backward pass costs as much as two."""
    tokens: dict[str, float] = {}
    if evaluate:
        rows = len(read_rows(evaluate.harmful)[: evaluate.limit])
        rows += len(read_rows(evaluate.benign)[: evaluate.limit])
        tokens["evaluate"] = evaluations * rows * (PROMPT_TOKENS + evaluate.max_new_tokens)
    if train:
        harmful = train.harmful_batch_size * (PROMPT_TOKENS + train.refusal_tokens)
        benign = train.benign_batch_size * (PROMPT_TOKENS + train.answer_tokens)
        tokens["train"] = train.steps * (3 * harmful + 4 * benign)
    return tokens


def _tokens_of_lessons(preserve: PreserveSettings, lessons: Sequence[Row]) -> float:
    answers = [len(row.output or "") / TOKEN_CHARACTERS for row in lessons]
    usual = sum(min(each, preserve.max_answer_tokens) for each in answers) / len(answers)
    passes = 3 if preserve.method is PreserveMethod.FULL else 2  # LoRA's own are small
    return passes * preserve.steps * preserve.batch_size * (PROMPT_TOKENS + usual)


def _measure_speed(device: torch.device, size: int = 1024) -> float:
    """Time matrix products, in floating-point operations per second."""
    a = torch.randn(size, size, device=device)
    (a @ a).sum().item()
    started = time.perf_counter()
    for _ in range(4):
        a = a @ a / size
    a.sum().item()
    return 4 * 2 * size**3 / (time.perf_counter() - started)
