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

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.data import Row, read_rows
from safeweights_peft.modeling import pick_device, pick_dtype, resolve_base
from safeweights_peft.pipeline.settings import (
    ComputeSettings,
    EvaluateSettings,
    ScoreSettings,
    TrainSettings,
)
from safeweights_peft.training import PreserveMethod, PreserveSettings

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
    """Estimates the steps for which settings are given.

    Args:
        base: directory or Hub id of the base model.
        score: settings of the scoring step, if there is one.
        train: settings of the training step, if there is one.
        evaluate: settings of the evaluation steps, if there are any.
        evaluations: how many evaluation steps there are.
        preserve: settings of the preserving step, if there is one.
        data: source of the requests with answers that it is to learn.
        compute: device and dtype.

    Returns:
        The estimate.
    """
    compute = compute or ComputeSettings()
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    reader = CheckpointReader(found.path)
    infos = [reader.info(key) for key in reader.keys()]
    parameters = sum(math.prod(info.shape) for info in infos)
    wide = preserve or pick_dtype(compute.dtype, device) == torch.float32
    weights = parameters * 4 if wide else sum(info.size_bytes for info in infos)
    speed = EFFICIENCY * _measure_speed(device)
    tokens = _tokens(score, train, evaluate, evaluations)
    if preserve:
        tokens["preserve"] = _tokens_of_lessons(preserve, read_rows(data, needs_output=True))
    seconds = {step: 2 * parameters * count / speed for step, count in tokens.items()}
    extra = max(
        parameters * 4 if score else 0,
        parameters // 4 if train else 0,
        weights if evaluations > 1 else 0,
        parameters * 12 if preserve and preserve.method is PreserveMethod.FULL else 0,
    )
    return Estimate(
        parameters=parameters,
        memory_bytes=weights + extra,
        patch_bytes=round(6 * score.density * parameters) if score and train else 0,
        seconds=seconds,
    )


def _tokens(
    score: ScoreSettings | None,
    train: TrainSettings | None,
    evaluate: EvaluateSettings | None,
    evaluations: int,
) -> dict[str, float]:
    """Counts tokens of forward passes; a backward pass costs as much as two."""
    tokens: dict[str, float] = {}
    if evaluate:
        rows = len(read_rows(evaluate.harmful)[: evaluate.limit])
        rows += len(read_rows(evaluate.benign)[: evaluate.limit])
        tokens["evaluate"] = evaluations * rows * (PROMPT_TOKENS + evaluate.max_new_tokens)
    if score:
        tokens["score"] = 3 * score.examples * (PROMPT_TOKENS + score.refusal_tokens)
    if train:
        harmful = train.enhance.harmful_batch_size * (PROMPT_TOKENS + train.refusal_tokens)
        benign = train.enhance.benign_batch_size * (PROMPT_TOKENS + train.answer_tokens)
        tokens["train"] = train.enhance.steps * (3 * harmful + 4 * benign)
    return tokens


def _tokens_of_lessons(preserve: PreserveSettings, lessons: Sequence[Row]) -> float:
    answers = [len(row.output or "") / TOKEN_CHARACTERS for row in lessons]
    usual = sum(min(each, preserve.max_answer_tokens) for each in answers) / len(answers)
    passes = 3 if preserve.method is PreserveMethod.FULL else 2  # LoRA's own are small
    return passes * preserve.steps * preserve.batch_size * (PROMPT_TOKENS + usual)


def _measure_speed(device: torch.device, size: int = 1024) -> float:
    """Times matrix products, in floating-point operations per second."""
    a = torch.randn(size, size, device=device)
    (a @ a).sum().item()
    started = time.perf_counter()
    for _ in range(4):
        a = a @ a / size
    a.sum().item()
    return 4 * 2 * size**3 / (time.perf_counter() - started)
