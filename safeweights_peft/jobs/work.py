"""What interrupted jobs resume from: directories beside results, whose they are, files in them."""

from __future__ import annotations

import json
import re
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
FILES = "files of the base"  # the key of what identifies them
_VERSION = re.compile(r".*_version")
_CONTENT = re.compile(rf"{FILES}|content_id|.*_digest")  # of what options name


def find_work(out: Path) -> list[Path]:
    """Find the directories from which jobs for a result would resume."""
    return [path for path in _work_directories(out) if holds_work(path)]


def _work_directories(out: Path) -> list[Path]:
    parent = out.absolute().parent
    return [
        path
        for path in (parent.iterdir() if parent.is_dir() else ())
        if path.name.startswith(f".{out.name}.") and path.name.endswith(".work") and path.is_dir()
    ]


def holds_work(work_dir: Path) -> bool:
    """Tell whether a job left more than its identity there."""
    # A process that was killed may leave a draft of a file, which has a dot before its name.
    return any(path.name != IDENTITY and path.name[0] != "." for path in work_dir.iterdir())


def refuse_work(out: Path, work_dir: Path, content: Mapping[str, Any]) -> None:
    """Say how an interrupted job for a result differs from the one that is asked for."""
    source = work_dir / IDENTITY
    # A work directory of an earlier version says nothing of itself.
    hint = f"delete {work_dir}"
    there = flatten(read_json(source, DataError, hint)) if source.is_file() else {}
    here = flatten(json.loads(json.dumps(content)))
    changed = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    described = [_describe(key, there.get(key), here.get(key)) for key in changed] if there else []
    # No option brings back other versions, nor files that have changed under the same names.
    are_set = any(not _CONTENT.fullmatch(key) for key in changed)
    can_resume = bool(there) and are_set and not any(map(_VERSION.fullmatch, changed))
    way = "; the same command as then resumes it" if can_resume else ", so it can't be resumed"
    raise DataError(
        f"{out}: expected no interrupted job with other settings, found one with other "
        f"{', '.join(described[:5]) or 'settings or versions'}{way}"
        f"{',' if can_resume else ';'} another --out or --overwrite starts anew (within a run, "
        f"delete {work_dir})"
    )


def _describe(key: str, there: Any, here: Any) -> str:
    name = key.removeprefix("settings.")
    texts = [short_digest(str(value)) for value in (there, here)]
    if any(len(text) > 60 or not text.isprintable() for text in texts):
        return name
    return f"{name} ({texts[0]} there, {texts[1]} here)"


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
        raise OSError(
            f"{path}: expected to be written, was not: {error}; free some space, and call again"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def load_arrays(path: Path) -> dict[str, Array] | None:
    """Read what `save_arrays` left; None if there is nothing, or nothing that can be read."""
    try:
        return load_file(str(path))
    except (OSError, SafetensorError):
        return None
