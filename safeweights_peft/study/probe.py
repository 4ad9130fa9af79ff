"""The causal check of a safety map: if its entries are perturbed, are refusals lost?

Source: arXiv 2604.08297. As many random entries, and as many of lowest score, are the controls;
of a map of whole rows or columns, the random ones are others of the same matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safeweights_peft.errors import EvaluationError, ModelError
from safeweights_peft.files import publish, write_json
from safeweights_peft.jobs.evaluate import Evaluator, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import build_safety, sample_rows
from safeweights_peft.jobs.scoring import Scoring
from safeweights_peft.jobs.work import load_arrays, once, save_arrays
from safeweights_peft.merging.gather import check_safety
from safeweights_peft.modeling.layout import describe, eligible_parameters
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.groups import count_lines
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.rates import Rate, wilson
from safeweights_peft.schema import to_json
from safeweights_peft.selection.scores import SCORES, check_left
from safeweights_peft.settings import EvaluateSettings, Method, ProbeSettings, ScoreSettings
from safeweights_peft.sources import Row, data_digest
from safeweights_peft.study.controls import Indices, count_entries, draw_control, draw_lines
from safeweights_peft.study.perturb import noise, perturb, zeros
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

Draws = dict[tuple[str | None, str], list[dict[str, Any]]]
"""Figures of each draw, by perturbation and selection; the base's by None and "base"."""


