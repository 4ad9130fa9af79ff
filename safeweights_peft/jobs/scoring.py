"""Scores of a model's entries, pass by pass, into a selection; an interrupted one resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from safeweights_peft.data import Example
from safeweights_peft.delta import Array
from safeweights_peft.errors import SelectionError
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.work import load_arrays, save_arrays
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.selection.fisher import SquareSum, average, damp, sum_squares
from safeweights_peft.selection.groups import make_ranking
from safeweights_peft.selection.objective import SafetyObjective
from safeweights_peft.selection.scores import (
    SCORES,
    GradientSum,
    Score,
    score_entries,
    split_by_layer,
    sum_gradients,
)
from safeweights_peft.selection.topk import Order, Selected
from safeweights_peft.settings import Granularity, Method, ScoreSettings

SAVE_SECONDS = 60  # between saves of a sum, which is as large as the weights of a pass


class Scoring:
    """Scores of one model's entries, streamed into selections; an interrupted one resumes."""

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
        granularity: Granularity = Granularity.ENTRY,
        benign: Sequence[Example] = (),
    ) -> dict[str, Selected]:
        """Score all entries pass by pass, and keep the first `count`; answers tell their harm."""
        passes = split_by_layer(self._parameters, self._settings.layers_per_pass)
        eligible = sum(map(torch.numel, self._parameters.values()))
        best = make_ranking(count, eligible, granularity, kind.order)
        path, units = self._work_dir / f"{what}.safetensors", len(objective) + len(benign)
        arrays = load_arrays(path) or {"passes": np.zeros(1, np.int64), "mean": np.zeros(1)}
        done, mean = int(arrays.pop("passes")[0]), float(arrays.pop("mean")[0])
        if done:
            best.restore(arrays)
        with self._job.steps(f"Score {what}", units * len(passes)) as reach:
            for number in range(done, len(passes)):
                group = {name: self._parameters[name] for name in passes[number]}
                paths = [
                    self._work_dir / f"{what}-{kind_}-{number}.safetensors"
                    for kind_ in ("gradients", "squares")
                ]
                first = number * units
                gradients = self._sum_gradients(group, objective, paths[0], reach, first)
                harms: dict[str, torch.Tensor] = {}
                if benign:
                    first += len(objective)
                    harms, mean = self._measure_harm(group, benign, paths[1], reach, first, mean)
                for name, scores in score_entries(
                    kind, group, gradients, self._settings.seed, harms=harms
                ):
                    best.add(name, scores, excluded.get(name))
                # The next pass's sums are as large: two would not fit where one just does.
                del gradients, harms
                state = {"passes": np.array([number + 1]), "mean": np.array([mean])}
                save_arrays(path, best.state() | state)
                for sum_path in paths:
                    sum_path.unlink(missing_ok=True)
        selected = best.result()
        if kind.order is Order.TOP and not any(part.scores.any() for part in selected.values()):
            raise SelectionError(
                f"{what}: expected weights on which it depends, found none: every score is 0; "
                "check the objective and the model"
            )
        return selected

    def _sum_gradients(
        self,
        group: Mapping[str, torch.nn.Parameter],
        objective: SafetyObjective,
        path: Path,
        reach: Callable[[int], None],
        first: int,
    ) -> dict[str, torch.Tensor]:
        """Sum one pass's gradients; save the sum now and then, and resume from what was saved."""
        saved = None
        if arrays := load_arrays(path):
            saved = GradientSum(_to_torch(arrays, group), int(arrays["terms"][0]))
        save = _Saving(path)

        def on_term(total: GradientSum) -> None:
            reach(first + total.terms)
            save(total.gradients, terms=total.terms)

        return sum_gradients(
            self._job.model,
            group,
            objective,
            on_term,
            aggregation=self._settings.aggregation,
            resume_from=saved,
        )

    def _measure_harm(
        self,
        group: Mapping[str, torch.nn.Parameter],
        benign: Sequence[Example],
        path: Path,
        reach: Callable[[int], None],
        first: int,
        mean: float,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Measure one pass's damped Fisher information, and its mean over all entries, once."""
        # The first pass reads the gradients of all parameters, of which it keeps its own alone:
        # so that the mean is there before a score needs it, and the same in any number of passes.
        watched = {} if mean else self._parameters
        saved = None
        if arrays := load_arrays(path):
            totals = {name: arrays[f"{name}/total"] for name in watched}
            saved = SquareSum(
                _to_torch(arrays, group),
                {
                    name: torch.from_numpy(totals[name]).to(parameter.device)
                    for name, parameter in watched.items()
                },
                int(arrays["rows"][0]),
            )
        save = _Saving(path)

        def on_row(total: SquareSum) -> None:
            reach(first + total.rows)
            totals = {f"{name}/total": scalar for name, scalar in total.totals.items()}
            save(total.squares | totals, rows=total.rows)

        found = sum_squares(self._job.model, group, watched, benign, on_row, resume_from=saved)
        if watched:
            entries = sum(map(torch.numel, watched.values()))
            mean = average(found.totals, entries, found.rows)
        return damp(found.squares, found.rows, mean), mean


class _Saving:
    """Saves sums now and then."""

    def __init__(self, path: Path) -> None:
        self._path, self._saved_at = path, time.monotonic()

    def __call__(self, tensors: Mapping[str, torch.Tensor], **counts: int) -> None:
        """Save tensors and how far they are, if it is time."""
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
            save_arrays(self._path, arrays | {key: np.array([n]) for key, n in counts.items()})
            self._saved_at = time.monotonic()


def _to_torch(
    arrays: Mapping[str, Array], group: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Put each parameter's array beside it."""
    return {
        name: torch.from_numpy(arrays[name]).to(parameter.device)
        for name, parameter in group.items()
    }
