"""The scoring job: from a base model and harmful requests to a safety map on disk."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.data import Row, data_digest, encode_example, read_rows, with_refusals
from safeweights_peft.errors import FormatError, SelectionError
from safeweights_peft.files import check_target
from safeweights_peft.format import SafetyMap, write_map
from safeweights_peft.modeling import (
    eligible_parameters,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve_base,
    total_parameters,
)
from safeweights_peft.pipeline.progress import Progress, Quiet
from safeweights_peft.pipeline.settings import ComputeSettings, Method, ScoreSettings
from safeweights_peft.selection import (
    Order,
    ReferenceObjective,
    accumulate_gradients,
    build_map,
    esi_scores,
    random_scores,
    select,
)


def score(
    base: str,
    out: Path,
    settings: ScoreSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> SafetyMap:
    """Selects the entries that carry safety and writes them as a safety map.

    Args:
        base: directory or Hub id of the base model.
        out: the map's directory, published whole or not at all.
        settings: requests, density, method.
        compute: device and dtype.
        progress: shown while scoring.
        overwrite: replace an existing map.

    Returns:
        The map.

    Raises:
        SelectionError: the density selects nothing, or more than the eligible entries.
    """
    settings, compute = settings or ScoreSettings(), compute or ComputeSettings()
    started = time.perf_counter()
    check_target(out, overwrite, FormatError)
    rows = sample_rows(settings)
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    model = load_model(found, pick_dtype(compute.dtype, device), device)
    parameters = eligible_parameters(model)
    total = total_parameters(model)
    k = _count(settings.density, total, parameters)
    if settings.method is Method.RANDOM:
        scores = random_scores(parameters, settings.seed)
    else:
        tokenizer = load_tokenizer(found)
        scores = score_entries(model, tokenizer, parameters, rows, settings, progress or Quiet())
    order = Order.BOTTOM if settings.method is Method.BOTTOM else Order.TOP
    selected = select(scores, k, order)
    selection = asdict(settings) | {
        "objective": "reference",
        "total_parameters": total,
        "data_digest": data_digest(rows),
        "seconds": round(time.perf_counter() - started, 1),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    safety_map = build_map(model, found, selected, selection)
    write_map(out, safety_map, overwrite=overwrite)
    return safety_map


def sample_rows(settings: ScoreSettings) -> list[Row]:
    """Takes the harmful requests that a model is scored with.

    Args:
        settings: their source, how many, and the seed.

    Returns:
        Requests with refusals.
    """
    rows = with_refusals(read_rows(settings.harmful))
    count = min(settings.examples, len(rows))
    return random.Random(settings.seed).sample(rows, count)


def _count(density: float, total: int, parameters: dict[str, nn.Parameter]) -> int:
    k = round(density * total)
    eligible = sum(parameter.numel() for parameter in parameters.values())
    if not 1 <= k <= eligible:
        raise SelectionError(
            f"density: expected 1 to {eligible} entries of {total} (the eligible ones), "
            f"found {k}; choose a density of at most {eligible / total:.3f}"
        )
    return k


def score_entries(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parameters: dict[str, nn.Parameter],
    rows: list[Row],
    settings: ScoreSettings,
    progress: Progress,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Computes ESI under the reference objective.

    Args:
        model: the model to be scored.
        tokenizer: its tokenizer.
        parameters: eligible parameters by name.
        rows: requests with refusals.
        settings: tokens of a refusal, batch size.
        progress: shown while gradients are computed.

    Returns:
        Names and float32 scores of the parameter's shape.
    """
    examples = [
        encode_example(tokenizer, row.instruction, row.output or "", settings.refusal_tokens)
        for row in rows
    ]
    objective = ReferenceObjective(examples, tokenizer.pad_token_id, settings.batch_size)
    with progress.task("Scoring weights", len(objective)) as advance:
        gradients = accumulate_gradients(model, parameters, objective, lambda: advance(1))
    return esi_scores(parameters, gradients)
