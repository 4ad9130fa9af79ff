"""What interrupted jobs resume from: directories beside results, whose they are, files in them."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from safeweights_peft.delta import Array
from safeweights_peft.errors import DataError
from safeweights_peft.files import read_json, sync, write_json
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


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a step unless its result is there."""
    if not path.exists():
        write_json(path, measure())
    return read_json(path, DataError, "delete it, and it is made again")


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Save arrays to resume from; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(dict(arrays), str(draft))
        sync(draft)
        draft.replace(path)
    except SafetensorError as error:  # the library's name for a full disk
        raise OSError(f"{path}: expected to be written, was not: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def load_arrays(path: Path) -> dict[str, Array] | None:
    """Read what `save_arrays` left; None if there is nothing, or nothing that can be read."""
    try:
        return load_file(str(path))
    except (OSError, SafetensorError):
        return None
