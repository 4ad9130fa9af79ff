"""Compare two checkpoints of one architecture, and make the changed entries part of a patch."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.threads import in_threads
from safeweights_peft.delta import (
    WEIGHT_DTYPES,
    Array,
    SparseDelta,
    add_rounded,
    bits_differ,
    digest,
    find_values,
    index_dtype,
)
from safeweights_peft.errors import MergeError
from safeweights_peft.merging.gather import find_copies, gather_entries
from safeweights_peft.merging.sums import merged_entries
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import TensorRecord


@dataclass(frozen=True, eq=False)
class Change:
    """The entries of one parameter whose bits differ between two checkpoints."""

    indices: Array  # ascending flat indices in the parameter; (count,)
    base: Array  # in the checkpoint's dtype, finite; (count,)
    tuned: Array  # likewise; (count,)
    values: Array  # float32, from one towards the other; (count,)
    exact: Array  # whether adding them gives the tuned bits; (count,)


@dataclass(frozen=True, eq=False)
class PatchPart:
    """The part of a parameter's change that goes into a patch, and what is lost by it."""

    record: TensorRecord  # with the digests of the kept entries
    delta: SparseDelta
    changed: int  # entries of the whole change
    inexact: int  # kept entries that don't get the tuned bits
    square: float  # sum of the squared changes
    lost_square: float  # sum of the squared differences that remain

    @property
    def lost(self) -> int:
        """Number of changed entries that don't get the tuned bits."""
        return self.changed - self.delta.count + self.inexact


def changed_keys(
    base: CheckpointReader, tuned: CheckpointReader, dropped: Collection[str] = ()
) -> list[str]:
    """List the tensors that differ between two checkpoints of the same tensors, but for some."""
    _check_comparable(base, tuned, dropped)
    keys = [key for key in base.keys() if key in tuned]
    differences = in_threads(lambda key: _differ(base, key, tuned, key), keys)
    return [key for key, differs in zip(keys, differences, strict=True) if differs]


def find_change(
    base: CheckpointReader, tuned: CheckpointReader, name: str, record: TensorRecord
) -> Change:
    """Find the changed entries of one parameter, and the values of the change."""
    _check_tied(base, record, name)
    _check_tied(tuned, record, name)
    pieces = [_changed_in(base, tuned, block) for block in record.blocks]
    indices, before, after = (np.concatenate(part) for part in zip(*pieces, strict=True))
    # Each block's entries ascend, but blocks of fused experts interleave.
    if (indices[1:] < indices[:-1]).any():
        order = np.argsort(indices)
        indices, before, after = indices[order], before[order], after[order]
    _check_finite(name, indices, before, base)
    _check_finite(name, indices, after, tuned)
    indices = indices.astype(index_dtype(record.numel))
    return Change(indices, before, after, *find_values(before, after))


def keep(name: str, record: TensorRecord, change: Change, kept: Array, *, exact: bool) -> PatchPart:
    """Make a patch's part of a change, and measure what is lost, which may have to be nothing."""
    bad = np.flatnonzero(kept & ~change.exact)
    if exact and bad.size:
        raise MergeError(
            f"{name}: expected entries that the base plus a float32 value can become, found "
            f"{bad.size} of {change.indices.size} changed ones that none does, the first at index "
            f"{change.indices[bad[0]]} from {change.base[bad[0]]} to {change.tuned[bad[0]]}; give "
            "--density 1, which keeps every change, by the nearest value where none is exact, and "
            "tells what is lost"
        )
    base, values = change.base[kept], change.values[kept]
    after = change.base.copy()
    after[kept] = merged = add_rounded(base, values)
    # In float64, as squares of bfloat16's largest numbers are too large for float32.
    remains = change.tuned.astype(np.float64) - after.astype(np.float64)
    moved = change.tuned.astype(np.float64) - change.base.astype(np.float64)
    return PatchPart(
        record=replace(record, base_digest=digest(base), merged_digest=digest(merged)),
        delta=SparseDelta(record.shape, change.indices[kept], values),
        changed=change.indices.size,
        inexact=bad.size,
        square=float(moved @ moved),
        lost_square=float(remains @ remains),
    )


def check_patch(
    base: CheckpointReader, tuned: CheckpointReader, adapter: Adapter, inexact: int
) -> None:
    """Check that a patch, as it was written, makes the tuned checkpoint's entries of the base's."""
    missed = 0
    for name, (indices, entries) in merged_entries(base, [adapter]).items():
        expected = gather_entries(tuned, name, adapter.metadata.tensors[name], indices)
        missed += int(bits_differ(entries, expected).sum())
    if missed != inexact:
        raise MergeError(
            f"{tuned.directory}: expected {inexact} entries that the written patch misses, found "
            f"{missed}; the disk may be failing, or a checkpoint has changed meanwhile: try again"
        )


def _check_comparable(
    base: CheckpointReader, tuned: CheckpointReader, dropped: Collection[str]
) -> None:
    """Refuse checkpoints that don't hold the same tensors in the same dtypes and shapes."""
    for reader, other in ((base, tuned), (tuned, base)):
        for key in other.keys():
            if key not in reader and key not in dropped:
                raise MergeError(
                    f"{key}: expected it in {reader.directory} as in {other.directory}, found no "
                    "such tensor; give two checkpoints of one architecture"
                )
    hint = "give a model that was tuned from this base, unresized, and saved in its dtype"
    for key in tuned.keys():
        info = base.info(key)
        tuned.check_tensor(key, info.shape, info.dtype, error=MergeError, hint=hint)


def _check_tied(reader: CheckpointReader, record: TensorRecord, name: str) -> None:
    own, *tied = find_copies(reader, record)
    for copy in tied:
        (first,), (second,) = own.blocks, copy.blocks
        if _differ(reader, first.key, reader, second.key):
            raise MergeError(
                f"{name}: expected {second.key} in {reader.directory} as a copy of {first.key}, "
                "found another tensor; untie them in the base's config.json if they are two"
            )


def _differ(left: CheckpointReader, key: str, right: CheckpointReader, other: str) -> bool:
    """Tell whether the bytes of two tensors of one size differ."""
    pairs = zip(left.read_windows(key), right.read_windows(other), strict=True)
    return any(bits_differ(one, two).any() for one, two in pairs)


def _changed_in(
    base: CheckpointReader, tuned: CheckpointReader, block: Block
) -> tuple[Array, Array, Array]:
    dtype, start = WEIGHT_DTYPES[base.info(block.key).dtype], 0
    pieces = []
    for windows in zip(base.read_windows(block.key), tuned.read_windows(block.key), strict=True):
        before, after = (window.view(dtype) for window in windows)
        local = np.flatnonzero(bits_differ(before, after))
        pieces.append((block.spread(local + start), before[local], after[local]))
        start += before.size
    indices, was, now = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return indices, was, now


def _check_finite(name: str, indices: Array, entries: Array, reader: CheckpointReader) -> None:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        bad = np.flatnonzero(~np.isfinite(entries.astype(np.float32)))
    if bad.size:
        raise MergeError(
            f"{name}: expected finite numbers where the checkpoints differ, found "
            f"{entries[bad[0]]} at index {indices[bad[0]]} in {reader.directory}; no patch can "
            "hold it"
        )
