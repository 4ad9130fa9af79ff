"""Where a parameter's entries lie: in blocks of a checkpoint, in streams of an adapter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from safeweights_peft.delta import Array, refuse

# Blocks whose span may include an entry, on average. Each of them is searched for it, so that a
# small file of many wide blocks could keep a reader busy for hours.
_MAX_INTERLEAVED = 256


@dataclass(frozen=True, kw_only=True)
class Block:
    """One checkpoint tensor that holds entries of a parameter: a strided view of its flat index.

    The tensor's entry at multi-index ``(i0, i1, ...)`` is the parameter's entry with flat index
    ``offset + strides[0] * i0 + strides[1] * i1 + ...``; see "Blocks" in ``docs/format.md``.
    """

    key: str
    shape: tuple[int, ...]  # in the checkpoint
    offset: int
    strides: tuple[int, ...]

    @classmethod
    def dense(cls, key: str, shape: Sequence[int]) -> "Block":
        """Describe a parameter that is one checkpoint tensor of the same shape."""
        return cls(key=key, shape=tuple(shape), offset=0, strides=row_major_strides(shape))

    def locate(self, indices: Array) -> tuple[Array | slice, Array]:
        """Find which of some ascending indices this tensor holds, and their flat indices in it."""
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

    def spread(self, local: Array) -> Array:
        """Return the parameter's flat indices of this tensor's entries; undo :meth:`locate`."""
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
        """Check that the tensor holds no entry of the parameter twice."""
        reach = 0  # of the smaller strides, which each stride must exceed
        for dim in self._wide_dims():
            if self.strides[dim] <= reach:
                return False
            reach += self.strides[dim] * (self.shape[dim] - 1)
        return True

    def count_searched(self, indices: Array) -> int:
        """Count the indices that :meth:`locate` tests one by one."""
        first, stop = self._reach(indices)
        return 0 if self._is_dense() else stop - first

    def _is_dense(self) -> bool:
        return self.strides == row_major_strides(self.shape)

    def _reach(self, indices: Array) -> tuple[int, int]:
        """Find the range of ascending indices from the tensor's first entry to its last."""
        # Bounds in the indices' own dtype: with another, numpy would convert all indices first.
        first, last = np.array([self.offset, self.last], indices.dtype)
        return int(np.searchsorted(indices, first)), int(np.searchsorted(indices, last, "right"))

    def _wide_dims(self) -> list[int]:
        """List the dimensions of more than one entry, by ascending stride."""
        wide = [dim for dim, size in enumerate(self.shape) if size > 1]
        return sorted(wide, key=lambda dim: self.strides[dim])


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the row-major strides of a shape, in entries."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def check_blocks(name: str, blocks: Sequence[Block], numel: int) -> None:
    """Check that each block lies inside its parameter and holds no entry twice."""
    for block in blocks:
        where, sizes, strides = f"{name}: block {block.key[:80]!r}", block.shape, block.strides
        if len(sizes) != len(strides):
            found = f"{len(strides)} strides for {len(sizes)} sizes"
            refuse(where, "one stride per size", found)
        if block.last >= numel:
            refuse(where, f"entries below {numel}", f"one at {block.last}")
        if not block.is_injective():
            refuse(where, "strides that reach each entry once", "others")
    total = sum(math.prod(block.shape) for block in blocks)
    if total > numel:
        refuse(f"{name}: blocks", f"at most {numel} entries together", total)


def check_coverage(name: str, blocks: Sequence[Block], indices: Array) -> None:
    """Check that each selected entry of a parameter lies in exactly one block."""
    searched = sum(block.count_searched(indices) for block in blocks)
    if searched > _MAX_INTERLEAVED * indices.size:
        most = f"an entry to be in the reach of {_MAX_INTERLEAVED} at most"
        refuse(f"{name}: blocks", most, f"{searched / indices.size:.0f} on average")
    covered = np.zeros(indices.shape, bool)
    for block in blocks:
        positions, _ = block.locate(indices)
        if covered[positions].any():
            refuse(name, "each entry in one block", f"{block.key!r} overlapping another")
        covered[positions] = True
    if not covered.all():
        lonely = indices[np.argmin(covered)]
        refuse(name, "blocks that hold every selected entry", f"none for index {lonely}")


class Coding(StrEnum):
    """Layout of a stream; a reader refuses any other name."""

    # To add one: a member here, what readers must know before they decompress a byte (`kinds`,
    # `most_escapes`, `Stream.frames`), and a pair of functions in `codec`.

    PLAIN = "plain"
    GAPS8 = "gaps8"
    GAPS16 = "gaps16"
    GAPS32 = "gaps32"
    STEPS8 = "steps8"
    STEPS16 = "steps16"
    STEPS32 = "steps32"
    PLANES = "planes"

    @property
    def family(self) -> str:
        """The name without its width."""
        return self.value.rstrip("0123456789")

    @property
    def width(self) -> int:
        """Bytes of a gap or a step; 0 where the coding has neither."""
        return int(self.value.removeprefix(self.family) or 0) // 8

    @property
    def kinds(self) -> tuple[str, ...]:
        """The streams that may be laid out so."""
        families = {"gaps": ("indices",), "steps": ("values",), "planes": ("values", "scores")}
        return families.get(self.family, STREAMS)

    def most_escapes(self, count: int, itemsize: int) -> int:
        """Return how many entries may be too large for the width, and escape it."""
        is_narrow = self.family == "gaps" or 0 < self.width < itemsize
        return count if is_narrow else 0


STREAMS = ("indices", "values", "scores")
GAPS = tuple(coding for coding in Coding if coding.family == "gaps")
STEPS = tuple(coding for coding in Coding if coding.family == "steps")


@dataclass(frozen=True)
class Stream:
    """What a record says about one of its streams."""

    coding: Coding = Coding.PLAIN
    escapes: int = 0
    sizes: tuple[int, ...] = ()  # bytes of each zstd frame, in the order of the file

    @property
    def size_bytes(self) -> int:
        """Bytes of all frames."""
        return sum(self.sizes)

    def frames(self, count: int, itemsize: int = 0) -> tuple[int, ...]:
        """List the decompressed size of each frame, for entries of ``itemsize`` bytes."""
        width = self.coding.width
        match self.coding.family:
            case "gaps":
                return (count + self.escapes,) * width
            case "steps":
                return (count,) * width + (self.escapes,) * (itemsize if self.escapes else 0)
            case "planes":
                return (count,) * itemsize
        return ()
