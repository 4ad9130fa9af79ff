"""Where a parameter lives on disk: checkpoint tensors as strided pieces of its flat index.

Here live :class:`Block` and the checks on blocks. Reading checkpoints does not: a block is only
numbers. See "Blocks" in ``docs/format.md``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safeweights_peft.delta import Array
from safeweights_peft.errors import CorruptAdapterError

_MAX_INTERLEAVED = 256
"""Blocks that may reach over an entry, on average: looking for entries in a block takes time."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One checkpoint tensor that holds entries of a parameter.

    The tensor's entry at multi-index ``(i0, i1, ...)`` is the parameter's entry with flat index
    ``offset + strides[0] * i0 + strides[1] * i1 + ...``.

    Attributes:
        key: The tensor's name in the checkpoint.
        shape: The tensor's shape there.
        offset: Flat index, in the parameter, of the tensor's first entry.
        strides: Steps in the parameter's flat index, one per dimension of ``shape``.
    """

    key: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @classmethod
    def dense(cls, key: str, shape: Sequence[int]) -> "Block":
        """Describe a parameter that is one checkpoint tensor of the same shape."""
        return cls(key=key, shape=tuple(shape), offset=0, strides=row_major_strides(shape))

    def locate(self, indices: Array) -> tuple[Array | slice, Array]:
        """Find which entries of the parameter this tensor holds, and where."""
        first, stop = self._reach(indices)
        if self._is_dense():
            part = slice(first, stop)
            offset = indices.dtype.type(self.offset)
            return part, indices[part] - offset if offset else indices[part]
        rest = indices[first:stop].astype(np.int64) - self.offset
        inside = np.ones(rest.shape, bool)
        local = np.zeros(rest.shape, np.int64)
        steps = row_major_strides(self.shape)
        for dim in reversed(self._wide_dims()):
            coordinate, rest = np.divmod(rest, self.strides[dim])
            inside &= coordinate < self.shape[dim]
            local += coordinate * steps[dim]
        inside &= rest == 0
        return first + np.flatnonzero(inside), local[inside]

    def looked_at(self, indices: Array) -> int:
        """Count the entries of the parameter that finding this tensor's goes through one by one."""
        first, stop = self._reach(indices)
        return 0 if self._is_dense() else stop - first

    def spread(self, local: Array) -> Array:
        """Find where entries of this tensor are in the parameter; undoes :meth:`locate`."""
        rest = local.astype(np.int64, copy=False)
        if self._is_dense():
            return rest + self.offset
        flat = np.full(rest.shape, self.offset, np.int64)
        for step, stride in zip(row_major_strides(self.shape), self.strides, strict=True):
            coordinate, rest = np.divmod(rest, step)
            flat += coordinate * stride
        return flat

    @property
    def last(self) -> int:
        """Flat index, in the parameter, of the tensor's last entry."""
        return self.offset + sum(
            stride * (size - 1) for stride, size in zip(self.strides, self.shape, strict=True)
        )

    def is_injective(self) -> bool:
        """Tell whether each stride reaches over everything that the smaller strides can reach."""
        reach = 0
        for dim in self._wide_dims():
            if self.strides[dim] <= reach:
                return False
            reach += self.strides[dim] * (self.shape[dim] - 1)
        return True

    def _is_dense(self) -> bool:
        """Tell whether its entries lie side by side in the parameter."""
        return self.strides == row_major_strides(self.shape)

    def _reach(self, indices: Array) -> tuple[int, int]:
        """Find the stretch of ascending indices between the first entry and the last."""
        # Bounds of the indices' own dtype: others would have numpy convert all indices first.
        edges = np.array([self.offset, self.last], indices.dtype)
        return (
            int(np.searchsorted(indices, edges[0])),
            int(np.searchsorted(indices, edges[1], side="right")),
        )

    def _wide_dims(self) -> list[int]:
        """Dimensions of more than one entry, by ascending stride."""
        wide = [dim for dim, size in enumerate(self.shape) if size > 1]
        return sorted(wide, key=lambda dim: self.strides[dim])


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Give the steps in the flat row-major index, one per dimension."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def check_blocks(name: str, blocks: Sequence[Block], numel: int) -> None:
    """Check that each block lies inside its parameter and holds no entry twice."""
    for block in blocks:
        if len(block.shape) != len(block.strides):
            found = f"{len(block.strides)} strides for {len(block.shape)} sizes"
            raise CorruptAdapterError(_message(name, block, "one stride per size", found))
        if block.last >= numel:
            raise CorruptAdapterError(
                _message(name, block, f"entries below {numel}", f"one at {block.last}")
            )
        if not block.is_injective():
            raise CorruptAdapterError(
                _message(name, block, "strides that reach each entry once", "others")
            )
    held = sum(math.prod(block.shape) for block in blocks)
    if held > numel:
        raise CorruptAdapterError(
            f"{name}: blocks: expected at most {numel} entries together, found {held}; "
            "do not use this adapter"
        )


def check_coverage(name: str, blocks: Sequence[Block], indices: Array) -> None:
    """Check that each selected entry of a parameter lies in exactly one block."""
    looked_at = sum(block.looked_at(indices) for block in blocks)
    if looked_at > _MAX_INTERLEAVED * indices.size:
        raise CorruptAdapterError(
            f"{name}: blocks: expected an entry to be in the reach of {_MAX_INTERLEAVED} at most, "
            f"found {looked_at / indices.size:.0f} on average; do not use this adapter"
        )
    holders = np.zeros(indices.shape, np.uint8)
    for block in blocks:
        positions, _ = block.locate(indices)
        holders[positions] += 1
        if holders[positions].max(initial=0) > 1:
            raise CorruptAdapterError(
                f"{name}: expected each entry in one block, found {block.key!r} overlapping "
                "another; do not use this adapter"
            )
    missing = np.flatnonzero(holders == 0)
    if missing.size:
        raise CorruptAdapterError(
            f"{name}: expected blocks that hold every selected entry, found none for index "
            f"{indices[missing[0]]}; do not use this adapter"
        )


def _message(name: str, block: Block, expected: str, found: str) -> str:
    key = block.key[:80]
    return f"{name}: block {key!r}: expected {expected}, found {found}; do not use this adapter"
