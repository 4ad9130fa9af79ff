"""Overlap of safety maps, or safety patches, of one model, against chance."""

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from safeweights_peft.delta import Array
from safeweights_peft.errors import BaseMismatchError, ReportError
from safeweights_peft.files import PathLike
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact


def compare(paths: Sequence[PathLike]) -> dict[str, Any]:
    """Measure the overlap of each two of some safety maps or safety patches."""
    if len(paths) < 2:
        raise ReportError(f"maps: expected at least two, found {len(paths)}; name another one")
    artifacts = {os.fspath(path): read_artifact(path) for path in paths}
    numels = _count_entries(artifacts)
    names = [os.fspath(path) for path in paths]
    maps = [
        {
            "path": name,
            "artifact": artifacts[name].metadata.mode.artifact,
            "base": artifacts[name].metadata.base_model_name_or_path,
            "revision": artifacts[name].metadata.revision,
            "method": artifacts[name].metadata.selection.get("method"),
            # Maps were of single weights before there were others.
            "granularity": artifacts[name].metadata.selection.get("granularity", "entry"),
            "entries": sum(indices.size for indices in artifacts[name].indices.values()),
        }
        for name in names
    ]
    return {
        "maps": maps,
        "same_base": len({(described["base"], described["revision"]) for described in maps}) == 1,
        "entries_to_draw_from": sum(numels.values()),
        "pairs": [
            {"maps": [left, right]}
            | _overlap(artifacts[left].indices, artifacts[right].indices, numels)
            for left, right in combinations(names, 2)
        ],
    }


def _count_entries(artifacts: Mapping[str, Artifact]) -> dict[str, int]:
    """Count the entries of each tensor that a map names, if it has one shape in all of them."""
    sources: dict[str, str] = {}  # the first map that names a tensor
    numels = {}
    for path, artifact in artifacts.items():
        for name, record in artifact.metadata.tensors.items():
            other = sources.setdefault(name, path)
            shape = artifacts[other].metadata.tensors[name].shape
            if record.shape != shape:
                raise BaseMismatchError(
                    f"{path}: {name}: expected shape {list(shape)} as in {other}, found "
                    f"{list(record.shape)}; compare maps of one model"
                )
            numels[name] = record.numel
    return numels


def _overlap(
    left: Mapping[str, Array], right: Mapping[str, Array], numels: Mapping[str, int]
) -> dict[str, Any]:
    both = sorted(left.keys() & right.keys())
    sizes = [sum(indices.size for indices in side.values()) for side in (left, right)]
    shared = sum(np.intersect1d(left[name], right[name], assume_unique=True).size for name in both)
    # Two expectations for random selections of the same sizes (means of hypergeometric
    # distributions): from all tensors that are named, and from each tensor as many as a map has
    # there. An IoU near the second shows that the maps agree on tensors, not on entries.
    by_chance = sizes[0] * sizes[1] / sum(numels.values())
    within_tensors = sum(left[name].size * right[name].size / numels[name] for name in both)
    return {
        "shared": shared,
        "iou": _iou(shared, sizes),
        "expected_shared": by_chance,
        "expected_iou": _iou(by_chance, sizes),
        "expected_shared_within_tensors": within_tensors,
        "expected_iou_within_tensors": _iou(within_tensors, sizes),
    }


def _iou(shared: float, sizes: Sequence[int]) -> float:
    """Divide the entries that two selections share by those that either has."""
    either = sum(sizes) - shared
    return shared / either if either else 0.0
