"""What merging some patches changes in a checkpoint, tensor by tensor.

The sum itself is in ``entries``; where it is written, in ``merging`` and ``in_place``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import Array
from safeweights_peft.errors import MergeError
from safeweights_peft.merging.patches import Patch
from safeweights_peft.merging.sums import merge_parameters
from safeweights_peft.patch.records import entries_by_block


@dataclass(frozen=True, eq=False)
class Edit:
    """New entries of one checkpoint tensor.

    Attributes:
        key: The tensor.
        indices: Flat row-major indices in the tensor, of which there is at least one; ``(count,)``.
        base: What is there, in the tensor's dtype; ``(count,)``.
        merged: What is to be there; ``(count,)``.
    """

    key: str
    indices: Array
    base: Array
    merged: Array


def edits(reader: CheckpointReader, patches: Sequence[Patch]) -> Iterator[Edit]:
    """Compute what merging changes, tied copies included, from a base that is checked thereby."""
    holders: dict[str, str] = {}
    for parameter in merge_parameters(reader, patches):
        for copy in parameter.copies:
            for key, (positions, local) in entries_by_block(copy, parameter.indices).items():
                if holders.setdefault(key, parameter.name) != parameter.name:
                    raise MergeError(
                        f"{parameter.name}: expected a tensor of its own in {reader.directory}, "
                        f"found {key}, which holds {holders[key]}; do not use this adapter"
                    )
                if local.size:
                    yield Edit(key, local, parameter.base[positions], parameter.merged[positions])
