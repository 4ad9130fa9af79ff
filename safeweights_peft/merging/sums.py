"""What a checkpoint's entries are once patches are merged: by parameter, ready to be put anywhere.

Nothing is written here. ``edits`` brings the entries to the tensors of a checkpoint; a model that
is being loaded, and exports, take them as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.threads import in_threads
from safeweights_peft.delta import Array, add_rounded, bits_differ, digest, sum_rounded
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, MergeError
from safeweights_peft.merging.gather import base_state, copies, gather_entries
from safeweights_peft.merging.patches import (
    Patch,
    changed_entries,
    check_together,
    describe_patch,
    parameters,
)
from safeweights_peft.patch.artifacts import AnyPatch
from safeweights_peft.patch.records import TensorRecord


@dataclass(frozen=True, eq=False)
class MergedParameter:
    """What patches make of one parameter.

    Attributes:
        name: The parameter.
        copies: Where it lies in the checkpoint, tied copies included.
        indices: The ascending flat indices of the entries that change; ``(count,)``.
        base: The base's entries there, in the checkpoint's dtype; ``(count,)``.
        merged: What they become; ``(count,)``.
    """

    name: str
    copies: list[TensorRecord]
    indices: Array
    base: Array
    merged: Array


def merged_entries(
    reader: CheckpointReader, adapters: Sequence[AnyPatch]
) -> dict[str, tuple[Array, Array]]:
    """Compute the entries that patches change, from their base; only these entries are read."""
    patches = [describe_patch(each, f"adapter {n}") for n, each in enumerate(adapters, 1)]
    check_together(patches)
    return {each.name: (each.indices, each.merged) for each in merge_parameters(reader, patches)}


def merge_parameters(
    reader: CheckpointReader, patches: Sequence[Patch]
) -> Iterator[MergedParameter]:
    """Add up the values of patches for all parameters, and check the base and the results."""

    def merge(named: tuple[str, TensorRecord]) -> MergedParameter:
        name, record = named
        found = copies(reader, record)
        indices = changed_entries(patches, name)
        base, *others = (gather_entries(reader, name, each, indices) for each in found)
        if any(bits_differ(base, other).any() for other in others):
            _refuse_base(reader, patches, name)
        return MergedParameter(
            name, found, indices, base, _merge(reader, patches, name, indices, base)
        )

    yield from in_threads(merge, parameters(patches).items())


def _merge(
    reader: CheckpointReader, patches: Sequence[Patch], name: str, indices: Array, base: Array
) -> Array:
    """Add up the values of patches for one parameter, and check both its ends."""
    terms = []
    for patch in patches:
        own = patch.indices(name)
        if own is None:
            continue
        scale, record = patch.described.scale, patch.adapter.metadata.tensors[name]
        where = ... if own.size == indices.size else np.searchsorted(indices, own)
        own_base = base[where]
        if digest(own_base) != record.base_digest:
            _refuse_base(reader, patches, name)
        values = patch.adapter.values(name, own_base)
        terms.append((where, values, scale))
        if scale == patch.adapter.metadata.scale:
            found = digest(add_rounded(own_base, values, scale))
            if found != record.merged_digest:
                raise MergeError(
                    f"{name}: expected merged entries with digest {record.merged_digest}, found "
                    f"{found}; the adapter contradicts itself, do not use it"
                )
    merged = sum_rounded(base, terms)
    if np.isnan(merged).any():
        raise MergeError(
            f"{name}: expected numbers after merging, found NaN; "
            "use a base without NaN, or a smaller scale"
        )
    return merged


def _refuse_base(reader: CheckpointReader, patches: Sequence[Patch], name: str) -> None:
    """Say what a checkpoint is that lacks a patch's base entries: merged already, or another."""
    for patch in patches:
        if base_state(reader, patch.adapter.metadata, patch.adapter.indices) == "merged":
            raise AlreadyMergedError(
                f"{reader.directory}: expected the base, found the values of "
                f"{patch.described.adapter} already merged into it; use it as it is, or give the "
                "original base"
            )
    raise BaseMismatchError(
        f"{name}: expected {reader.directory} to stay as it is, found it changed meanwhile; "
        "try again when nothing else writes to it"
    )