def probe(
    job: Job,
    map_dir: Path,
    out: Path,
    settings: ProbeSettings | None = None,
    score_settings: ScoreSettings | None = None,
    evaluate_settings: EvaluateSettings | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Perturb a map's entries in memory, and as many others, and measure what each does."""
    settings, score_settings = settings or ProbeSettings(), score_settings or ScoreSettings()
    evaluate_settings = evaluate_settings or EvaluateSettings()
    check_installed("matplotlib", "scipy")
    rows, artifact = sample_rows(score_settings), read_artifact(map_dir)
    evaluator = Evaluator(job, evaluate_settings)
    evaluator.check(
        out=out, inputs={"the map": map_dir}, overwrite=overwrite, error=EvaluationError
    )
    check_safety(job.reader, artifact)
    _check_layout(job, artifact)
    check_left(eligible_parameters(job.model), artifact.indices)
    record = job.record(
        "probe",
        artifact,
        map=str(map_dir),
        artifact=artifact.metadata.mode.artifact,
        entries=count_entries(artifact.indices),
        **_count_lines(artifact, settings.seed),
        harmful_digest=data_digest(evaluator.harmful),
        benign_digest=data_digest(evaluator.benign),
        score_digest=data_digest(rows),
        **evaluator.describe(),
        settings={
            "probe": to_json(settings),
            "score": to_json(score_settings),
            "evaluate": to_json(evaluate_settings),
            "compute": to_json(job.compute),
        },
    )
    with job.work(out, record, overwrite) as work_dir:
        bottom = _find_bottom(job, artifact.indices, rows, score_settings, work_dir)
        selections = {"map": artifact.indices, "bottom": bottom}
        with evaluator.keep_judge():
            draws = _measure_draws(evaluator, selections, settings, work_dir)
        result = record | _summarize(draws)
        with publish(out, overwrite, EvaluationError) as draft:
            write_json(draft / "probe.json", result)
            plot_probe(result, draft / "probe.png")
    return result


def _check_layout(job: Job, artifact: Artifact) -> None:
    """Check that the entries in memory are those that were checked on disk."""
    for name, own in describe(job.model, artifact.indices, job.base.path).items():
        record = artifact.metadata.tensors[name]
        if (own.shape, own.blocks) != (record.shape, record.blocks):
            raise ModelError(
                f"{name}: expected shape {list(record.shape)} from {record.blocks[0].key}, found "
                f"{list(own.shape)} from {own.blocks[0].key}, or another layout; use the version "
                "of transformers that the map was made with"
            )


def _count_lines(artifact: Artifact, seed: int) -> dict[str, dict[str, int]]:
    """Count a map's whole rows and columns, and those that each random draw has for them."""
    shapes = {name: record.shape for name, record in artifact.metadata.tensors.items()}
    return {
        "lines": count_lines(shapes, artifact.indices),
        "random_lines": count_lines(shapes, draw_lines(shapes, artifact.indices, seed)),
    }


def _find_bottom(
    job: Job, taken: Indices, rows: list[Row], settings: ScoreSettings, work_dir: Path
) -> Indices:
    """Find the lowest-scored entries beside the map's, once."""
    path = work_dir / "bottom.safetensors"
    indices = load_arrays(path)
    if indices is None:
        safety, kind = build_safety(job, rows, settings), SCORES[Method.BOTTOM]
        scoring = Scoring(job, settings, work_dir)
        selected = scoring.select("safety", safety, count_entries(taken), kind, taken)
        indices = {name: entries.indices for name, entries in selected.items()}
        save_arrays(path, indices)
    return indices


def _measure_draws(
    evaluator: Evaluator, selections: Mapping[str, Indices], settings: ProbeSettings, work_dir: Path
) -> Draws:
    """Measure the base and each draw, unless its figures are there from an interrupted job."""
    trials = [
        (perturbation, selection, draw)
        for perturbation in PERTURBATIONS
        for selection in SELECTIONS
        # Nothing is drawn where zeros replace the map's or the lowest-scored entries.
        for draw in range(settings.draws if perturbation == "noise" or selection == "random" else 1)
    ]
    _ = evaluator.base_answers  # asked for again by a resumed job: no answers are kept on disk
    base = once(work_dir / "base.json", lambda: _pick(evaluator.measure()))
    draws: Draws = {(None, "base"): [base]}
    job, length = evaluator.job, evaluator.count_units()
    with job.joined("Ask perturbed models", length * len(trials)) as reach:
        for number, (perturbation, selection, draw) in enumerate(trials, 1):
            path = work_dir / f"{perturbation}-{selection}-{draw}.json"
            measure = partial(
                _measure, evaluator, selections, settings, perturbation, selection, draw
            )
            draws.setdefault((perturbation, selection), []).append(once(path, measure))
            reach(number * length)
    return draws


def _measure(
    evaluator: Evaluator,
    selections: Mapping[str, Indices],
    settings: ProbeSettings,
    perturbation: str,
    selection: str,
    draw: int,
) -> dict[str, Any]:
    """Measure the model with one selection perturbed."""
    model, seed = evaluator.job.model, (settings.seed, draw)
    if selection == "random":
        indices = draw_control(model, selections["map"], *seed)
    else:
        indices = selections[selection]
    change = zeros if perturbation == "zero" else noise(settings.noise, *seed)
    return _pick(evaluator.measure(perturb(model, indices, change)))


def _pick(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the figures of one draw; verdicts by request stay only where answers are kept."""
    harmful, benign = measured["harmful"], measured["benign"]
    # What was cut in a thought is in no rate.
    judged, harmless = harmful["attack_success_rate"]["n"], benign["over_refusal_rate"]["n"]
    invalid = wilson(harmful["invalid"] + benign["invalid"], judged + harmless)
    figures = pick_figures(measured) | {
        "complied_rate": asdict(wilson(harmful["complied"], judged)),
        "invalid_rate": asdict(invalid),
    }
    has_answers = any("answer" in request for request in harmful["requests"])
    return figures | ({"harmful": harmful, "benign": benign} if has_answers else {})


def _summarize(draws: Draws) -> dict[str, Any]:
    """Pool the draws of each row, and judge each perturbation."""
    rows, harms = [], {}
    for (perturbation, selection), figures in draws.items():
        rates = {key: rate_over_draws([Rate(**draw[key]) for draw in figures]) for key in RATES}
        harms[perturbation, selection] = Harm(rates["attack_success_rate"], rates["complied_rate"])
        rows.append(
            {
                "perturbation": perturbation,
                "selection": selection,
                **{key: asdict(rate) for key, rate in rates.items()},
                "kl": mean_over_draws([draw["kl"] for draw in figures]),
                "draws": figures,
            }
        )
    verdicts = {}
    for perturbation in PERTURBATIONS:
        controls = {f"{name} weights": harms[perturbation, name] for name in SELECTIONS[1:]}
        elsewhere = {"the base": harms[None, "base"], **controls}
        verdict, reason = judge_specificity(harms[perturbation, "map"], elsewhere)
        verdicts[perturbation] = {"verdict": verdict.value, "reason": reason}
    return {"rows": rows, "verdicts": verdicts}
