"""Safety patches that are merged together: read, and checked against each other.

Here live each patch's factor and the overlap of patches. Their sum does not: see ``edits``.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Literal

import numpy as np

from safeweights_peft.delta import Array
from safeweights_peft.errors import MergeError
from safeweights_peft.merging.gather import PathLike
from safeweights_peft.patch.artifacts import AnyPatch
from safeweights_peft.patch.io import read_metadata, read_patch
from safeweights_peft.patch.records import Mode, TensorRecord

OnOverlap = Literal["add", "error"]
"""What to do where patches change the same entries: add them up, or refuse."""

Adapters = PathLike | Sequence[PathLike | tuple[PathLike, float]]
"""The directory of a patch, or of several, each alone or with a factor on top of its own."""


@dataclass(frozen=True)
class MergedPatch:
    """One patch of a merge.

    Attributes:
        adapter: Its directory.
        content_id: Digest of what it stores.
        scale: The factor on its values: its own times the requested one.
        entries: Number of entries that it changes.
    """

    adapter: str
    content_id: str
    scale: float
    entries: int


@dataclass(frozen=True)
class Overlap:
    """Entries of one parameter that two patches change.

    Attributes:
        left: Directory of the first patch.
        right: Directory of the second.
        tensor: The parameter.
        entries: How many entries both change.
    """

    left: str
    right: str
    tensor: str
    entries: int


@dataclass(frozen=True, eq=False)
class Patch:
    """A patch that has been read, and what a merge multiplies it with.

    Attributes:
        adapter: The patch.
        described: What reports say of it.
    """

    adapter: AnyPatch
    described: MergedPatch

    def indices(self, name: str) -> Array | None:
        """Look up which entries of a parameter it changes."""
        return self.adapter.indices.get(name)


def read_patches(adapters: Adapters) -> list[Patch]:
    """Read some patches, and check that they can be merged together."""
    several = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if not several:
        raise MergeError("adapters: expected at least one patch, found none; give its directory")
    patches = [_read(*each) if isinstance(each, tuple) else _read(each, 1.0) for each in several]
    check_together(patches)
    return patches


def describe_patch(adapter: AnyPatch, source: str, scale: float = 1.0) -> Patch:
    """Say what is merged of a patch that has been read."""
    described = MergedPatch(
        adapter=source,
        content_id=str(adapter.metadata.content_id),
        scale=_factor(adapter.metadata.scale, scale),
        entries=sum(each.size for each in adapter.indices.values()),
    )
    return Patch(adapter, described)


def check_together(patches: Sequence[Patch]) -> None:
    """Check that patches can be added up: all different, and each parameter placed alike."""
    for left, right in combinations(patches, 2):
        _check_pair(left, right)


def parameters(patches: Sequence[Patch]) -> dict[str, TensorRecord]:
    """List what some patches change."""
    records: dict[str, TensorRecord] = {}
    for patch in patches:
        records = patch.adapter.metadata.tensors | records
    return records


def changed_entries(patches: Sequence[Patch], name: str) -> Array:
    """Unite the entries of a parameter that some patches change."""
    each = [found for patch in patches if (found := patch.indices(name)) is not None]
    return reduce(np.union1d, each[1:], each[0])


def count_entries(patches: Sequence[Patch]) -> int:
    """Count the entries that some patches change, each once."""
    return sum(changed_entries(patches, name).size for name in parameters(patches))


def overlaps(patches: Sequence[Patch], on_overlap: OnOverlap = "add") -> tuple[Overlap, ...]:
    """Count the entries that patches share, for every two and every parameter."""
    found = tuple(_overlaps(patches))
    if found and on_overlap == "error":
        first = found[0]
        raise MergeError(
            f"{first.tensor}: expected patches that change different entries, found "
            f"{first.entries} of {first.left} in {first.right} too; leave one patch out, or let "
            "them add up"
        )
    return found


def _overlaps(patches: Sequence[Patch]) -> Iterator[Overlap]:
    for left, right in combinations(patches, 2):
        for name, indices in left.adapter.indices.items():
            other = right.indices(name)
            if other is None:
                continue
            shared = np.intersect1d(indices, other, assume_unique=True).size
            if shared:
                yield Overlap(left.described.adapter, right.described.adapter, name, shared)


def _read(directory: PathLike, scale: float) -> Patch:
    if read_metadata(directory).mode is Mode.SPA:
        raise MergeError(
            f"{directory}: expected a safety patch, found a safety map, which has no values; "
            "train with it instead"
        )
    return describe_patch(read_patch(directory), str(directory), scale)


def _factor(own: float, requested: float) -> float:
    factor = own * requested
    if not math.isfinite(factor) or abs(factor) > float(np.finfo(np.float32).max):
        raise MergeError(
            f"scale: expected a factor that is finite in float32, found {factor}; "
            "give a smaller one"
        )
    return factor


def _check_pair(left: Patch, right: Patch) -> None:
    """Refuse a patch given twice, and two whose entries cannot be matched."""
    one, other = left.described, right.described
    if one.content_id == other.content_id:
        raise MergeError(
            f"{other.adapter}: expected different patches, found the content of {one.adapter}; "
            "give it once, with the scale that you want"
        )
    homes = _homes(left.adapter)
    for key, home in _homes(right.adapter).items():
        if homes.get(key, home) != home:
            raise MergeError(
                f"{key}: expected one parameter and layout in all patches, found {homes[key][0]} "
                f"in {one.adapter} and {home[0]} in {other.adapter}; make both patches with one "
                "version of transformers"
            )


def _homes(adapter: AnyPatch) -> dict[str, tuple[str, TensorRecord]]:
    """Tell of each checkpoint key which parameter it belongs to, and how that is laid out."""
    layouts = {
        name: TensorRecord(
            shape=record.shape,
            dtype=record.dtype,
            blocks=record.blocks,
            tied_keys=record.tied_keys,
        )
        for name, record in adapter.metadata.tensors.items()
    }
    return {key: (name, layout) for name, layout in layouts.items() for key in layout.keys}
