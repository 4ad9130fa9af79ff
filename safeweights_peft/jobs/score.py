"""The scoring job: from a base and harmful requests to a safety map on disk."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from safeweights_peft.data import Row, data_digest, read_rows, with_refusals
from safeweights_peft.delta import Array
from safeweights_peft.errors import FormatError, SelectionError
from safeweights_peft.files import check_apart, check_target
from safeweights_peft.jobs.job import Job, describe_files, load_arrays, save_arrays
from safeweights_peft.jobs.objectives import (
    build_safety,
    build_usefulness,
    check_judges,
    find_judges,
)
from safeweights_peft.modeling.layout import eligible_parameters, total_parameters
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.io import write_map
from safeweights_peft.selection.guards import read_profile
from safeweights_peft.selection.objective import JudgedObjective, SafetyObjective
from safeweights_peft.selection.safety_map import build_map
from safeweights_peft.selection.scores import (
    SCORES,
    GradientSum,
    Score,
    score_entries,
    split_by_layer,
    sum_gradients,
)
from safeweights_peft.selection.topk import Order, Selected, TopK, select
from safeweights_peft.settings import Method, ScoreSettings

SAVE_SECONDS = 60
"""The sum of gradients, as large as the scored weights, is saved this often."""


def score(
    job: Job, out: Path, settings: ScoreSettings | None = None, *, overwrite: bool = False
) -> SafetyMap:
    """Select the entries that carry safety, and write them as a safety map."""
    settings, started = settings or ScoreSettings(), time.perf_counter()
    check_target(out, overwrite, FormatError)
    check_judges(settings)
    harmful = sample_rows(settings)
    benign = _sample(read_rows(settings.contrast), settings) if settings.contrast else []
    judges = find_judges(settings)
    inputs = {"the base": job.base.path, **{f"the judge {each.name}": each.path for each in judges}}
    check_apart(out, inputs, FormatError)
    parameters = eligible_parameters(job.model)
    total = total_parameters(job.model)
    count, excluded_count = _count_entries(parameters, total, settings)
    kind = SCORES[settings.method]
    selection = asdict(settings) | {
        "objective": _name_objective(settings) if kind.needs_gradient else None,
        "total_parameters": total,
        "data_digest": data_digest(harmful),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    identity = {
        **selection,
        **asdict(job.compute),
        "judges": [describe_files(judge.path) for judge in judges],
        "profile": asdict(read_profile(settings.profile)) if settings.profile else None,
        "contrast_digest": data_digest(benign),
    }
    with job.work(out, identity) as work_dir:
        if not kind.needs_gradient:
            selected = select(score_entries(kind, parameters, {}, settings.seed), count, kind.order)
        else:
            scoring = Scoring(job, settings, work_dir)
            excluded: dict[str, Array] = {}
            if benign:
                usefulness = build_usefulness(job, benign, settings)
                useful = scoring.select("usefulness", usefulness, excluded_count)
                excluded = {name: entries.indices for name, entries in useful.items()}
            safety = build_safety(job, harmful, settings)
            selected = scoring.select("safety", safety, count, kind, excluded)
            if isinstance(safety, JudgedObjective):
                selection["mean_safety"] = safety.mean_safety
        selection["seconds"] = round(time.perf_counter() - started, 1)
        safety_map = build_map(job.model, job.base, selected, selection)
        write_map(out, safety_map, overwrite=overwrite)
    return safety_map


def _name_objective(settings: ScoreSettings) -> str:
    if settings.guard:
        return "guard"
    return "classifier" if settings.classifier else "reference"


def sample_rows(settings: ScoreSettings) -> list[Row]:
    """Draw the harmful requests that a model is scored with."""
    return _sample(with_refusals(read_rows(settings.harmful)), settings)


def _sample(rows: list[Row], settings: ScoreSettings) -> list[Row]:
    return random.Random(settings.seed).sample(rows, min(settings.examples, len(rows)))


def _count_entries(
    parameters: Mapping[str, nn.Parameter], total: int, settings: ScoreSettings
) -> tuple[int, int]:
    """Count the entries to select, and those to exclude before."""
    eligible = sum(parameter.numel() for parameter in parameters.values())
    excluded = round(settings.contrast_density * total) if settings.contrast else 0
    if settings.contrast and (settings.method is not Method.ESI or excluded < 1):
        raise SelectionError(
            f"--contrast: expected --method esi and a --contrast-density of at least one entry, "
            f"found {settings.method} and {excluded} entries; leave --contrast out, or correct them"
        )
    count, most = round(settings.density * total), eligible - excluded
    if not 1 <= count <= most:
        raise SelectionError(
            f"density: expected 1 to {most} entries of {total} (the eligible ones), "
            f"found {count}; choose a density of at most {most / total:.3f}"
        )
    return count, excluded


class Scoring:
    """One model's scores, streamed into selections; an interrupted one resumes where it stopped."""

    def __init__(self, job: Job, settings: ScoreSettings, work_dir: Path) -> None:
        self._job, self._settings, self._work_dir = job, settings, work_dir
        self._parameters = eligible_parameters(job.model)

    def select(
        self,
        what: str,
        objective: SafetyObjective,
        count: int,
        kind: Score = SCORES[Method.ESI],
        excluded: Mapping[str, Array] = MappingProxyType({}),
    ) -> dict[str, Selected]:
        """Score all entries pass by pass, and keep the first."""
        passes = split_by_layer(self._parameters, self._settings.layers_per_pass)
        best, path = TopK(count, kind.order), self._work_dir / f"{what}.safetensors"
        arrays = load_arrays(path) or {"passes": np.zeros(1, np.int64)}
        done = int(arrays.pop("passes")[0])
        if done:
            best.restore(arrays)
        with self._job.steps(f"Scoring {what}", len(objective) * len(passes)) as reach:
            for number in range(done, len(passes)):
                group = {name: self._parameters[name] for name in passes[number]}
                gradients = self._sum_gradients(what, group, objective, number, reach)
                for name, scores in score_entries(kind, group, gradients, self._settings.seed):
                    best.add(name, scores, excluded.get(name))
                del gradients
                save_arrays(path, best.state() | {"passes": np.array([number + 1])})
                self._gradients_path(what, number).unlink(missing_ok=True)
        selected = best.result()
        if kind.order is Order.TOP and not any(each.scores.any() for each in selected.values()):
            raise SelectionError(
                f"{what}: expected weights on which it depends, found none: every score is 0; "
                "check the objective and the model"
            )
        return selected

    def _sum_gradients(
        self,
        what: str,
        group: Mapping[str, nn.Parameter],
        objective: SafetyObjective,
        number: int,
        reach: Callable[[int], None],
    ) -> dict[str, torch.Tensor]:
        """Sum one pass's gradients, and save the sum now and then."""
        path, saved_at = self._gradients_path(what, number), time.monotonic()

        def on_term(total: GradientSum) -> None:
            nonlocal saved_at
            reach(number * len(objective) + total.terms)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                arrays = {name: to_numpy(tensor) for name, tensor in total.gradients.items()}
                save_arrays(path, arrays | {"terms": np.array([total.terms])})
                saved_at = time.monotonic()

        saved = None
        if arrays := load_arrays(path):
            gradients = {
                name: torch.from_numpy(arrays[name]).to(parameter.device)
                for name, parameter in group.items()
            }
            saved = GradientSum(gradients, int(arrays["terms"][0]))
        return sum_gradients(
            self._job.model,
            group,
            objective,
            on_term,
            aggregation=self._settings.aggregation,
            resume_from=saved,
        )

    def _gradients_path(self, what: str, number: int) -> Path:
        return self._work_dir / f"{what}-gradients-{number}.safetensors"
