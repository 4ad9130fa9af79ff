"""Parts of a tensor on disk, mapped one after the other.

Here live the windows through which ``reader`` and ``writer`` touch entries. A mapped page counts as
the process's memory until it is unmapped, so a large tensor is never mapped whole.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safeweights_peft.delta import Array

WINDOW_BYTES = 2**22


def windows(
    path: Path,
    offset: int,
    dtype: np.dtype[Any],
    flat_indices: Array,
    mode: Literal["r", "r+"] = "r",
) -> Iterator[tuple[Array, Array, Array | slice]]:
    """Map the parts of a tensor that hold some entries; other pages are not touched."""
    order: Array | slice = slice(None)
    if (flat_indices[1:] < flat_indices[:-1]).any():
        order = np.argsort(flat_indices)
    ordered = flat_indices[order]
    size = WINDOW_BYTES // dtype.itemsize
    start = 0
    while start < ordered.size:
        first = int(ordered[start]) // size * size
        # The indices' own dtype: another would have numpy convert all of them first.
        last = np.array(min(first + size - 1, int(ordered[-1])), ordered.dtype)
        stop = int(np.searchsorted(ordered, last, side="right"))
        length = (int(ordered[stop - 1]) - first + 1) * dtype.itemsize
        raw = np.memmap(os.fspath(path), np.uint8, mode, offset + first * dtype.itemsize, (length,))
        positions = slice(start, stop) if isinstance(order, slice) else order[start:stop]
        # As numpy indexes with, so that it need not convert them at each use.
        local = np.subtract(ordered[start:stop], first, dtype=np.intp)
        yield raw.view(np.ndarray).view(dtype), local, positions
        start = stop
