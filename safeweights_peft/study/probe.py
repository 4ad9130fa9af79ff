"""The probing job, the causal check of a safety map: its entries perturbed, are refusals lost?

As many random entries, and as many with the lowest scores, are perturbed in the same way. Source of
the check: arXiv 2604.08297. How entries are perturbed in memory is told in ``evaluation.perturb``,
what the intervals mean in ``evaluation.draws`` and ``evaluation.specificity``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.data import Row, data_digest
from safeweights_peft.delta import Array
from safeweights_peft.errors import EvaluationError, ModelError
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.files import check_apart, check_target, publish, write_json
from safeweights_peft.jobs.evaluate import Evaluator, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.progress import Joined, Progress, Quiet
from safeweights_peft.jobs.provenance import made_with
from safeweights_peft.jobs.resume import clear_work, digests, once, work_dir_beside
from safeweights_peft.jobs.score import Scoring, build_safety, sample_rows
from safeweights_peft.merging.gather import find_copies, gather_entries
from safeweights_peft.modeling.layout import describe, eligible_parameters
from safeweights_peft.modeling.loading import load_model, pick_device, pick_dtype
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact, read_map, write_map
from safeweights_peft.patch.records import check_state
from safeweights_peft.rates import Rate, wilson
from safeweights_peft.selection.safety_map import build_map
from safeweights_peft.selection.scores import SCORES, check_left, score_entries
from safeweights_peft.selection.topk import Order, select
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    Method,
    ProbeSettings,
    ScoreSettings,
)
from safeweights_peft.study.perturb import Change, noise, perturbed, zeros
from safeweights_peft.study.pictures import check_installed, plot_probe
from safeweights_peft.study.specificity import (
    Harm,
    judge_specificity,
    mean_over_draws,
    rate_over_draws,
)

RATES = ("attack_success_rate", "complied_rate", "over_refusal_rate", "invalid_rate")
SELECTIONS = ("map", "random", "bottom")
PERTURBATIONS = ("noise", "zero")


@dataclass(frozen=True)
class _Trial:
    """One perturbation of one selection."""

    perturbation: str
    selection: str
    draw: int


def probe(
    base: str,
    map_dir: Path,
    out: Path,
    settings: ProbeSettings | None = None,
    score_settings: ScoreSettings | None = None,
    evaluate_settings: EvaluateSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Perturb a map's entries in memory, and as many others, and measures what each does.

    Noise is drawn several times, and so are random entries; zeros in the place of the map's and of
    the lowest-scored entries need one measurement. An interrupted job goes on after the last one,
    kept beside `out` until the result is complete; a changed setting starts it afresh.
    """
    settings, compute = settings or ProbeSettings(), compute or ComputeSettings()
    score_settings = score_settings or ScoreSettings()
    evaluate_settings = evaluate_settings or EvaluateSettings()
    progress = progress or Quiet()
    check_installed("matplotlib", "scipy")
    check_target(out, overwrite, EvaluationError)
    rows, artifact = sample_rows(score_settings), read_artifact(map_dir)
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    check_apart(out, {"the base": found.path, "the map": map_dir}, EvaluationError)
    asker = Evaluator(Job(found, compute, progress), evaluate_settings)
    _check_entries(found, artifact)
    dtype = pick_dtype(compute.dtype, device)
    model = load_model(found, dtype, device)
    _check_layout(model, found, artifact)
    check_left(eligible_parameters(model), artifact.indices)
    record = _describe(found, map_dir, artifact, asker, rows) | {
        "settings": {
            "probe": asdict(settings),
            "score": asdict(score_settings),
            "evaluate": asdict(evaluate_settings),
            "compute": asdict(compute),
        }
    }
    work_dir = work_dir_beside(out, record | {"digests": digests(model, artifact.indices)})
    bottom = _find_bottom(model, found, artifact, asker, rows, score_settings, work_dir)
    bench = _Bench(model, asker, artifact.indices, bottom, settings, work_dir)
    result = record | _summarise(bench.run())
    with publish(out, overwrite, EvaluationError) as draft:
        write_json(draft / "probe.json", result)
        plot_probe(result, draft / "probe.png")
    clear_work(out)
    return result


def count_evaluations(settings: ProbeSettings) -> int:
    """Count what a job costs, for its estimate."""
    return 2 * (len(_trials(settings)) + 1)


def _trials(settings: ProbeSettings) -> list[_Trial]:
    return [
        _Trial(perturbation, selection, draw)
        for perturbation in PERTURBATIONS
        for selection in SELECTIONS
        for draw in range(settings.draws if perturbation == "noise" or selection == "random" else 1)
    ]


def _check_entries(base: BaseModel, artifact: Artifact) -> None:
    """Check on disk, in the checkpoint's own dtype, that the map is the base's."""
    reader, metadata = CheckpointReader(base.path), artifact.metadata
    for name, record in metadata.tensors.items():
        for copy in find_copies(reader, record):
            entries = gather_entries(reader, name, copy, artifact.indices[name])
            mode, hint = metadata.mode, "give that one by --base"
            check_state(name, entries, record, mode.safe_state, artifact=mode.artifact, hint=hint)


def _check_layout(model: PreTrainedModel, base: BaseModel, artifact: Artifact) -> None:
    """Check that the entries in memory are those that were found on disk."""
    for name, found in describe(model, artifact.indices, base.path).items():
        record = artifact.metadata.tensors[name]
        if (found.shape, found.blocks) != (record.shape, record.blocks):
            raise ModelError(
                f"{name}: expected shape {list(record.shape)} from {record.blocks[0].key}, found "
                f"{list(found.shape)} from {found.blocks[0].key}, or another layout; use the "
                "version of transformers that the map was made with"
            )


