"""The protecting job: a tuned model gets its base's safety weights back, and both are measured."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safeweights_peft.data import read_rows
from safeweights_peft.files import write_json
from safeweights_peft.merge import protect
from safeweights_peft.modeling import resolve_base
from safeweights_peft.pipeline.evaluating import evaluate, figures
from safeweights_peft.pipeline.progress import Progress, Quiet, advance_to
from safeweights_peft.pipeline.settings import ComputeSettings, EvaluateSettings

RECORD_FILE = "protecting.json"


def protect_tuned(
    tuned: Path,
    base: str,
    map_dir: Path,
    out: Path,
    settings: EvaluateSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a tuned checkpoint with its base's safety weights put back; measures both if asked.

    Args:
        tuned: the tuned checkpoint; it is left as it is.
        base: directory or Hub id of what it was tuned from; see `safeweights_peft.protect`.
        map_dir: a safety map, or a safety patch that is merged into the base.
        out: the protected checkpoint, published whole or not at all.
        settings: what both models are asked, and the task whose loss is measured; nothing if None.
        compute: device and dtype of the measuring.
        progress: shown while copying and measuring.
        overwrite: replace an existing directory.

    Returns:
        What was put back, and the figures before and after, as plain JSON; the same as in the
        checkpoint's ``protecting.json``.
    """
    compute, progress = compute or ComputeSettings(), progress or Quiet()
    if settings:
        _check_sources(settings)
    found = resolve_base(base, compute.revision)
    with progress.task("Copying the tuned model", 100) as advance:
        reach = advance_to(advance)
        report = protect(
            tuned,
            found.path,
            map_dir,
            out,
            overwrite=overwrite,
            progress=lambda done, total: reach(100 * done // max(total, 1)),
        )
    record: dict[str, Any] = {
        "kind": "protection",
        "tuned": str(tuned),
        "base": found.name,
        "base_revision": found.revision,
        "map": str(map_dir),
        **asdict(report),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    if settings:
        for stage, model in (("before", tuned), ("after", out)):
            record[stage] = figures(evaluate(str(model), None, settings, compute, progress))
        record["settings"] = asdict(settings) | asdict(compute)
    write_json(out / RECORD_FILE, record)
    return record


def _check_sources(settings: EvaluateSettings) -> None:
    """Finds out now, not after the copy, that requests are missing."""
    read_rows(settings.harmful)
    read_rows(settings.benign)
    if settings.task:
        read_rows(settings.task, needs_output=True)
