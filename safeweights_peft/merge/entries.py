"""What a checkpoint's entries are once patches are merged: by parameter, ready to be put anywhere.

Nothing is written here. A model that is being loaded, and exports, take the entries from here;
``merging`` writes a checkpoint.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, add_rounded, digest
from safeweights_peft.errors import AlreadyMergedError, MergeError
from safeweights_peft.format import Adapter
from safeweights_peft.merge.fit import base_state, gather_entries


def merged_entries(
    reader: CheckpointReader, adapters: Sequence[Adapter]
) -> dict[str, tuple[Array, Array]]:
    """Compute the entries that patches change, from their base; only these entries are read.

    Where patches share an entry, their scaled values are added in the order given, each sum in
    float32, and the result is rounded once.

    Args:
        reader: The base.
        adapters: Patches of this base, each at its own scale.

    Returns:
        By parameter: the ascending flat indices, and the merged entries in the checkpoint's dtype;
        both ``(count,)``.

    Raises:
        AlreadyMergedError: The checkpoint holds the merged values of a patch.
    """
    for adapter in adapters:
        if base_state(reader, adapter.metadata, adapter.indices) == "merged":
            raise AlreadyMergedError(
                f"{reader.directory}: expected the base, found the adapter's values already merged "
                "into it; use it as it is, or give the original base"
            )
    names = dict.fromkeys(name for adapter in adapters for name in adapter.deltas)
    return {
        name: _merge_parameter(reader, name, [each for each in adapters if name in each.deltas])
        for name in names
    }


def _merge_parameter(
    reader: CheckpointReader, name: str, adapters: Sequence[Adapter]
) -> tuple[Array, Array]:
    record = adapters[0].metadata.tensors[name]
    if any(each.metadata.tensors[name].blocks != record.blocks for each in adapters):
        raise MergeError(
            f"{name}: expected patches that place it alike on disk, found two layouts; "
            "merge patches that were made with one version of transformers"
        )
    indices = reduce(np.union1d, [each.deltas[name].indices for each in adapters])
    base = gather_entries(reader, name, record, indices)
    total = base.astype(np.float32)  # in float32 the rule rounds nothing away between two patches
    for adapter in adapters:
        delta, scale = adapter.deltas[name], adapter.metadata.scale
        at = np.searchsorted(indices, delta.indices)
        found = digest(add_rounded(base[at], delta.values, scale))
        expected = adapter.metadata.tensors[name].merged_digest
        if found != expected:
            raise MergeError(
                f"{name}: expected merged entries with digest {expected}, found {found}; "
                "the adapter contradicts itself, do not use it"
            )
        total[at] = add_rounded(total[at], delta.values, scale)
    with np.errstate(over="ignore"):
        merged = total.astype(DTYPES[record.dtype])
    if np.isnan(merged).any():
        raise MergeError(
            f"{name}: expected numbers after merging, found NaN; use a base without NaN"
        )
    return indices, merged
