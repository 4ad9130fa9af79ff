"""Where an interrupted job leaves what it goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from safeweights_peft.delta import digest
from safeweights_peft.errors import DataError
from safeweights_peft.files import read_json, write_json
from safeweights_peft.format import Adapter, SafetyMap
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


def digests(model: nn.Module, artifact: SafetyMap | Adapter) -> list[str]:
    """Names a model's weights and an artifact's entries, for a job's identity.

    Args:
        model: the model that the job begins with.
        artifact: the safety map or patch that it works under.

    Returns:
        One digest per parameter, then one per tensor of the artifact.
    """
    weights = [digest(to_numpy(each)) for each in model.parameters()]
    return weights + [digest(each) for each in artifact.indices.values()]


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
