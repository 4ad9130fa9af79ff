"""Patches that are merged together: read, checked against each other, and added up."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.threads import in_threads
from safeweights_peft.delta import Array, add_rounded, bits_differ, digest, sum_rounded
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, MergeError
from safeweights_peft.files import PathLike
from safeweights_peft.merging.gather import find_copies, find_state, gather_entries
from safeweights_peft.patch.artifacts import AnyPatch, SafetyMap
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import State, TensorRecord, entries_by_block, state_of

OnOverlap = Literal["add", "error"]
"""What to do where patches change the same entries: add them up, or refuse."""

Adapters = PathLike | Sequence[PathLike | tuple[PathLike, float]]
"""The directory of a patch, or of several, each alone or with a factor on top of its own."""


@dataclass(frozen=True)
class MergedPatch:
    """One patch of a merge, as reports and the undo journal describe it."""

    adapter: str  # its directory
    content_id: str
    scale: float  # its own times the requested one
    entries: int


@dataclass(frozen=True)
class Overlap:
    """Entries of one parameter that two patches change."""

    left: str  # directory of the first patch
    right: str  # directory of the second
    tensor: str
    entries: int


@dataclass(frozen=True, eq=False)
class Patch:
    """A patch that has been read, and what is reported of it."""

    adapter: AnyPatch
    summary: MergedPatch


@dataclass(frozen=True, eq=False)
class PatchSet:
    """Patches that are merged together, in the order in which they are added up."""

    patches: Sequence[Patch]
    parts: dict[str, list[tuple[Patch, Array]]]  # by parameter, whose and which flat indices
    indices: dict[str, Array]  # their union, ascending; (count,)
    overlap: tuple[Overlap, ...]

    @property
    def summaries(self) -> tuple[MergedPatch, ...]:
        """What is reported of each patch."""
        return tuple(patch.summary for patch in self.patches)

    @property
    def entries(self) -> int:
        """Number of entries that change, each counted once."""
        return sum(indices.size for indices in self.indices.values())


@dataclass(frozen=True, eq=False)
class ParameterEntries:
    """The entries of one parameter that patches change, as the base holds them."""

    name: str
    copies: Sequence[TensorRecord]  # by the checkpoint's keys, tied copies included
    indices: Array  # ascending flat indices; (count,)
    base: Array  # in the checkpoint's dtype; (count,)
    terms: Sequence[tuple[Patch, Any]]  # each patch with entries here, and their positions


@dataclass(frozen=True, eq=False)
class Edit:
    """New entries of one checkpoint tensor."""

    key: str
    indices: Array  # flat indices in the tensor, at least one, in any order; (count,)
    base: Array  # in the tensor's dtype; (count,)
    merged: Array  # likewise; (count,)


def read_patches(adapters: Adapters, on_overlap: OnOverlap = "add") -> PatchSet:
    """Read some patches, and check that they can be merged together."""
    several = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if not several:
        raise MergeError("adapters: expected at least one patch, found none; give its directory")
    patches = []
    for entry in several:
        directory, scale = entry if isinstance(entry, tuple) else (entry, 1.0)
        artifact = read_artifact(directory)
        if isinstance(artifact, SafetyMap):
            raise MergeError(
                f"{directory}: expected a safety patch, found a safety map, which has no values; "
                "train with it instead"
            )
        patches.append(describe_patch(artifact, str(directory), scale))
    return combine(patches, on_overlap)


def describe_patch(adapter: AnyPatch, source: str, scale: float = 1.0) -> Patch:
    """Describe a patch that has been read, and check the factor on its values."""
    factor = adapter.metadata.scale * scale
    if not math.isfinite(factor) or abs(factor) > float(np.finfo(np.float32).max):
        raise MergeError(
            f"scale: expected a factor that is finite in float32, found {factor}; "
            "give a smaller one"
        )
    entries = sum(indices.size for indices in adapter.indices.values())
    return Patch(adapter, MergedPatch(source, str(adapter.metadata.content_id), factor, entries))


def combine(patches: Sequence[Patch], on_overlap: OnOverlap = "add") -> PatchSet:
    """Check that patches can be added up, and find what they change together."""
    if on_overlap not in get_args(OnOverlap):  # or a misspelt "error" would add
        raise MergeError(
            f"on_overlap: expected one of {', '.join(get_args(OnOverlap))}, found {on_overlap!r}; "
            "choose one"
        )
    for left, right in combinations(patches, 2):
        _check_pair(left, right)
    parts: dict[str, list[tuple[Patch, Array]]] = {}
    for patch in patches:
        for name, indices in patch.adapter.indices.items():
            parts.setdefault(name, []).append((patch, indices))
    overlap = tuple(_find_overlaps(parts))
    if overlap and on_overlap == "error":
        first = overlap[0]
        raise MergeError(
            f"{first.tensor}: expected patches that change different entries, found "
            f"{first.entries} of {first.left} in {first.right} too; leave one patch out, or let "
            "them add up"
        )
    union = {name: reduce(_unite, (own for _, own in part)) for name, part in parts.items()}
    return PatchSet(patches, parts, union, overlap)


def merged_entries(
    reader: CheckpointReader,
    adapters: Sequence[AnyPatch],
    names: Sequence[PathLike] = (),
    scales: Sequence[float] = (),
) -> dict[str, tuple[Array, Array]]:
    """Compute what patches make of their base's entries: by parameter, indices and new entries."""
    names = names or [f"adapter {number}" for number in range(1, len(adapters) + 1)]
    scales = scales or [1.0] * len(adapters)
    patches = [
        describe_patch(adapter, str(name), scale)
        for adapter, name, scale in zip(adapters, names, scales, strict=True)
    ]
    parameters = gather_base(reader, combine(patches))
    return {entries.name: (entries.indices, merged) for entries, merged in add_up(parameters)}


