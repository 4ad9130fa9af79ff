"""The main job: evaluate, score, train, evaluate again; each step's result on disk for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
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
ORIGIN_FILE = "repair.json"  # what a run starts from beside its settings
MODEL = "model"  # what a repair merged before all else
Steps = Mapping[str, tuple[str, Callable[[Path], object]]]
"""What makes a run's map and patch, in order and by name, each with what is said of it."""

_OTHER_OUT = "delete the directory, or give another --out"
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_RESULTS = ("before.json", "map", "patch", "after.json", "sweep.json", REPRODUCE, "result.json")
# What depends on the settings of one job alone; all results do on the others.
_MADE_WITH = {
    "score": _RESULTS[1:],
    "train": _RESULTS[2:],
    "evaluate": ("before.json", *_RESULTS[3:]),
    "repair": _RESULTS[1:],
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
    compare(out, settings)
    if all((out / name).exists() for name in results):
        learned = []  # a finished run is shown again even where its base is gone
    else:
        learned = check_run(job, evaluator, settings, out)
    with lock(out, DataError):
        claim(out, settings, lambda: load_first(job, out))
        evaluator.note_shared(learned)
        return _run(job, evaluator, settings, out, max_asr)


def load_first(job: Job, out: Path) -> None:
    """Load a base before a run is claimed: one that can't be loaded leaves no directory."""
    if not (out / "before.json").exists():
        _ = job.model


def _run(
    job: Job, evaluator: Evaluator, settings: RunSettings, out: Path, max_asr: float | None
) -> dict[str, Any]:
    steps: Steps = {
        "map": ("Score its weights", lambda path: score(job, path, settings.score)),
        "patch": (
            "Train the selected weights",
            lambda path: train(job, out / "map", path, settings.train),
        ),
    }
    note = number_stages(job, 4 if max_asr is None else 5)
    before, after, patch = make_patch(evaluator, out, steps, note)
    figures = {"before": pick_figures(before), "after": pick_figures(after)}
    recorded = once(
        out / REPRODUCE, lambda: asdict(record_run(settings, job, patch.metadata, **figures))
    )
    _check_content(recorded, patch.metadata.content_id, out / REPRODUCE)
    chosen, swept = figures["after"], None
    if max_asr is not None:
        note("Evaluate the patch at other scales")
        swept = once(out / "sweep.json", lambda: _sweep(evaluator, out / "patch", patch, **figures))
        _check_content(swept, patch.metadata.content_id, out / "sweep.json")
        scale = pick_scale(swept["rows"], max_asr, None)
        # Where the base is safe enough, the question is still what the patch does.
        chosen = next((row for row in swept["rows"] if scale and row["scale"] == scale), chosen)
        swept = {"max_asr": max_asr, "scale": scale, "rows": swept["rows"]}
    return write_result(out, "enhancement", settings, before, after, chosen, sweep=swept)


def number_stages(job: Job, total: int) -> Callable[[str], None]:
    """Make what tells of a run's stages, and which of how many each is."""
    numbers: Iterator[int] = iter(range(1, total + 1))
    return lambda text: job.progress.note(f"[{next(numbers)}/{total}] {text}")


def make_patch(
    evaluator: Evaluator,
    out: Path,
    steps: Steps,
    note: Callable[[str], None],
    base: str = "base",
) -> tuple[dict[str, Any], dict[str, Any], StoredPatch]:
    """Do what isn't done yet: evaluate a base, make its patch, evaluate both together."""
    note(f"Evaluate the {base}")
    before = once(out / "before.json", evaluator.evaluate)
    for name, (title, make) in steps.items():
        note(title)
        if not (out / name).exists():
            make(out / name)
    note("Evaluate the patched model")
    patch = read_patch(out / "patch")
    after = once(out / "after.json", lambda: evaluator.evaluate(out / "patch", patch))
    _check_content(after, patch.metadata.content_id, out / "after.json")
    return before, after, patch


def write_result(
    out: Path,
    kind: str,
    settings: RunSettings,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    chosen: Mapping[str, Any] | None = None,
    **content: Any,
) -> dict[str, Any]:
    """Sum a run up; what came of it is told by the figures that were chosen, or those after."""
    patch = inspect(out / "patch")
    figures = {"before": pick_figures(before), "after": pick_figures(after)}
    result = {
        "kind": kind,
        "base": before["base"],
        "content_id": after["content_id"],
        "patch": {
            "path": str(out / "patch"),
            "entries": patch["entries"],
            "share_of_weights": patch["entries"] / patch["selection"]["total_parameters"],
            "size_bytes": patch["size_bytes"],
        },
        **figures,
        **content,
        "outcome": find_outcome(figures["before"], chosen or figures["after"])._asdict(),
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


def check_run(
    job: Job,
    evaluator: Evaluator,
    settings: RunSettings,
    out: Path,
    places: Mapping[str, Path] = _NOTHING,
    *,
    scores: bool = True,
    trains: bool = True,
) -> list[Row]:
    """Refuse now what a step would refuse hours later; return the requests to learn from."""
    harmful, benign = read_requests(settings.train) if trains else ([], [])
    learned, requests, answered = [*harmful, *benign], benign, harmful
    if scores:
        inputs = read_inputs(settings.score)
        learned = [*inputs.harmful, *inputs.benign, *learned]
        places = {**places} | {f"the judge {judge.name}": judge.path for judge in inputs.judges}
        asked, read = requests_of(settings.score, inputs)
        requests, answered = [*asked, *requests], [*read, *answered]
    check_apart(out, {"the base": job.base.path, **places}, DataError)
    evaluator.check()
    job.check(requests, answered)
    if scores:
        check_base(job, settings.score)
    if trains:
        job.check_exact(job.layout.values())
    return learned


def claim(
    out: Path,
    settings: RunSettings,
    load: Callable[[], object],
    origin: Mapping[str, Any] = _NOTHING,
) -> None:
    """Make a run's directory once what it needs is loaded, or check that the same run made it."""
    compare(out, settings, origin)
    load()
    if not (out / "settings.json").exists() or _read_settings(out) != flatten(settings):
        write_json(out / "settings.json", asdict(settings))
    if origin:
        write_json(out / ORIGIN_FILE, {**origin})
    else:
        (out / ORIGIN_FILE).unlink(missing_ok=True)


def compare(out: Path, settings: RunSettings, origin: Mapping[str, Any] = _NOTHING) -> None:
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
    recorded, given = defaults | _read_settings(out), flatten(settings) | flatten(origin)
    if (out / ORIGIN_FILE).exists():
        recorded |= flatten(read_json(out / ORIGIN_FILE, DataError, _OTHER_OUT))
    changed = [
        f"{key} ({recorded.get(key)} there, {given.get(key)} here)"
        for key in sorted(recorded.keys() | given.keys())
        if recorded.get(key) != given.get(key)
        and any(
            (out / name).exists() or find_work(out / name)  # a step that was interrupted
            for name in _MADE_WITH.get(key.split(".")[0], (MODEL, *_RESULTS))
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
    return flatten(read_json(out / "settings.json", DataError, _OTHER_OUT))


def _check_content(record: Mapping[str, Any], content_id: str | None, source: Path) -> None:
    """Check that a result on disk was made with the patch as it now is."""
    if record.get("content_id") != content_id:
        raise DataError(
            f"{source}: expected a result for the patch with content id {content_id}, found one "
            f"for {record.get('content_id')}; delete it, and it is made again"
        )
