"""Controls for a selection: as many entries that it doesn't hold, at random or by lowest score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import nn

from safeweights_peft.delta import Array
from safeweights_peft.errors import SelectionError
from safeweights_peft.selection.topk import Order, Selected, select

LAST = {Order.TOP: np.float32(0), Order.BOTTOM: np.finfo(np.float32).max}
"""What entries are scored with that are left out: of the lowest rank, whichever end is kept."""


def check_left(parameters: Mapping[str, nn.Parameter], taken: Mapping[str, Array]) -> None:
    """Check that as many entries as are taken are left."""
    free = sum(
        parameter.numel() - (taken[name].size if name in taken else 0)
        for name, parameter in parameters.items()
    )
    count = _count(taken)
    if count > free:
        raise SelectionError(
            f"map: expected at most as many entries as it leaves to compare with, found {count} "
            f"and {free} eligible ones left; use a map of lower density"
        )


def select_lowest(
    scores: Iterable[tuple[str, NDArray[np.float32]]], taken: Mapping[str, Array]
) -> dict[str, Selected]:
    """Select as many entries as are taken: those with the lowest scores, and none of the taken.

    Of uniform random scores (`random_scores`) that is a uniform choice. `check_left` tells whether
    there are enough.
    """
    return select(leave_out(scores, taken, Order.BOTTOM), _count(taken), Order.BOTTOM)


def leave_out(
    scores: Iterable[tuple[str, NDArray[np.float32]]], taken: Mapping[str, Array], order: Order
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Score entries so that they are selected last."""
    for name, values in scores:
        flat = np.ascontiguousarray(values).reshape(-1)
        if name in taken:
            flat[taken[name]] = LAST[order]
        yield name, flat


def _count(taken: Mapping[str, Array]) -> int:
    return sum(indices.size for indices in taken.values())
