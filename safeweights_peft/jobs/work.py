"""The directories beside results from which interrupted jobs resume, and whose they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safeweights_peft.errors import DataError
from safeweights_peft.files import read_json
from safeweights_peft.schema import flatten
from safeweights_peft.tables import short_digest

IDENTITY = "identity"  # in a directory to resume from: all that the result depends on


def find_work(out: Path) -> list[Path]:
    """Find the directories from which jobs for a result would resume."""
    return [path for path in _work_directories(out) if holds_work(path)]


def _work_directories(out: Path) -> list[Path]:
    parent = out.absolute().parent
    return [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if path.name.startswith(f".{out.name}.") and path.name.endswith(".work")
    ]


def holds_work(work_dir: Path) -> bool:
    """Tell whether a job left more than its identity there."""
    return any(path.name != IDENTITY for path in work_dir.iterdir())


def refuse_work(out: Path, work_dir: Path, content: Mapping[str, Any]) -> None:
    """Say how an interrupted job for a result differs from the one that is asked for."""
    source = work_dir / IDENTITY
    # A work directory of an earlier version says nothing of itself.
    there = flatten(read_json(source, DataError)) if source.is_file() else {}
    here = flatten(json.loads(json.dumps(content)))
    changed = [
        f"{key.removeprefix('settings.')} ({_shorten(there.get(key))} there, "
        f"{_shorten(here.get(key))} here)"
        for key in sorted(there.keys() | here.keys())
        if there and there.get(key) != here.get(key)
    ]
    raise DataError(
        f"{out}: expected no interrupted job with other settings, found one with other "
        f"{', '.join(changed[:5]) or 'settings or versions'}; the same command as then resumes it, "
        f"another --out or --overwrite starts anew (within a run, delete {work_dir})"
    )


def _shorten(value: Any) -> str:
    text = short_digest(str(value)) if str(value).isprintable() else repr(value)
    return text if len(text) <= 60 else "another"


def clear_work(out: Path) -> None:
    """Remove what jobs for a result have left beside it, those with other settings included."""
    for path in _work_directories(out):
        shutil.rmtree(path, ignore_errors=True)
