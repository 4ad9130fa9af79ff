"""Exact global top-k over scores that arrive tensor by tensor, in memory bounded by k.

Pure numpy. The selected set is that of a sort of all scores by (score, then name, then index), so
it does not depend on the order in which tensors arrive or on how they were sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safeweights_peft.delta import index_dtype
from safeweights_peft.errors import SelectionError

NOTHING = np.empty(0, np.float32)
SLACK = 32
"""What ranks behind the k-th entry is dropped once it makes up one part in this many of k."""
CHUNK = 1 << 16
"""Entries looked at together: temporary arrays stay this small."""


class Order(StrEnum):
    """Which end of the ranking is kept."""

    TOP = "top"
    BOTTOM = "bottom"


@dataclass(frozen=True, eq=False)
class Selected:
    """Selected entries of one tensor.

    Attributes:
        indices: flat, row-major, sorted; int32, or int64 for tensors of 2**31 entries and more.
        scores: float32, in the order of `indices`.
    """

    indices: NDArray[np.int32] | NDArray[np.int64]
    scores: NDArray[np.float32]


class TopK:
    """Keeps the k best-scored entries of a stream of tensors, and hardly more on the way.

    Ties at the k-th score go to the smaller name, then to the smaller index.
    """

    def __init__(self, k: int, order: Order = Order.TOP) -> None:
        """Start with nothing kept."""
        if k < 1:
            raise SelectionError(f"k: expected at least 1, found {k}; raise the density")
        self.k = k
        self.order = order
        self._kept: dict[str, Selected] = {}
        self._bound = np.uint32(0)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copy what is kept, so that an interrupted stream can go on."""
        arrays: dict[str, NDArray[Any]] = {"bound": np.array([self._bound])}
        for name, kept in self._kept.items():
            arrays |= {f"{name}/indices": kept.indices, f"{name}/scores": kept.scores}
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from where another stream was, with the same k and order."""
        self._bound = np.uint32(arrays["bound"][0])
        names = [key.removesuffix("/scores") for key in arrays if key.endswith("/scores")]
        self._kept = {
            name: Selected(arrays[f"{name}/indices"].copy(), arrays[f"{name}/scores"].copy())
            for name in names
        }

    @property
    def count(self) -> int:
        """How many entries are kept now."""
        return sum(kept.indices.size for kept in self._kept.values())

    def add(self, name: str, scores: NDArray[np.float32]) -> None:
        """Offer all scores of one tensor."""
        if name in self._kept:
            raise SelectionError(f"{name}: expected to be scored once, found it twice")
        offered = np.ascontiguousarray(scores, dtype=np.float32).reshape(-1)
        _check_scores(name, offered)
        wanted = sum(int((keys >= self._bound).sum()) for _, keys in self._pieces(offered))
        if self.count + wanted > self.k + self.k // SLACK:
            wanted = self._raise_bound(name, offered)
        self._kept[name] = self._take(offered, ties=wanted)

    def result(self) -> dict[str, Selected]:
        """End the stream."""
        if self.count < self.k:
            raise SelectionError(
                f"k: expected at most {self.count} entries, found {self.k}; lower the density "
                "or make more parameters eligible"
            )
        self._raise_bound()
        return {name: kept for name, kept in sorted(self._kept.items()) if kept.indices.size}

    def _raise_bound(self, name: str = "", offered: NDArray[np.float32] = NOTHING) -> int:
        """Drop kept entries that rank behind the k-th of all, those of a new tensor included.

        Returns how many of the new tensor's entries with just the k-th key are to be kept.
        """
        scores = {other: kept.scores for other, kept in self._kept.items()} | {name: offered}

        def all_keys() -> Iterator[NDArray[np.uint32]]:
            return (keys for each in scores.values() for _, keys in self._pieces(each))

        self._bound, above = kth_largest(all_keys, self.k)
        free, new = self.k - above, 0
        for each in sorted(scores):
            ties = min(self._tied(scores[each]), free)
            free -= ties
            if each in self._kept:
                self._shrink(self._kept[each], ties)
            else:
                new = ties
        return new

    def _shrink(self, kept: Selected, ties: int) -> None:
        """Drop kept entries below the bound, and ties beyond the first few, without a copy."""
        end = 0
        for start, keys in self._pieces(kept.scores):
            wanted = self._wanted(keys, ties)
            ties -= int((keys[wanted] == self._bound).sum())
            stop = end + int(wanted.sum())
            kept.indices[end:stop] = kept.indices[start : start + CHUNK][wanted]
            kept.scores[end:stop] = kept.scores[start : start + CHUNK][wanted]
            end = stop
        kept.indices.resize(end, refcheck=False)
        kept.scores.resize(end, refcheck=False)

    def _take(self, offered: NDArray[np.float32], ties: int) -> Selected:
        """Copy a new tensor's entries above the bound, and its first ties."""
        above = sum(int((keys > self._bound).sum()) for _, keys in self._pieces(offered))
        size = above + min(ties, self._tied(offered))
        taken = Selected(np.empty(size, index_dtype(offered.size)), np.empty(size, np.float32))
        end = 0
        for start, keys in self._pieces(offered):
            hits = np.nonzero(self._wanted(keys, ties))[0]
            ties -= int((keys[hits] == self._bound).sum())
            stop = end + hits.size
            taken.indices[end:stop] = hits + start
            taken.scores[end:stop] = offered[start : start + CHUNK][hits]
            end = stop
        return taken

    def _tied(self, scores: NDArray[np.float32]) -> int:
        return sum(int((keys == self._bound).sum()) for _, keys in self._pieces(scores))

    def _wanted(self, keys: NDArray[np.uint32], ties: int) -> NDArray[np.bool_]:
        wanted = keys > self._bound
        wanted[np.nonzero(keys == self._bound)[0][:ties]] = True
        return wanted

    def _pieces(self, scores: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Map scores piece by piece to unsigned integers that grow with how wanted they are.

        The bits of floats that are not negative order as the floats do; adding 0 turns -0 into 0.
        """
        for start in range(0, scores.size, CHUNK):
            bits = (scores[start : start + CHUNK] + np.float32(0)).view(np.uint32)
            yield start, bits if self.order is Order.TOP else ~bits


def _check_scores(name: str, scores: NDArray[np.float32]) -> None:
    for start in range(0, scores.size, CHUNK):
        piece = scores[start : start + CHUNK]
        if not (np.isfinite(piece).all() and (piece >= 0).all()):
            raise SelectionError(
                f"{name}: expected finite scores of at least 0, found others; "
                "check the model's gradients (a float16 overflow, or a NaN in a weight)"
            )


def kth_largest(
    chunks: Callable[[], Iterator[NDArray[np.uint32]]], k: int
) -> tuple[np.uint32, int]:
    """Find the k-th largest of many 32-bit keys with two histograms of their halves."""
    high, above = _find_bin((keys >> np.uint32(16) for keys in chunks()), k)
    same_high = (keys[keys >> np.uint32(16) == high] & np.uint32(0xFFFF) for keys in chunks())
    low, above_low = _find_bin(same_high, k - above)
    return np.uint32((high << 16) | low), above + above_low


def _find_bin(halves: Iterable[NDArray[np.uint32]], k: int) -> tuple[int, int]:
    counts = np.zeros(1 << 16, dtype=np.int64)
    for half in halves:
        counts += np.bincount(half, minlength=1 << 16)
    at_least = counts[::-1].cumsum()[::-1]
    bin_ = int(np.nonzero(at_least >= k)[0][-1])
    return bin_, int(at_least[bin_] - counts[bin_])


def select(
    scores: Iterable[tuple[str, NDArray[np.float32]]], k: int, order: Order = Order.TOP
) -> dict[str, Selected]:
    """Select k entries over all tensors."""
    best = TopK(k, order)
    for name, values in scores:
        best.add(name, values)
        del values  # before the next tensor's are made
    return best.result()
