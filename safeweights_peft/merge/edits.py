"""What merging some patches changes in a checkpoint, one parameter at a time.

Here lives the sum of patches. Where it is written does not: see ``merging`` and ``in_place``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import Array, digest, sum_rounded
from safeweights_peft.errors import MergeError
from safeweights_peft.format import entries_by_block
from safeweights_peft.merge.fit import copies, gather_entries
from safeweights_peft.merge.patches import Patch, changed_entries, parameters


@dataclass(frozen=True, eq=False)
class Edit:
    """New entries of one checkpoint tensor.

    Attributes:
        name: The parameter that they belong to, for messages.
        key: The tensor.
        indices: Flat row-major indices in the tensor, of which there is at least one; ``(count,)``.
        base: What is there, in the tensor's dtype; ``(count,)``.
        merged: What is to be there; ``(count,)``.
    """

    name: str
    key: str
    indices: Array
    base: Array
    merged: Array


def edits(reader: CheckpointReader, patches: Sequence[Patch]) -> Iterator[Edit]:
    """Compute what merging changes, tied copies included.

    Args:
        reader: The base of every patch, checked.
        patches: The patches, in the order in which they are added up.

    Yields:
        The changes of one tensor after the other, while the base is still what it was.

    Raises:
        MergeError: A result is NaN, or not the one that a patch promises.
    """
    for name, record in parameters(patches).items():
        indices = changed_entries(patches, name)
        found = copies(reader, record)
        base = gather_entries(reader, name, found[0], indices)
        merged = _merge(name, patches, indices, base)
        for copy in found:
            for key, (positions, local) in entries_by_block(copy, indices).items():
                if local.size:
                    yield Edit(name, key, local, base[positions], merged[positions])


def changed_tensors(
    reader: CheckpointReader, patches: Sequence[Patch]
) -> Iterator[tuple[str, Array]]:
    """List the tensors that merging changes, without computing what they become.

    Args:
        reader: The base of every patch.
        patches: The patches.

    Yields:
        A tensor's key, and flat indices in the tensor.
    """
    for name, record in parameters(patches).items():
        indices = changed_entries(patches, name)
        for copy in copies(reader, record):
            for key, (_, local) in entries_by_block(copy, indices).items():
                if local.size:
                    yield key, local


def _merge(name: str, patches: Sequence[Patch], indices: Array, base: Array) -> Array:
    """Add up the patches' values for one parameter, and check the result."""
    holders = [patch for patch in patches if patch.delta(name) is not None]
    terms = []
    for patch in holders:
        delta = patch.adapter.deltas[name]
        where = ... if len(holders) == 1 else np.searchsorted(indices, delta.indices)
        terms.append((where, delta.values, patch.described.scale))
    merged = sum_rounded(base, terms)
    if np.isnan(merged).any():
        raise MergeError(
            f"{name}: expected numbers after merging, found NaN; "
            "use a base without NaN, or a smaller scale"
        )
    if len(holders) == 1 and holders[0].own_scale:
        expected, found = holders[0].adapter.metadata.tensors[name].merged_digest, digest(merged)
        if found != expected:
            raise MergeError(
                f"{name}: expected merged entries with digest {expected}, found {found}; "
                "the adapter contradicts itself, do not use it"
            )
    return merged
