"""What a checkpoint's entries are once patches are merged: by parameter, ready to be put anywhere.

Nothing is written here. ``edits`` brings the entries to the tensors of a checkpoint; a model that
is being loaded, and exports, take them as they are.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import Array, add_rounded, digest, sum_rounded
from safeweights_peft.errors import AlreadyMergedError, MergeError
from safeweights_peft.format import AnyPatch
from safeweights_peft.merge.fit import base_state, gather_entries


def merged_entries(
    reader: CheckpointReader, adapters: Sequence[AnyPatch]
) -> dict[str, tuple[Array, Array]]:
    """Compute the entries that patches change, from their base; only these entries are read.

    Args:
        reader: The base.
        adapters: Patches of this base, each at its own scale.

    Returns:
        By parameter: the ascending flat indices, and the merged entries in the checkpoint's dtype;
        both ``(count,)``.

    Raises:
        MergeError: Two patches place a parameter in different ways.
    """
    for adapter in adapters:
        check_unmerged(reader, adapter, "the adapter")
    merged = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.metadata.tensors):
        holders = [(each, each.metadata.scale) for each in adapters if name in each.indices]
        record = holders[0][0].metadata.tensors[name]
        if any(each.metadata.tensors[name].blocks != record.blocks for each, _ in holders):
            raise MergeError(
                f"{name}: expected patches that place it alike on disk, found two layouts; "
                "merge patches that were made with one version of transformers"
            )
        indices = reduce(np.union1d, [each.indices[name] for each, _ in holders])
        base = gather_entries(reader, name, record, indices)
        merged[name] = indices, merge_parameter(name, holders, indices, base)
    return merged


def merge_parameter(
    name: str, holders: Sequence[tuple[AnyPatch, float]], indices: Array, base: Array
) -> Array:
    """Add up the values of patches for one parameter, and check the result.

    Args:
        name: The parameter.
        holders: The patches that change it, in the order in which they are added up, each with the
            factor on its values.
        indices: The ascending flat indices of all entries that they change; ``(count,)``.
        base: The base's entries there; ``(count,)``.

    Returns:
        The merged entries, in the base's dtype; ``(count,)``.

    Raises:
        MergeError: A result is NaN, or not the one that a patch promises at its own scale.
    """
    terms = []
    for adapter, scale in holders:
        record = adapter.metadata.tensors[name]
        where = ... if len(holders) == 1 else np.searchsorted(indices, adapter.indices[name])
        values = adapter.values(name, base[where])
        terms.append((where, values, scale))
        if scale == adapter.metadata.scale:
            found = digest(add_rounded(base[where], values, scale))
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


def check_unmerged(reader: CheckpointReader, adapter: AnyPatch, source: str) -> None:
    """Check that a checkpoint is a patch's base, and doesn't hold its merged values already.

    Args:
        reader: The checkpoint.
        adapter: The patch.
        source: What messages call the patch.

    Raises:
        AlreadyMergedError: It holds the merged values.
    """
    if base_state(reader, adapter.metadata, adapter.indices) == "merged":
        raise AlreadyMergedError(
            f"{reader.directory}: expected the base, found the values of {source} already merged "
            "into it; use it as it is, or give the original base"
        )
