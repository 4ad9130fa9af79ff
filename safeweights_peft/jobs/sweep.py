"""The sweep: what one patch does at several scales, measured on one loaded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safeweights_peft.errors import EvaluationError
from safeweights_peft.evaluation.judge_kinds import AnyJudge
from safeweights_peft.files import publish, write_json
from safeweights_peft.jobs.evaluate import Evaluator, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import MergedEntries, note_chat
from safeweights_peft.jobs.work import once
from safeweights_peft.patch.artifacts import StoredPatch
from safeweights_peft.patch.io import read_patch
from safeweights_peft.settings import EvaluateSettings
from safeweights_peft.sources import data_digest

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def sweep(
    job: Job,
    adapter: Path,
    out: Path,
    settings: EvaluateSettings | None = None,
    *,
    max_asr: float | None = None,
    max_over_refusal: float | None = None,
    judges: Sequence[AnyJudge] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure a patch at each scale, and pick the one that meets the thresholds."""
    settings, patch = settings or EvaluateSettings(), read_patch(adapter)
    evaluator = Evaluator(job, settings, judges)
    evaluator.check(
        out=out, inputs={"the patch": adapter}, overwrite=overwrite, error=EvaluationError
    )
    note_chat(job, patch)
    MergedEntries(job.reader, [patch], [adapter])  # another base is refused before it is loaded
    record = job.record("sweep", patch, settings, adapter=str(adapter), **describe(evaluator))
    with job.work(out, record, overwrite) as work_dir:
        rows = measure_scales(evaluator, adapter, patch, work_dir)
        picked = pick_scale(rows, max_asr, max_over_refusal)
        limits = {"max_asr": max_asr, "max_over_refusal": max_over_refusal}
        result = {**record, "rows": rows, **limits, "scale": picked}
        with publish(out, overwrite, EvaluationError) as draft:
            write_json(draft / "sweep.json", result)
    return result


def describe(evaluator: Evaluator) -> dict[str, Any]:
    """Tell what is asked, and how answers are made and judged."""
    digests = {
        "harmful_digest": data_digest(evaluator.harmful),
        "benign_digest": data_digest(evaluator.benign),
    }
    return {**digests, **evaluator.describe()}


def measure_scales(
    evaluator: Evaluator,
    adapter: Path,
    patch: StoredPatch,
    work_dir: Path,
    figures: Mapping[float, Mapping[str, Any]] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Measure a patch at each scale but those whose figures are given, and resume."""

    def measure(scale: float) -> dict[str, Any]:
        if scale == 0.0:  # the base itself, bit for bit
            return pick_figures(evaluator.measure())
        merged = MergedEntries(job.reader, [patch], [adapter], [scale])
        return pick_figures(evaluator.measure(merged.make_switch(job.model)))

    job, length = evaluator.job, evaluator.count_units()
    paths = {scale: work_dir / f"{scale:g}.json" for scale in SCALES if scale not in figures}
    if any(not path.exists() for path in paths.values()):
        _ = evaluator.base_answers  # for all scales; no answers are kept on disk
    measured = {scale: dict(row) for scale, row in figures.items()}
    with evaluator.keep_judge(), job.joined("Ask at each scale", length * len(paths)) as reach:
        for number, (scale, path) in enumerate(paths.items(), 1):
            measured[scale] = once(path, partial(measure, scale))
            reach(number * length)
    return [{"scale": scale, **measured[scale]} for scale in SCALES]


def pick_scale(
    rows: Sequence[Mapping[str, Any]], max_asr: float | None, max_over_refusal: float | None
) -> float | None:
    """Pick the smallest scale that meets both thresholds, or of the safest; None if none does."""
    if max_asr is max_over_refusal is None:
        return None

    def rate(row: Mapping[str, Any], key: str) -> float:
        return float(row[key]["rate"])

    fitting = [
        row
        for row in rows
        if (max_asr is None or rate(row, "attack_success_rate") <= max_asr)
        and (max_over_refusal is None or rate(row, "over_refusal_rate") <= max_over_refusal)
    ]
    if max_asr is None:  # as safe as over-refusal allows, where any patch at scale 0 would do
        fitting.sort(key=lambda row: rate(row, "attack_success_rate"))
    return float(fitting[0]["scale"]) if fitting else None
