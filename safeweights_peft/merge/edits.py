"""What merging some patches changes in a checkpoint, one parameter at a time.

The sum itself is in ``entries``; where it is written, in ``merging`` and ``in_place``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import Array
from safeweights_peft.format import entries_by_block
from safeweights_peft.merge.entries import merge_parameter
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
    """
    for name, record in parameters(patches).items():
        indices = changed_entries(patches, name)
        found = copies(reader, record)
        base = gather_entries(reader, name, found[0], indices)
        holders = [(e.adapter, e.described.scale) for e in patches if e.indices(name) is not None]
        merged = merge_parameter(name, holders, indices, base)
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
