"""The main job: evaluate, score, train, evaluate again; each step's result on disk for the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeweights_peft.errors import DataError
from safeweights_peft.files import check_apart, check_new, lock, read_json, write_json
from safeweights_peft.hub.results import REPRODUCE
from safeweights_peft.jobs.evaluate import Evaluator, pick_figures
from safeweights_peft.jobs.job import Job, once
from safeweights_peft.jobs.record import record_run
from safeweights_peft.jobs.score import check_base, read_inputs, requests_of, score
from safeweights_peft.jobs.train import read_requests, train
from safeweights_peft.patch.io import inspect, read_patch
from safeweights_peft.progress import Progress
from safeweights_peft.rates import find_outcome
from safeweights_peft.settings import RunSettings, flatten, to_json

_RESULTS = ("before.json", "map", "patch", "after.json", REPRODUCE, "result.json")
# What depends on the settings of one job alone; all results do on the others.
_MADE_WITH = {
    "score": _RESULTS[1:],
    "train": _RESULTS[2:],
    "evaluate": ("before.json", *_RESULTS[3:]),
}


def enhance(settings: RunSettings, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Make a model safer, and measure what that does; resume a run with the same settings."""
    # Each step leaves its result in the run's directory, and is not run again if that is there.
    job = Job(settings.base, settings.compute, progress)
    evaluator = Evaluator(job, settings.evaluate)
    _check(job, evaluator, settings, out)
    with lock(out, DataError):
        return _run(job, evaluator, settings, out)


def _run(job: Job, evaluator: Evaluator, settings: RunSettings, out: Path) -> dict[str, Any]:
    _claim(out, settings, job)
    note = job.progress.note
    note("[1/4] Evaluate the base")
    before = once(out / "before.json", evaluator.evaluate)
    map_dir, patch_dir = out / "map", out / "patch"
    note("[2/4] Score its weights")
    if not map_dir.exists():
        score(job, map_dir, settings.score)
    note("[3/4] Train the selected weights")
    if not patch_dir.exists():
        train(job, map_dir, patch_dir, settings.train)
    note("[4/4] Evaluate the patched model")
    patch = read_patch(patch_dir)
    content_id = patch.metadata.content_id
    after = once(out / "after.json", lambda: evaluator.evaluate(patch_dir, patch))
    _check_content(after, content_id, out / "after.json")
    figures = {"before": pick_figures(before), "after": pick_figures(after)}
    recorded = once(
        out / REPRODUCE, lambda: asdict(record_run(settings, job, patch.metadata, **figures))
    )
    _check_content(recorded, content_id, out / REPRODUCE)
    content = inspect(patch_dir)
    result = {
        "kind": "enhancement",
        "base": before["base"],
        "content_id": content_id,
        "patch": {
            "path": str(patch_dir),
            "entries": content["entries"],
            "share_of_weights": content["entries"] / content["selection"]["total_parameters"],
            "size_bytes": content["size_bytes"],
        },
        **figures,
        "outcome": find_outcome(**figures)._asdict(),
        "settings": to_json(settings),
    }
    write_json(out / "result.json", result)
    return result


def _check(job: Job, evaluator: Evaluator, settings: RunSettings, out: Path) -> None:
    """Refuse now what a step would refuse hours later."""
    inputs, (harmful, benign) = read_inputs(settings.score), read_requests(settings.train)
    _compare(out, settings)
    if (out / "result.json").exists():  # a finished run is shown again even where its base is gone
        return
    places = {f"the judge {judge.name}": judge.path for judge in inputs.judges}
    check_apart(out, {"the base": job.base.path, **places}, DataError)
    evaluator.check()
    requests, answered = requests_of(settings.score, inputs)
    job.check([*requests, *(row.instruction for row in benign)], [*answered, *harmful])
    check_base(job, settings.score)
    job.check_exact(job.layout.values())


def _claim(out: Path, settings: RunSettings, job: Job) -> None:
    """Make the run's directory, or check that a run with the same settings made it."""
    _compare(out, settings)
    if not (out / "before.json").exists():
        _ = job.model  # a base that can't be loaded leaves no claimed directory
    if not (out / "settings.json").exists() or _read_settings(out) != flatten(settings):
        write_json(out / "settings.json", asdict(settings))


def _compare(out: Path, settings: RunSettings) -> None:
    """Refuse a directory with results that were made with other settings, or with other files."""
    check_new(out, DataError)
    if not (out / "settings.json").exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(
                f"{out}: expected a run, an empty directory or nothing, found something else; "
                "give another --out"
            )
        return
    recorded, given = _read_settings(out), flatten(settings)
    changed = [
        f"{key} ({recorded.get(key)} there, {given.get(key)} here)"
        for key in sorted(recorded.keys() | given.keys())
        if recorded.get(key) != given.get(key)
        and any((out / name).exists() for name in _MADE_WITH.get(key.split(".")[0], _RESULTS))
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise DataError(
            f"{out}: expected a run with these settings, found one with other "
            f"{', '.join(changed[:5])}{more}; give another --out, or delete that directory"
        )


def _read_settings(out: Path) -> dict[str, Any]:
    hint = "delete the directory, or give another --out"
    return flatten(read_json(out / "settings.json", DataError, hint))


def _check_content(record: Mapping[str, Any], content_id: str | None, source: Path) -> None:
    """Check that a result on disk was made with the patch as it now is."""
    if record.get("content_id") != content_id:
        raise DataError(
            f"{source}: expected a result for the patch with content id {content_id}, found one "
            f"for {record.get('content_id')}; delete it, and it is made again"
        )