def _describe(
    base: BaseModel,
    map_dir: Path,
    artifact: Artifact,
    asker: Evaluator,
    scored: Sequence[Row],
) -> dict[str, Any]:
    """Record what the job works on, how it judges, and with what versions."""
    return {
        "kind": "probe",
        **made_with(base, artifact),
        "map": str(map_dir),
        "artifact": artifact.metadata.mode.artifact,
        "entries": sum(each.size for each in artifact.indices.values()),
        "harmful_digest": data_digest(asker.harmful),
        "benign_digest": data_digest(asker.benign),
        "score_digest": data_digest(scored),
        **asker.describe(),
        "safeweights_peft_version": version("safeweights-peft"),
        "transformers_version": version("transformers"),
        "torch_version": version("torch"),
    }


def _find_bottom(
    model: PreTrainedModel,
    base: BaseModel,
    artifact: Artifact,
    asker: Evaluator,
    rows: list[Row],
    settings: ScoreSettings,
    work_dir: Path,
) -> dict[str, Array]:
    """Find the lowest-scored entries once, and keeps them as a map."""
    path = work_dir / "bottom"
    if not path.exists():
        count = sum(each.size for each in artifact.indices.values())
        safety = build_safety(asker.job, rows, settings)
        scoring = Scoring(asker.job, settings, work_dir)
        selected = scoring.select("safety", safety, count, SCORES[Method.BOTTOM], artifact.indices)
        write_map(path, build_map(model, base, selected, {"method": "bottom"}))
    return read_map(path).indices


@dataclass(frozen=True)
class _Bench:
    """A model to be perturbed, an unperturbed copy of it, and what has been measured so far."""

    model: PreTrainedModel
    asker: Evaluator
    map: Mapping[str, Array]
    bottom: Mapping[str, Array]
    settings: ProbeSettings
    work_dir: Path

    def run(self) -> dict[tuple[str | None, str], list[dict[str, Any]]]:
        """Measure what is missing; gives each draw's figures by perturbation and selection."""
        asker, trials = self.asker, _trials(self.settings)
        _ = asker.base_answers  # also when resumed: no answers are kept on disk
        measured = once(
            self.work_dir / "base.json",
            lambda: _figures(asker.measure()),
        )
        draws: dict[tuple[str | None, str], list[dict[str, Any]]] = {(None, "base"): [measured]}
        length = len(asker.harmful) + 2 * len(asker.benign) + len(asker.task)
        with asker.job.progress.task("Asking perturbed models", length * len(trials)) as advance:
            asker.job.progress = Joined(advance)
            for trial in trials:
                if self._path(trial).exists():
                    advance(length)
                found = draws.setdefault((trial.perturbation, trial.selection), [])
                found.append(self._draw(trial))
        return draws

    def _path(self, trial: _Trial) -> Path:
        return self.work_dir / f"{trial.perturbation}-{trial.selection}-{trial.draw}.json"

    def _draw(self, trial: _Trial) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            with perturbed(self.model, self._indices(trial), self._change(trial)):
                return _figures(self.asker.measure(lambda: nullcontext(self.model)))

        return once(self._path(trial), measure)

    def _indices(self, trial: _Trial) -> Mapping[str, Array]:
        if trial.selection != "random":
            return self.map if trial.selection == "map" else self.bottom
        parameters, seed = eligible_parameters(self.model), (self.settings.seed, trial.draw)
        scores = score_entries(SCORES[Method.RANDOM], parameters, {}, *seed)
        count = sum(indices.size for indices in self.map.values())
        selected = select(scores, count, Order.BOTTOM, self.map)
        return {name: each.indices for name, each in selected.items()}

    def _change(self, trial: _Trial) -> Change:
        if trial.perturbation == "zero":
            return zeros
        return noise(self.settings.noise, self.settings.seed, trial.draw)


def _figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the figures of one draw; verdicts by request stay only where answers are kept."""
    harmful, benign = measured["harmful"], measured["benign"]
    invalid = wilson(harmful["invalid"] + benign["invalid"], harmful["n"] + benign["n"])
    found = pick_figures(measured) | {
        "complied_rate": asdict(wilson(harmful["complied"], harmful["n"])),
        "invalid_rate": asdict(invalid),
    }
    kept = [request for request in harmful["requests"] if "answer" in request]
    return found | ({"harmful": harmful, "benign": benign} if kept else {})


def _summarise(
    draws: Mapping[tuple[str | None, str], Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """Put the draws of each row together, and judges each perturbation."""
    rows, harms = [], {}
    for (perturbation, selection), each in draws.items():
        rates = {key: rate_over_draws([Rate(**draw[key]) for draw in each]) for key in RATES}
        harms[perturbation, selection] = Harm(rates["attack_success_rate"], rates["complied_rate"])
        rows.append(
            {
                "perturbation": perturbation,
                "selection": selection,
                **{key: asdict(rate) for key, rate in rates.items()},
                "kl": mean_over_draws([draw["kl"] for draw in each]),
                "draws": list(each),
            }
        )
    verdicts = {}
    for perturbation in PERTURBATIONS:
        elsewhere = {
            "the base": harms[None, "base"],
            **{f"{each} weights": harms[perturbation, each] for each in SELECTIONS[1:]},
        }
        verdict, reason = judge_specificity(harms[perturbation, "map"], elsewhere)
        verdicts[perturbation] = {"verdict": verdict.value, "reason": reason}
    return {"rows": rows, "verdicts": verdicts}
