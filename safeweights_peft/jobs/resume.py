"""Where an interrupted job leaves what it goes on from."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from safeweights_peft.delta import Array, digest
from safeweights_peft.errors import DataError
from safeweights_peft.files import read_json, sync, write_json
from safeweights_peft.modeling.tensors import to_numpy


def work_dir_beside(out: Path, identity: dict[str, Any]) -> Path:
    """Name the checkpoints' directory after everything that the result depends on."""
    text = json.dumps(identity, sort_keys=True)
    return out.with_name(f".{out.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.work")


def digests(model: nn.Module, entries: Mapping[str, Array] = MappingProxyType({})) -> list[str]:
    """Name a model's weights, and the entries that a job works on, for the job's identity."""
    weights = [digest(to_numpy(each)) for each in model.parameters()]
    return weights + [digest(each) for each in entries.values()]


def clear_work(out: Path) -> None:
    """Remove what jobs for a result have left beside it, those with other settings included."""
    for path in out.absolute().parent.iterdir():
        if path.name.startswith(f".{out.name}.") and path.name.endswith(".work"):
            shutil.rmtree(path, ignore_errors=True)


def files_of(folder: Path) -> list[list[Any]]:
    """Name a model's files as they are now, for a job's identity; a changed one changes it."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [[name, found.st_size, found.st_mtime_ns] for name, found in stats]


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do a step unless its result is there."""
    if not path.exists():
        write_json(path, measure())
    return read_json(path, DataError)


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Leave arrays for a job that goes on; the file appears whole or not at all."""
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
    """Read what `save_arrays` left."""
    try:
        return load_file(str(path))
    except (OSError, SafetensorError):
        return None
