"""Whole rows and columns of a parameter's matrices, and the flat indices that they stand for."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from safeweights_peft.delta import Array, index_dtype

Group = Literal["row", "column"]
"""What a number counts, over all matrices: the last two dimensions of a parameter are one."""


def count_groups(shape: Sequence[int], group: Group) -> tuple[int, int]:
    """Return how many rows or columns a shape of two or more dimensions has, and their length."""
    *batch, rows, columns = shape
    number, length = (rows, columns) if group == "row" else (columns, rows)
    return math.prod(batch) * number, length


def find_groups(indices: Array, shape: Sequence[int]) -> tuple[Group, Array] | None:
    """Find the ascending numbers of the rows, or else columns, that checked indices fill; or None.

    A group of one entry is none.
    """
    if len(shape) < 2 or not indices.size:
        return None
    groups: tuple[Group, ...] = ("row", "column")
    for group in groups:
        _, length = count_groups(shape, group)
        if length > 1 and indices.size % length == 0 and _may_fill(indices, shape, group):
            numbers = _find_heads(indices, shape, group)
            is_whole = numbers.size * length == indices.size
            if is_whole and np.array_equal(spread_groups(numbers, group, shape), indices):
                return group, numbers
    return None


def count_lines(
    shapes: Mapping[str, Sequence[int]], indices: Mapping[str, Array]
) -> dict[str, int]:
    """Count the rows and columns that the checked indices of parameters fill."""
    counts = {"rows": 0, "columns": 0}
    for name, positions in indices.items():
        if found := find_groups(positions, shapes[name]):
            group, numbers = found
            counts[f"{group}s"] += numbers.size
    return counts


def spread_groups(numbers: Array, group: Group, shape: Sequence[int]) -> Array:
    """Return the flat indices of all entries of rows or columns; ascending, as the numbers are."""
    rows, columns = shape[-2:]
    numbers = numbers.astype(index_dtype(math.prod(shape)), copy=False)
    one = numbers.dtype.type
    if group == "row":
        places = np.arange(columns, dtype=numbers.dtype)
        flat: Array = (numbers[:, None] * one(columns) + places).reshape(-1)
        return flat
    batch, column = np.divmod(numbers, one(columns))
    steps = np.arange(rows, dtype=numbers.dtype)[:, None] * one(columns)
    flat = (steps + (batch * one(rows * columns) + column)).reshape(-1)
    # Of one matrix they ascend already. Runs that ascend are merged, in time that is linear.
    if len(shape) > 2:
        flat.sort(kind="stable")
    return flat


def _may_fill(indices: Array, shape: Sequence[int], group: Group) -> bool:
    """Look whether the first index begins a group; scattered ones nearly always fail here."""
    rows, columns = shape[-2:]
    first = int(indices[0])
    second = first + (1 if group == "row" else columns)
    begins = first % columns == 0 if group == "row" else first % (rows * columns) < columns
    if not begins or second > int(indices[-1]):
        return False
    return int(indices[np.searchsorted(indices, indices.dtype.type(second))]) == second


def _find_heads(indices: Array, shape: Sequence[int], group: Group) -> Array:
    """Return the number of the row or column that each first entry of one among indices begins."""
    rows, columns = shape[-2:]
    wide = indices.dtype.type(columns)
    if group == "row":
        numbers: Array = indices[::columns] // wide
        return numbers
    batch, place = np.divmod(indices, indices.dtype.type(rows * columns))
    numbers = (batch * wide + place)[place < columns]
    return numbers
