"""How much safety maps, or safety patches, of one model share, against chance.

Numpy alone, on indices; values, scores and checkpoints are not looked at.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from safeweights_peft.delta import Array
from safeweights_peft.errors import BaseMismatchError, ReportError
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import TensorRecord

PathLike = str | os.PathLike[str]


def compare(paths: Sequence[PathLike]) -> dict[str, Any]:
    """Measure the overlap of every two of some safety maps or safety patches.

    IoU is the share of the entries of either that both have. Two expectations stand beside it, for
    random selections of the same sizes: from all tensors that any of the maps names, and from each
    tensor as many as the map has there. An IoU near the second says that the maps agree on tensors,
    not on entries.
    """
    if len(paths) < 2:
        raise ReportError(f"maps: expected at least two, found {len(paths)}; name another one")
    names = [os.fspath(path) for path in paths]
    artifacts = [read_artifact(name) for name in names]
    numels = _numels(names, artifacts)
    maps = [_describe(*each) for each in zip(names, artifacts, strict=True)]
    return {
        "maps": maps,
        "same_base": len({(each["base"], each["revision"]) for each in maps}) == 1,
        "entries_to_draw_from": sum(numels.values()),
        "pairs": [
            {"maps": [names[i], names[j]]}
            | _overlap(artifacts[i].indices, artifacts[j].indices, numels)
            for i, j in combinations(range(len(names)), 2)
        ],
    }


def _numels(names: Sequence[str], artifacts: Sequence[Artifact]) -> dict[str, int]:
    """Count the entries of every tensor that a map names, if it has one shape in all of them."""
    seen: dict[str, tuple[str, TensorRecord]] = {}
    for path, artifact in zip(names, artifacts, strict=True):
        for name, record in artifact.metadata.tensors.items():
            other, first = seen.setdefault(name, (path, record))
            if record.shape != first.shape:
                raise BaseMismatchError(
                    f"{path}: {name}: expected shape {list(first.shape)} as in {other}, found "
                    f"{list(record.shape)}; compare maps of one model"
                )
    return {name: record.numel for name, (_, record) in seen.items()}


def _describe(path: str, artifact: Artifact) -> dict[str, Any]:
    return {
        "path": path,
        "artifact": artifact.metadata.mode.artifact,
        "base": artifact.metadata.base_model_name_or_path,
        "revision": artifact.metadata.revision,
        "entries": sum(indices.size for indices in artifact.indices.values()),
    }


def _overlap(
    left: Mapping[str, Array], right: Mapping[str, Array], numels: Mapping[str, int]
) -> dict[str, Any]:
    both = left.keys() & right.keys()
    sizes = [sum(each.size for each in indices.values()) for indices in (left, right)]
    shared = sum(np.intersect1d(left[name], right[name], assume_unique=True).size for name in both)
    by_chance = sizes[0] * sizes[1] / sum(numels.values())  # mean of a hypergeometric distribution
    within_tensors = sum(left[name].size * right[name].size / numels[name] for name in sorted(both))
    return {
        "shared": shared,
        "iou": _iou(shared, sizes),
        "expected_shared": by_chance,
        "expected_iou": _iou(by_chance, sizes),
        "expected_shared_within_tensors": within_tensors,
        "expected_iou_within_tensors": _iou(within_tensors, sizes),
    }


def _iou(shared: float, sizes: Sequence[int]) -> float:
    either = sum(sizes) - shared
    return shared / either if either else 0.0
