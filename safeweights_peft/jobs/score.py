"""The scoring job: from a base model and harmful requests to a safety map on disk."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from safeweights_peft.data import Row, data_digest, read_rows, with_refusals
from safeweights_peft.delta import Array
from safeweights_peft.errors import FormatError, SelectionError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.files import check_apart, check_target
from safeweights_peft.jobs.objectives import (
    check_judges,
    judges_of,
    safety_objective,
    utility_objective,
)
from safeweights_peft.jobs.progress import Progress, Quiet, advance_to
from safeweights_peft.jobs.resume import (
    clear_work,
    digests,
    files_of,
    load_arrays,
    save_arrays,
    work_dir_beside,
)
from safeweights_peft.modeling.layout import eligible_parameters, total_parameters
from safeweights_peft.modeling.loading import load_model, load_tokenizer, pick_device, pick_dtype
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
from safeweights_peft.settings import ComputeSettings, Method, ScoreSettings

SAVE_SECONDS = 60
"""The sum of gradients is left on disk this often; it is as large as the scored weights."""


def score(
    base: str,
    out: Path,
    settings: ScoreSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> SafetyMap:
    """Select the entries that carry safety and writes them as a safety map."""
    settings, compute = settings or ScoreSettings(), compute or ComputeSettings()
    started = time.perf_counter()
    check_target(out, overwrite, FormatError)
    rows = sample_rows(settings)
    benign = _sample(read_rows(settings.contrast), settings) if settings.contrast else []
    check_judges(settings)
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    judges = judges_of(settings)
    inputs = {"the base": found.path} | {f"the judge {each.name}": each.path for each in judges}
    check_apart(out, inputs, FormatError)
    dtype = pick_dtype(compute.dtype, device)
    model, tokenizer = load_model(found, dtype, device), load_tokenizer(found)
    parameters = eligible_parameters(model)
    k, spared = _counts(model, parameters, settings)
    selection = asdict(settings) | {
        "objective": _objective_name(settings),
        "total_parameters": total_parameters(model),
        "data_digest": data_digest(rows),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    identity = (
        selection
        | asdict(compute)
        | {
            "digests": digests(model),
            "files": [files_of(each.path) for each in (found, *judges)],
            "profile": asdict(read_profile(settings.profile)) if settings.profile else None,
            "contrast_digest": data_digest(benign),
        }
    )
    work_dir = work_dir_beside(out, identity)
    scoring = Scoring(model, parameters, settings, work_dir, progress or Quiet())
    kind = SCORES[settings.method]
    if not kind.needs_gradient:
        selected = select(score_entries(kind, parameters, {}, settings.seed), k, kind.order)
    else:
        left_out: dict[str, Array] = {}
        if benign:
            utility = utility_objective(model, tokenizer, benign, settings, scoring.progress)
            useful = scoring.select("usefulness", utility, spared)
            left_out = {name: each.indices for name, each in useful.items()}
        safety = safety_objective(model, tokenizer, rows, settings, dtype, scoring.progress)
        selected = scoring.select("safety", safety, k, kind, left_out)
        if isinstance(safety, JudgedObjective):
            selection["mean_safety"] = safety.mean_safety
    selection["seconds"] = round(time.perf_counter() - started, 1)
    safety_map = build_map(model, found, selected, selection)
    write_map(out, safety_map, overwrite=overwrite)
    clear_work(out)
    return safety_map


def _objective_name(settings: ScoreSettings) -> str | None:
    if not SCORES[settings.method].needs_gradient:
        return None
    if settings.guard:
        return "guard"
    return "classifier" if settings.classifier else "reference"


def sample_rows(settings: ScoreSettings) -> list[Row]:
    """Take the harmful requests that a model is scored with."""
    return _sample(with_refusals(read_rows(settings.harmful)), settings)


def _sample(rows: list[Row], settings: ScoreSettings) -> list[Row]:
    count = min(settings.examples, len(rows))
    return random.Random(settings.seed).sample(rows, count)


def _counts(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: ScoreSettings
) -> tuple[int, int]:
    """How many entries to select, and how many to leave out before."""
    total = total_parameters(model)
    eligible = sum(parameter.numel() for parameter in parameters.values())
    spared = round(settings.contrast_density * total) if settings.contrast else 0
    if settings.contrast and (settings.method is not Method.ESI or spared < 1):
        raise SelectionError(
            f"--contrast: expected --method esi and a --contrast-density of at least one entry, "
            f"found {settings.method} and {spared} entries; leave --contrast out, or correct them"
        )
    k, most = round(settings.density * total), eligible - spared
    if not 1 <= k <= most:
        raise SelectionError(
            f"density: expected 1 to {most} entries of {total} (the eligible ones), "
            f"found {k}; choose a density of at most {most / total:.3f}"
        )
    return k, spared


@dataclass(frozen=True)
class Scoring:
    """One model's scores, streamed into selections; where it was interrupted, it goes on.

    Attributes:
        model: the model to be scored.
        parameters: its eligible parameters by name.
        settings: aggregation, and layers per pass.
        work_dir: where it leaves what it goes on from.
        progress: shown while scoring.
    """

    model: PreTrainedModel
    parameters: Mapping[str, nn.Parameter]
    settings: ScoreSettings
    work_dir: Path
    progress: Progress

    def select(
        self,
        what: str,
        objective: SafetyObjective,
        k: int,
        score: Score = SCORES[Method.ESI],
        left_out: Mapping[str, Array] = MappingProxyType({}),
    ) -> dict[str, Selected]:
        """Score all entries pass by pass, and keeps the k first."""
        passes = split_by_layer(self.parameters, self.settings.layers_per_pass)
        best, kept = TopK(k, score.order), self.work_dir / f"{what}.safetensors"
        arrays = load_arrays(kept) or {"passes": np.zeros(1, np.int64)}
        done = int(arrays.pop("passes")[0])
        if done:
            best.restore(arrays)
        with self.progress.task(f"Scoring {what}", len(objective) * len(passes)) as advance:
            reach = advance_to(advance)
            for number in range(done, len(passes)):
                group = {name: self.parameters[name] for name in passes[number]}
                gradients = self._accumulate(what, group, objective, number, reach)
                for name, scores in score_entries(score, group, gradients, self.settings.seed):
                    best.add(name, scores, left_out.get(name))
                del gradients
                save_arrays(kept, best.state() | {"passes": np.array([number + 1])})
                self._accumulator(what, number).unlink(missing_ok=True)
        selected = best.result()
        if score.order is Order.TOP and not any(each.scores.any() for each in selected.values()):
            raise SelectionError(
                f"{what}: expected weights on which it depends, found none: every score is 0; "
                "check the objective and the model"
            )
        return selected

    def _accumulate(
        self,
        what: str,
        group: Mapping[str, nn.Parameter],
        objective: SafetyObjective,
        number: int,
        reach: Callable[[int], None],
    ) -> dict[str, torch.Tensor]:
        """Sum one pass's gradients, and leaves the sum on disk now and then."""
        path, saved_at = self._accumulator(what, number), time.monotonic()

        def on_term(total: GradientSum) -> None:
            nonlocal saved_at
            reach(number * len(objective) + total.terms)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                arrays = {name: to_numpy(each) for name, each in total.gradients.items()}
                save_arrays(path, arrays | {"terms": np.array([total.terms])})
                saved_at = time.monotonic()

        return sum_gradients(
            self.model,
            group,
            objective,
            on_term,
            aggregation=self.settings.aggregation,
            resume_from=self._interrupted(group, path),
        )

    def _interrupted(self, group: Mapping[str, nn.Parameter], path: Path) -> GradientSum | None:
        arrays = load_arrays(path)
        if arrays is None:
            return None
        gradients = {
            name: torch.from_numpy(arrays[name]).to(parameter.device)
            for name, parameter in group.items()
        }
        return GradientSum(gradients, int(arrays["terms"][0]))

    def _accumulator(self, what: str, number: int) -> Path:
        return self.work_dir / f"{what}-gradients-{number}.safetensors"
