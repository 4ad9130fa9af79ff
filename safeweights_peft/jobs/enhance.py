"""The main job: evaluate, score, train, evaluate again; each step's result on disk for the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeweights_peft.errors import DataError
from safeweights_peft.files import check_apart, check_new, lock, read_json, write_json
from safeweights_peft.hub.results import REPRODUCE
from safeweights_peft.jobs.evaluate import RATES, Evaluator, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.record import record_run
from safeweights_peft.jobs.score import check_base, read_inputs, requests_of, score
from safeweights_peft.jobs.sweep import describe, measure_scales, pick_scale
from safeweights_peft.jobs.train import read_requests, train
from safeweights_peft.jobs.work import find_work, once
from safeweights_peft.patch.artifacts import StoredPatch
from safeweights_peft.patch.io import inspect, read_patch
from safeweights_peft.progress import Progress
from safeweights_peft.rates import find_outcome
from safeweights_peft.schema import find_older, flatten, to_json
from safeweights_peft.settings import ComputeSettings, RunSettings, ScoreSettings, TrainSettings
from safeweights_peft.sources import Row

SAMPLES = 5  # answers of each kind that a result shows
_RESULTS = ("before.json", "map", "patch", "after.json", "sweep.json", REPRODUCE, "result.json")
# What depends on the settings of one job alone; all results do on the others.
_MADE_WITH = {
    "score": _RESULTS[1:],
    "train": _RESULTS[2:],
    "evaluate": ("before.json", *_RESULTS[3:]),
}


def enhance(
    settings: RunSettings,
    out: Path,
    progress: Progress | None = None,
    max_asr: float | None = None,
    job: Job | None = None,
) -> dict[str, Any]:
    """Make a model safer, and measure what that does; resume a run with the same settings.

    With `max_asr` the patch stays as it was trained, and the result names the smallest scale at
    which the ASR is at most that.
    """
    # Each step leaves its result in the run's directory, and is not run again if that is there.
    job = job or Job(settings.base, settings.compute, progress)
    evaluator = Evaluator(job, settings.evaluate, samples=SAMPLES)
    results = ("result.json", *(["sweep.json"] if max_asr is not None else []))
    learned = _check(job, evaluator, settings, out, results)
    with lock(out, DataError):
        _claim(out, settings, job)
        evaluator.note_shared(learned)
        return _run(job, evaluator, settings, out, max_asr)


def _run(
    job: Job, evaluator: Evaluator, settings: RunSettings, out: Path, max_asr: float | None
) -> dict[str, Any]:
    stages = iter(range(1, 6))

    def note(text: str) -> None:
        job.progress.note(f"[{next(stages)}/{4 if max_asr is None else 5}] {text}")

    note("Evaluate the base")
    before = once(out / "before.json", evaluator.evaluate)
    map_dir, patch_dir = out / "map", out / "patch"
    note("Score its weights")
    if not map_dir.exists():
        score(job, map_dir, settings.score)
    note("Train the selected weights")
    if not patch_dir.exists():
        train(job, map_dir, patch_dir, settings.train)
    note("Evaluate the patched model")
    patch = read_patch(patch_dir)
    content_id = patch.metadata.content_id
    after = once(out / "after.json", lambda: evaluator.evaluate(patch_dir, patch))
    _check_content(after, content_id, out / "after.json")
    figures = {"before": pick_figures(before), "after": pick_figures(after)}
    recorded = once(
        out / REPRODUCE, lambda: asdict(record_run(settings, job, patch.metadata, **figures))
    )
    _check_content(recorded, content_id, out / REPRODUCE)
    content, chosen, swept = inspect(patch_dir), figures["after"], None
    if max_asr is not None:
        note("Evaluate the patch at other scales")
        swept = once(out / "sweep.json", lambda: _sweep(evaluator, patch_dir, patch, **figures))
        _check_content(swept, content_id, out / "sweep.json")
        scale = pick_scale(swept["rows"], max_asr, None)
        # Where the base is safe enough, the question is still what the patch does.
        chosen = next((row for row in swept["rows"] if scale and row["scale"] == scale), chosen)
        swept = {"max_asr": max_asr, "scale": scale, "rows": swept["rows"]}
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
        "sweep": swept,
        "outcome": find_outcome(figures["before"], chosen)._asdict(),
        "answers": _pair_samples(before, after),
        "settings": to_json(settings),
    }
    write_json(out / "result.json", result)
    return result


def _sweep(
    evaluator: Evaluator,
    patch_dir: Path,
    patch: StoredPatch,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure a run's patch at the scales at which it hasn't been measured."""
    job, named = evaluator.job, str(patch_dir)
    record = job.record("sweep", patch, evaluator.settings, adapter=named, **describe(evaluator))
    with job.work(patch_dir.with_name("sweep.json"), record) as work_dir:
        rows = measure_scales(evaluator, patch_dir, patch, work_dir, {0.0: before, 1.0: after})
    return {**record, "rows": rows}


def _pair_samples(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Set the samples of both evaluations side by side."""

    def show(sample: Mapping[str, str]) -> dict[str, str]:
        return {"verdict": sample["verdict"], "answer": sample["answer"]}

    return {
        kind: [
            {"request": was["request"], "before": show(was), "after": show(now)}
            # A run of an earlier version may lack those before.
            for was, now in zip(*(stage[kind].get("samples", ()) for stage in (before, after)))  # noqa: B905
        ]
        for kind in RATES
    }


def _check(
    job: Job, evaluator: Evaluator, settings: RunSettings, out: Path, results: Sequence[str]
) -> list[Row]:
    """Refuse now what a step would refuse hours later; return the requests to learn from."""
    inputs, (harmful, benign) = read_inputs(settings.score), read_requests(settings.train)
    _compare(out, settings)
    if all(
        (out / name).exists() for name in results
    ):  # a finished run is shown again even where its base is gone
        return []
    places = {f"the judge {judge.name}": judge.path for judge in inputs.judges}
    check_apart(out, {"the base": job.base.path, **places}, DataError)
    evaluator.check()
    requests, answered = requests_of(settings.score, inputs)
    job.check([*requests, *benign], [*answered, *harmful])
    check_base(job, settings.score)
    job.check_exact(job.layout.values())
    return [*inputs.harmful, *inputs.benign, *harmful, *benign]


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
    # A run that is older than a setting was made without it.
    older = {"score": find_older(ScoreSettings), "train": find_older(TrainSettings)}
    defaults = flatten({"compute": to_json(ComputeSettings()), **older})
    recorded, given = defaults | _read_settings(out), flatten(settings)
    changed = [
        f"{key} ({recorded.get(key)} there, {given.get(key)} here)"
        for key in sorted(recorded.keys() | given.keys())
        if recorded.get(key) != given.get(key)
        and any(
            (out / name).exists() or find_work(out / name)  # a step that was interrupted
            for name in _MADE_WITH.get(key.split(".")[0], _RESULTS)
        )
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise DataError(
            f"{out}: expected a run with these settings, found one with other "
            f"{', '.join(changed[:5])}{more}; the same command as then resumes it, another --out "
            "or deleting that directory starts anew"
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
