"""Exact selection of whole rows or columns of matrices, whose scores arrive tensor by tensor.

A matrix is the last two dimensions of a parameter: each expert of a fused one has its own. A group
has the mean of its entries' scores, and a selected entry that of its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safeweights_peft.delta import Array
from safeweights_peft.errors import SelectionError
from safeweights_peft.patch.groups import spread_groups
from safeweights_peft.selection.topk import Order, Selected, TopK, check_scores
from safeweights_peft.settings import Granularity

AXES = {Granularity.ROW: -1, Granularity.COLUMN: -2}  # along which a group lies


@dataclass(frozen=True, eq=False)
class Groups:
    """The rows, or the columns, of all matrices of one parameter."""

    shape: tuple[int, ...]
    granularity: Granularity  # row or column
    scores: NDArray[np.float32]  # (count,), matrix by matrix

    @property
    def length(self) -> int:
        """The number of entries of each group."""
        return self.shape[AXES[self.granularity]]

    def hold(self, size: Fraction, order: Order) -> float:
        """Sum the scores of so many entries of the first groups, times the size's denominator."""
        ranked = np.sort(self.scores.astype(np.float64))[:: -1 if order is Order.TOP else 1]
        # The last group counts in part. In integers but for the scores, so that equal sides of a
        # matrix are found equal.
        parts = self.length * size.denominator
        whole, rest = divmod(size.numerator, parts)
        return float(ranked[:whole].sum() * float(parts) + ranked[whole:][:1].sum() * float(rest))

    def select(self, numbers: Array) -> Selected:
        """List the entries of groups by their ascending numbers; all have their group's score."""
        rows, columns = self.shape[-2:]
        if self.granularity is Granularity.ROW:
            flat = spread_groups(numbers, "row", self.shape)
            return Selected(flat, self.scores[flat // columns])
        flat = spread_groups(numbers, "column", self.shape)
        return Selected(flat, self.scores[flat // (rows * columns) * columns + flat % columns])


class TopGroups:
    """The best groups of a stream of tensors that fit into k entries."""

    # In order of (score, then name, then number) groups are taken until one doesn't fit: a larger
    # k only adds to a selection. All scores of groups are kept, a thousandth of the entries'.

    def __init__(self, k: int, eligible: int, granularity: Granularity, order: Order) -> None:
        self.k, self.order, self._granularity = k, order, granularity
        self._fraction = Fraction(k, eligible)
        self._groups: dict[str, Groups] = {}

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the arrays from which `restore` resumes an interrupted stream."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, groups in self._groups.items():
            arrays[f"{name}/{groups.granularity}"] = groups.scores
            arrays[f"{name}/shape"] = np.array(groups.shape)
        return arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Resume from another stream's state, with the same arguments."""
        for key, scores in arrays.items():
            name, _, kind = key.rpartition("/")
            if kind in tuple(AXES):
                shape = tuple(arrays[f"{name}/shape"].tolist())
                self._groups[name] = Groups(shape, Granularity(kind), scores)

    def add(self, name: str, scores: NDArray[np.float32], excluded: Array | None = None) -> None:
        """Score all groups of one tensor, of whose entries none can be excluded."""
        if excluded is not None:
            raise SelectionError(
                f"{name}: expected to select whole rows or columns, found entries to exclude; "
                "select single entries"
            )
        if name in self._groups:
            raise SelectionError(f"{name}: expected to be scored once, found it twice")
        check_scores(name, np.ascontiguousarray(scores).reshape(-1))
        self._groups[name] = choose_groups(scores, self._granularity, self._fraction, self.order)

    def result(self) -> dict[str, Selected]:
        """Return the selected entries by name, in order of names; the stream has ended."""
        names = sorted(self._groups)
        all_groups = [self._groups[name] for name in names]
        counts = [groups.scores.size for groups in all_groups]
        scores = np.concatenate([groups.scores for groups in all_groups])
        # A stable sort leaves ties in order of names and numbers, in which the scores stand.
        ranks = np.argsort(-scores if self.order is Order.TOP else scores, kind="stable")
        sizes = np.repeat([groups.length for groups in all_groups], counts)[ranks].cumsum()
        chosen = np.sort(ranks[: np.searchsorted(sizes, self.k, side="right")])
        if not chosen.size:
            raise SelectionError(
                f"k: expected at least {sizes[0]} entries, the group of the best score, found "
                f"{self.k}; raise the density"
            )
        starts = np.cumsum([0, *counts])
        parts = np.split(chosen, np.searchsorted(chosen, starts[1:-1]))
        return {
            name: groups.select(numbers - start)
            for name, groups, numbers, start in zip(
                names, all_groups, parts, starts[:-1], strict=True
            )
            if numbers.size
        }


def choose_groups(
    scores: NDArray[np.float32], granularity: Granularity, fraction: Fraction, order: Order
) -> Groups:
    """Score a tensor's groups: rows, columns, or those that hold more in a fraction of it."""
    kinds = [granularity] if granularity in AXES else [*AXES]
    sides = [Groups(scores.shape, kind, _mean(scores, AXES[kind])) for kind in kinds]
    sign = 1 if order is Order.TOP else -1
    # The first of equals, which are the rows.
    return max(sides, key=lambda groups: sign * groups.hold(fraction * scores.size, order))


def _mean(scores: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    means: NDArray[np.float64] = scores.mean(axis=axis, dtype=np.float64)
    return means.astype(np.float32).reshape(-1)


def make_ranking(k: int, eligible: int, granularity: Granularity, order: Order) -> TopK | TopGroups:
    """Make what ranks the scores of all eligible entries, and selects k of them."""
    if granularity is Granularity.ENTRY:
        return TopK(k, order)
    return TopGroups(k, eligible, granularity, order)


def find_longest(shapes: Iterable[tuple[int, ...]], granularity: Granularity) -> int:
    """Count the entries of the longest group that may be selected; 1 for single entries."""
    if granularity is Granularity.ENTRY:
        return 1
    axes = [AXES[granularity]] if granularity in AXES else [*AXES.values()]
    return max(shape[axis] for shape in shapes for axis in axes)
