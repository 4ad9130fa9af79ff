"""Exact global top-k over scores that arrive tensor by tensor, in memory bounded by k.

The result is that of a sort of all scores by (score, then name, then index), so it does not depend
on the order in which tensors arrive or on how they were sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safeweights_peft.delta import Array, index_dtype
from safeweights_peft.errors import SelectionError

NO_SCORES = np.empty(0, np.float32)
# Entries beyond the k-th are dropped when they exceed this fraction of k: a rare pass over all of
# them, for 3 % more memory.
SLACK = 1 / 32
CHUNK = 1 << 16  # scores compared at a time, so that temporary arrays stay small


class Order(StrEnum):
    """Which end of the ranking is selected."""

    TOP = "top"
    BOTTOM = "bottom"


# Excluded entries get the score that ranks last.
LAST = {Order.TOP: np.float32(0), Order.BOTTOM: np.finfo(np.float32).max}


@dataclass(frozen=True, eq=False)
class Selected:
    """Selected entries of one tensor: flat, row-major, sorted indices and their scores."""

    indices: NDArray[np.int32] | NDArray[np.int64]  # int64 for tensors of 2**31 entries or more
    scores: NDArray[np.float32]


class TopK:
    """The k best entries of a stream of tensors; a tie goes to the smaller name, then index."""

    def __init__(self, k: int, order: Order = Order.TOP) -> None:
        if k < 1:
            raise SelectionError(f"k: expected at least 1, found {k}; raise the density")
        self.k = k
        self.order = order
        self._kept: dict[str, Selected] = {}
        self._bound = np.uint32(0)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the arrays from which `restore` resumes an interrupted stream."""
        arrays: dict[str, NDArray[Any]] = {"bound": np.array([self._bound])}
        for name, kept in self._kept.items():
            arrays |= {f"{name}/indices": kept.indices, f"{name}/scores": kept.scores}
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Resume from another stream's state, with the same k and order."""
        self._bound = np.uint32(arrays["bound"][0])
        names = [key.removesuffix("/scores") for key in arrays if key.endswith("/scores")]
        # Copied, because `_shrink` resizes arrays in place, which borrowed ones refuse.
        self._kept = {
            name: Selected(arrays[f"{name}/indices"].copy(), arrays[f"{name}/scores"].copy())
            for name in names
        }

    def add(self, name: str, scores: NDArray[np.float32], excluded: Array | None = None) -> None:
        """Rank all scores of one tensor; entries at the excluded indices come last of all."""
        if name in self._kept:
            raise SelectionError(f"{name}: expected to be scored once, found it twice")
        flat = np.ascontiguousarray(scores, dtype=np.float32).reshape(-1)
        check_scores(name, flat)
        if excluded is not None:
            flat = flat.copy()
            flat[excluded] = LAST[self.order]
        ties = sum(int((ranks >= self._bound).sum()) for _, ranks in self._rank(flat))
        if self._count() + ties > self.k * (1 + SLACK):
            ties = self._raise_bound(name, flat)
        self._kept[name] = self._take(flat, ties)

    def result(self) -> dict[str, Selected]:
        """Return the k selected entries by name, in order of names; the stream has ended."""
        if self._count() < self.k:
            raise SelectionError(
                f"k: expected at most {self._count()} entries, found {self.k}; lower the density "
                "or make more parameters eligible"
            )
        self._raise_bound()
        return {name: kept for name, kept in sorted(self._kept.items()) if kept.indices.size}

    def _count(self) -> int:
        return sum(kept.indices.size for kept in self._kept.values())

    def _raise_bound(self, name: str = "", scores: NDArray[np.float32] = NO_SCORES) -> int:
        """Drop entries behind the k-th of all; return how many ties of the new tensor are in."""
        by_name = {kept_name: kept.scores for kept_name, kept in self._kept.items()}
        by_name[name] = scores

        def all_ranks() -> Iterator[NDArray[np.uint32]]:
            return (ranks for values in by_name.values() for _, ranks in self._rank(values))

        self._bound, above = find_kth_largest(all_ranks, self.k)
        free, new_ties = self.k - above, 0
        for tensor in sorted(by_name):
            ties = min(self._count_ties(by_name[tensor]), free)
            free -= ties
            if tensor in self._kept:
                self._shrink(self._kept[tensor], ties)
            else:
                new_ties = ties
        return new_ties

    def _shrink(self, kept: Selected, ties: int) -> None:
        """Drop kept entries below the bound, and all but the first ties."""
        end = 0
        for start, ranks in self._rank(kept.scores):
            chosen = self._choose(ranks, ties)
            ties -= int((ranks[chosen] == self._bound).sum())
            stop = end + chosen.size
            kept.indices[end:stop] = kept.indices[start : start + CHUNK][chosen]
            kept.scores[end:stop] = kept.scores[start : start + CHUNK][chosen]
            end = stop
        # In place: a copy of what is kept would double the memory. No other array shares it.
        kept.indices.resize(end, refcheck=False)
        kept.scores.resize(end, refcheck=False)

    def _take(self, scores: NDArray[np.float32], ties: int) -> Selected:
        """Copy a new tensor's entries above the bound, and its first ties."""
        above = sum(int((ranks > self._bound).sum()) for _, ranks in self._rank(scores))
        size = above + min(ties, self._count_ties(scores))
        taken = Selected(np.empty(size, index_dtype(scores.size)), np.empty(size, np.float32))
        end = 0
        for start, ranks in self._rank(scores):
            chosen = self._choose(ranks, ties)
            ties -= int((ranks[chosen] == self._bound).sum())
            stop = end + chosen.size
            taken.indices[end:stop] = chosen + start
            taken.scores[end:stop] = scores[start : start + CHUNK][chosen]
            end = stop
        return taken

    def _count_ties(self, scores: NDArray[np.float32]) -> int:
        return sum(int((ranks == self._bound).sum()) for _, ranks in self._rank(scores))

    def _choose(self, ranks: NDArray[np.uint32], ties: int) -> NDArray[np.int64]:
        """Find the positions above the bound, and of the first ties."""
        chosen = ranks > self._bound
        chosen[np.nonzero(ranks == self._bound)[0][:ties]] = True
        return np.nonzero(chosen)[0]

    def _rank(self, scores: NDArray[np.float32]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Map scores chunk by chunk to integers, the largest for the entry to be selected first."""
        for start in range(0, scores.size, CHUNK):
            # Bits of floats that aren't negative are ordered as the floats; adding 0 makes -0 a 0.
            bits = (scores[start : start + CHUNK] + np.float32(0)).view(np.uint32)
            yield start, bits if self.order is Order.TOP else ~bits


def check_scores(name: str, scores: NDArray[np.float32]) -> None:
    """Refuse scores, flat, that can't be ranked."""
    for start in range(0, scores.size, CHUNK):
        chunk = scores[start : start + CHUNK]
        if not (np.isfinite(chunk).all() and (chunk >= 0).all()):
            raise SelectionError(
                f"{name}: expected finite scores of at least 0, found others; "
                "check the model's gradients (a float16 overflow, or a NaN in a weight)"
            )


def find_kth_largest(
    chunks: Callable[[], Iterator[NDArray[np.uint32]]], k: int
) -> tuple[np.uint32, int]:
    """Find the k-th largest of many integers, and how many are larger."""
    # Two histograms of 16-bit halves take 1 MB, however many integers there are.
    high, above = _find_bin((ranks >> np.uint32(16) for ranks in chunks()), k)
    low_halves = (ranks[ranks >> np.uint32(16) == high] & np.uint32(0xFFFF) for ranks in chunks())
    low, above_low = _find_bin(low_halves, k - above)
    return np.uint32((high << 16) | low), above + above_low


def _find_bin(halves: Iterable[NDArray[np.uint32]], k: int) -> tuple[int, int]:
    counts = np.zeros(1 << 16, dtype=np.int64)
    for half in halves:
        counts += np.bincount(half, minlength=1 << 16)
    at_least = counts[::-1].cumsum()[::-1]
    bin_ = int(np.nonzero(at_least >= k)[0][-1])
    return bin_, int(at_least[bin_] - counts[bin_])


def select(
    scores: Iterable[tuple[str, NDArray[np.float32]]],
    k: int,
    order: Order = Order.TOP,
    excluded: Mapping[str, Array] = MappingProxyType({}),
) -> dict[str, Selected]:
    """Select k entries over all tensors, excluded ones last."""
    best = TopK(k, order)
    for name, values in scores:
        best.add(name, values, excluded.get(name))
        del values  # before the next tensor's are made
    return best.result()
