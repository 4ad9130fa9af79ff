"""Where an interrupted job leaves what it goes on from."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.numpy import load_file, save_file
from torch import nn

from safeweights_peft.delta import Array, digest
from safeweights_peft.errors import DataError
from safeweights_peft.files import read_json, write_json
from safeweights_peft.tuner.entries import to_numpy


def work_dir_beside(out: Path, identity: dict[str, Any]) -> Path:
    """Names the checkpoints' directory after everything that the result depends on.

    Args:
        out: where the result will appear; the directory is beside it.
        identity: plain JSON.

    Returns:
        The directory, which need not exist.
    """
    text = json.dumps(identity, sort_keys=True)
    return out.with_name(f".{out.name}.{hashlib.sha256(text.encode()).hexdigest()[:12]}.work")


def digests(model: nn.Module, entries: Mapping[str, Array] = MappingProxyType({})) -> list[str]:
    """Names a model's weights, and the entries that a job works on, for the job's identity.

    Args:
        model: the model that the job begins with.
        entries: flat indices by parameter name.

    Returns:
        One digest per parameter, then one per tensor of entries.
    """
    weights = [digest(to_numpy(each)) for each in model.parameters()]
    return weights + [digest(each) for each in entries.values()]


def once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Does a step unless its result is there.

    Args:
        path: the JSON file that holds the result, or will.
        measure: the step.

    Returns:
        The result as it is on disk.
    """
    if not path.exists():
        write_json(path, measure())
    return read_json(path, DataError)


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Leaves arrays for a job that goes on; the file appears whole or not at all.

    Args:
        path: a safetensors file; an existing one is replaced.
        arrays: by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    save_file(dict(arrays), str(draft))
    draft.replace(path)


def load_arrays(path: Path) -> dict[str, Array] | None:
    """Reads what `save_arrays` left.

    Args:
        path: the file.

    Returns:
        The arrays, or None if there are none.
    """
    return load_file(str(path)) if path.exists() else None
