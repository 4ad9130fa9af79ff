"""Exact global top-k over scores that arrive tensor by tensor, in memory bounded by k.

Pure numpy. The selected set is that of a sort of all scores by (score, then name, then index), so
it does not depend on the order in which tensors arrive or on how they were sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from safeweights_peft.delta import index_dtype
from safeweights_peft.errors import SelectionError

CHUNK = 1 << 16
"""Entries looked at together: temporary arrays stay this small."""
SLACK = 8
"""Candidates are pruned when they exceed k by one part in this many."""


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
    """Keeps the k best-scored entries of a stream of tensors.

    Ties at the k-th score go to the smaller name, then to the smaller index.
    """

    def __init__(self, k: int, order: Order = Order.TOP) -> None:
        """Starts with nothing kept.

        Args:
            k: how many entries to keep, at least 1.
            order: the highest scores, or the lowest.

        Raises:
            SelectionError: k is not positive.
        """
        if k < 1:
            raise SelectionError(f"k: expected at least 1, found {k}; raise the density")
        self.k = k
        self.order = order
        self._kept: dict[str, Selected] = {}
        self._count = 0
        self._bound = np.uint32(0)

    def add(self, name: str, scores: NDArray[np.float32]) -> None:
        """Offers all scores of one tensor.

        Args:
            name: the tensor's name; each may be offered once.
            scores: float32 of any shape, finite and not negative.

        Raises:
            SelectionError: a name comes twice, or a score is negative or not finite.
        """
        if name in self._kept:
            raise SelectionError(f"{name}: expected to be scored once, found it twice")
        flat = np.ascontiguousarray(scores, dtype=np.float32).reshape(-1)
        self._kept[name] = Selected(np.empty(0, index_dtype(flat.size)), np.empty(0, np.float32))
        for start in range(0, flat.size, CHUNK):
            self._add_chunk(name, flat[start : start + CHUNK], start)
            if self._count > self.k + self.k // SLACK:
                self._prune()

    def result(self) -> dict[str, Selected]:
        """Ends the stream.

        Returns:
            For each tensor that has selected entries, in name order, these entries: k in all.

        Raises:
            SelectionError: fewer than k entries were offered.
        """
        if self._count < self.k:
            raise SelectionError(
                f"k: expected at most {self._count} entries, found {self.k}; lower the density "
                "or make more parameters eligible"
            )
        self._prune()
        return {name: kept for name, kept in sorted(self._kept.items()) if kept.indices.size}

    def _add_chunk(self, name: str, chunk: NDArray[np.float32], start: int) -> None:
        if not (np.isfinite(chunk).all() and (chunk >= 0).all()):
            raise SelectionError(
                f"{name}: expected finite scores of at least 0, found others; "
                "check the model's gradients (a float16 overflow, or a NaN in a weight)"
            )
        (hits,) = np.nonzero(self._keys(chunk) >= self._bound)
        if not hits.size:
            return
        kept = self._kept[name]
        indices = (hits + start).astype(kept.indices.dtype)
        self._kept[name] = Selected(
            np.concatenate([kept.indices, indices]), np.concatenate([kept.scores, chunk[hits]])
        )
        self._count += hits.size

    def _keys(self, scores: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Maps scores to unsigned integers that grow with how much they are wanted.

        The bits of floats that are not negative order as the floats do; adding 0 turns -0 into 0.
        """
        bits = (scores + np.float32(0)).view(np.uint32)
        return bits if self.order is Order.TOP else ~bits

    def _prune(self) -> None:
        """Drops everything that ranks behind the k-th entry, ties included."""
        if self._count <= self.k:
            return
        self._bound, above = kth_largest(self._chunks, self.k)
        ties = self.k - above
        for name in sorted(self._kept):
            kept = self._kept[name]
            keys = self._keys(kept.scores)
            (tied,) = np.nonzero(keys == self._bound)
            keep = keys > self._bound
            keep[tied[:ties]] = True
            ties -= min(ties, tied.size)
            self._kept[name] = Selected(kept.indices[keep], kept.scores[keep])
        self._count = self.k

    def _chunks(self) -> Iterator[NDArray[np.uint32]]:
        for kept in self._kept.values():
            for start in range(0, kept.scores.size, CHUNK):
                yield self._keys(kept.scores[start : start + CHUNK])


def kth_largest(
    chunks: Callable[[], Iterator[NDArray[np.uint32]]], k: int
) -> tuple[np.uint32, int]:
    """Finds the k-th largest of many 32-bit keys with two histograms of their halves.

    Args:
        chunks: called twice; each call goes through all keys in pieces.
        k: the rank, from 1 to the number of keys.

    Returns:
        The k-th largest key, and how many keys are larger.
    """
    high, above = _find_bin((keys >> 16 for keys in chunks()), k)
    same_high = (keys[keys >> 16 == high] & 0xFFFF for keys in chunks())
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
    """Selects k entries over all tensors.

    Args:
        scores: names and scores, tensor by tensor.
        k: how many entries to select.
        order: the highest scores, or the lowest.

    Returns:
        The selected entries of each tensor that has any, in name order.
    """
    best = TopK(k, order)
    for name, values in scores:
        best.add(name, values)
    return best.result()