def gather_base(reader: CheckpointReader, patches: PatchSet) -> Iterator[ParameterEntries]:
    """Read the entries that patches change, each once, and check that they are the base's."""

    def gather(name: str) -> ParameterEntries:
        indices, part = patches.indices[name], patches.parts[name]
        copies = find_copies(reader, part[0][0].adapter.metadata.tensors[name])
        base, *tied = (gather_entries(reader, name, copy, indices) for copy in copies)
        # A patch that has all entries takes them without a search and a copy.
        terms = [
            (patch, ... if own.size == indices.size else np.searchsorted(indices, own))
            for patch, own in part
        ]
        # Copies that differ from each other, and digests that don't match, are told apart only
        # where something is wrong: a good base is read once.
        if any(bits_differ(base, copy).any() for copy in tied) or not all(
            state_of(base[where], patch.adapter.metadata.tensors[name]) & State.BASE
            for patch, where in terms
        ):
            _refuse_base(reader, patches, name)
        return ParameterEntries(name, copies, indices, base, terms)

    return in_threads(gather, patches.indices)


def add_up(parameters: Iterable[ParameterEntries]) -> Iterator[tuple[ParameterEntries, Array]]:
    """Add patches' values to their base's entries; yield each parameter and what these become."""
    return in_threads(_add_up, parameters)


def find_edits(parameters: Iterable[ParameterEntries]) -> Iterator[Edit]:
    """Compute what merging changes in each tensor on disk, tied copies included."""
    # Two parameters in one tensor, which only a forged record can have, would each write over what
    # the other one has made.
    holders: dict[str, str] = {}
    for entries, merged in add_up(parameters):
        for copy in entries.copies:
            for key, (positions, local) in entries_by_block(copy, entries.indices).items():
                if holders.setdefault(key, entries.name) != entries.name:
                    raise MergeError(
                        f"{entries.name}: expected a tensor of its own in the checkpoint, found "
                        f"{key}, which holds {holders[key]}; do not use this adapter"
                    )
                if local.size:
                    yield Edit(key, local, entries.base[positions], merged[positions])


def _add_up(parameter: ParameterEntries) -> tuple[ParameterEntries, Array]:
    name, base = parameter.name, parameter.base
    terms = [
        (where, patch.adapter.values(name, base[where]), patch.summary.scale)
        for patch, where in parameter.terms
    ]
    merged = sum_rounded(base, terms)
    for (patch, where), (_, values, scale) in zip(parameter.terms, terms, strict=True):
        metadata = patch.adapter.metadata
        if scale != metadata.scale:
            continue  # the digest is of the merged entries at the patch's own scale
        own = merged if len(terms) == 1 else add_rounded(base[where], values, scale)
        expected, found = metadata.tensors[name].merged_digest, digest(own)
        if found != expected:
            raise MergeError(
                f"{name}: expected merged entries with digest {expected}, found {found}; "
                "the adapter contradicts itself, do not use it"
            )
    # Which NaN a cast gives differs between processors, so no two routes would agree in its bits.
    if np.isnan(merged).any():
        raise MergeError(
            f"{name}: expected numbers after merging, found NaN; "
            "use a base without NaN, or a smaller scale"
        )
    return parameter, merged


def _refuse_base(reader: CheckpointReader, patches: PatchSet, name: str) -> None:
    """Say what a checkpoint is that lacks a patch's base entries: merged already, or another."""
    for patch in patches.patches:
        if not find_state(reader, patch.adapter) & State.BASE:
            raise AlreadyMergedError(
                f"{reader.directory}: expected the base, found the values of "
                f"{patch.summary.adapter} already merged into it; use it as it is, or give the "
                "original base"
            )
    raise BaseMismatchError(
        f"{name}: expected {reader.directory} to stay as it is, found it changed meanwhile; "
        "try again when nothing else writes to it"
    )


def _unite(left: Array, right: Array) -> Array:
    # A stable sort merges two ascending runs; np.union1d hashes them, at a hundred times the cost.
    both = np.sort(np.concatenate([left, right]), kind="stable")
    is_first = np.ones(both.size, bool)
    is_first[1:] = both[1:] != both[:-1]
    return both[is_first]


def _find_overlaps(parts: Mapping[str, Sequence[tuple[Patch, Array]]]) -> Iterator[Overlap]:
    for name, part in parts.items():
        for (left, own), (right, other) in combinations(part, 2):
            shared = np.intersect1d(own, other, assume_unique=True).size
            if shared:
                yield Overlap(left.summary.adapter, right.summary.adapter, name, shared)


def _check_pair(left: Patch, right: Patch) -> None:
    """Refuse a patch given twice, and two whose entries cannot be matched."""
    one, other = left.summary, right.summary
    if one.content_id == other.content_id:
        raise MergeError(
            f"{other.adapter}: expected different patches, found the content of {one.adapter}; "
            "give it once, with the scale that you want"
        )
    # Fused experts are one parameter in one version of transformers and many in another.
    homes = _homes(left.adapter)
    for key, home in _homes(right.adapter).items():
        if homes.get(key, home) != home:
            raise MergeError(
                f"{key}: expected one parameter and layout in all patches, found {homes[key][0]} "
                f"in {one.adapter} and {home[0]} in {other.adapter}; make both patches with one "
                "version of transformers"
            )


def _homes(adapter: AnyPatch) -> dict[str, tuple[Any, ...]]:
    """Find which parameter each checkpoint key belongs to, and how that is laid out."""
    homes: dict[str, tuple[Any, ...]] = {}
    for name, record in adapter.metadata.tensors.items():
        home = name, record.shape, record.dtype, record.blocks, record.tied_keys
        homes |= dict.fromkeys(record.keys, home)
    return homes
