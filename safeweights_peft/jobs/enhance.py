"""The main job: evaluate, score, train, evaluate again; each step's result on disk for the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeweights_peft.data import read_rows
from safeweights_peft.errors import DataError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.files import read_json, write_json
from safeweights_peft.hub.results import REPRODUCE
from safeweights_peft.jobs.evaluate import Evaluator, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.progress import Progress
from safeweights_peft.jobs.provenance import check_made_with
from safeweights_peft.jobs.record import record_run
from safeweights_peft.jobs.resume import once
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.train import train
from safeweights_peft.patch.io import inspect
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)


def enhance_model(
    base: str,
    out: Path,
    score_settings: ScoreSettings | None = None,
    train_settings: TrainSettings | None = None,
    evaluate_settings: EvaluateSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a model safer and measures what that did.

    Each step leaves its result in `out`: ``before.json``, ``map/``, ``patch/``, ``after.json``,
    ``reproduce.json``, ``result.json``. A step whose result is there is not run again, so an
    interrupted job goes on where it stopped when it is called again with the same settings.
    """
    score_settings = score_settings or ScoreSettings()
    train_settings = train_settings or TrainSettings()
    evaluate_settings = evaluate_settings or EvaluateSettings()
    compute = compute or ComputeSettings()
    told = RunSettings(base, score_settings, train_settings, evaluate_settings, compute)
    settings = asdict(told)
    _check_inputs(base, score_settings, train_settings, compute)
    evaluator = Evaluator(Job(base, compute, progress), evaluate_settings)
    _claim(out, settings)

    patch = out / "patch"
    before = once(out / "before.json", lambda: evaluator.evaluate())
    if not (out / "map").exists():
        score(base, out / "map", score_settings, compute, progress)
    if not patch.exists():
        train(base, out / "map", patch, train_settings, compute, progress)
    after = once(out / "after.json", lambda: evaluator.evaluate(patch))
    check_made_with(after, patch, out / "after.json")
    result = summarise(patch, before, after) | {"settings": settings}
    recorded = once(
        out / REPRODUCE,
        lambda: asdict(record_run(told, patch, result["before"], result["after"])),
    )
    check_made_with(recorded, patch, out / REPRODUCE)
    write_json(out / "result.json", result)
    return result


def summarise(patch: Path, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Set a patch's evaluations side by side."""
    content = inspect(patch)
    total = content["selection"]["total_parameters"]
    return {
        "kind": "enhancement",
        "base": before["base"],
        "content_id": after["content_id"],
        "patch": {
            "path": str(patch),
            "entries": content["entries"],
            "share_of_weights": content["entries"] / total,
            "size_bytes": content["size_bytes"],
        },
        "before": pick_figures(before),
        "after": pick_figures(after),
    }


def _check_inputs(
    base: str,
    score: ScoreSettings,
    train: TrainSettings,
    compute: ComputeSettings,
) -> None:
    """Find out now, not hours later, that the base or a source of requests is missing."""
    resolve_base(base, compute.revision)
    for source in dict.fromkeys((score.harmful, train.harmful, train.benign)):
        read_rows(source)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the run's directory, or finds it made by a run with the same settings."""
    path = out / "settings.json"
    if path.exists():
        found, wanted = _flatten(read_json(path, DataError)), _flatten(settings)
        changed = [
            f"{key} ({found.get(key)} there, {wanted.get(key)} here)"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
        ]
        if changed:
            raise DataError(
                f"{out}: expected a run with these settings, found one with other "
                f"{', '.join(changed)}; give another --out, or delete that directory"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out}: expected a run, an empty directory or nothing, found something else; "
            "give another --out"
        )
    else:
        write_json(path, settings)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested settings by their path, such as ``score.density``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
