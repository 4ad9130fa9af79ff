"""Random entries to compare a map's with: as many, in whole rows or columns where the map's are."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedModel

from safeweights_peft.delta import Array
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.patch.groups import count_groups, find_groups, spread_groups
from safeweights_peft.selection.scores import SCORES, score_entries
from safeweights_peft.selection.topk import Order, select
from safeweights_peft.settings import Method

Indices = Mapping[str, Array]


def draw_control(model: PreTrainedModel, taken: Indices, *seed: int) -> Indices:
    """Draw as many random entries of a model as are taken, and none of those."""
    shapes = {name: tuple(model.get_parameter(name).shape) for name in taken}
    drawn = draw_lines(shapes, taken, *seed)
    # A matrix of which more than half is taken has too few other rows. What is missing is drawn as
    # single entries anywhere, as all is for a map of single entries.
    if missing := count_entries(taken) - count_entries(drawn):
        excluded = {name: _join(indices, drawn.get(name)) for name, indices in taken.items()}
        scores = score_entries(SCORES[Method.RANDOM], eligible_parameters(model), {}, *seed)
        for name, entries in select(scores, missing, Order.BOTTOM, excluded).items():
            drawn[name] = _join(entries.indices, drawn.get(name))
    return drawn


def draw_lines(
    shapes: Mapping[str, tuple[int, ...]], taken: Indices, *seed: int
) -> dict[str, Array]:
    """Draw as many other rows, or columns, of each matrix as are taken, or as many as it has."""
    drawn = {}
    for name, indices in taken.items():
        shape = shapes[name]
        if (found := find_groups(indices, shape)) is None:
            continue
        group, numbers = found
        total, _ = count_groups(shape, group)
        size = shape[-2 if group == "row" else -1]  # of one matrix
        # By name, so that the draw of one parameter doesn't depend on which others are taken.
        generator = np.random.default_rng([*seed, zlib.crc32(f"lines of {name}".encode())])
        keys = generator.random(total)
        keys[numbers] = 1  # behind all others
        counts = np.bincount(numbers // size, minlength=total // size)
        is_drawn = np.arange(size) < np.minimum(counts, size - counts)[:, None]
        order = keys.reshape(-1, size).argsort(axis=1) + np.arange(0, total, size)[:, None]
        if is_drawn.any():
            drawn[name] = spread_groups(np.sort(order[is_drawn]), group, shape)
    return drawn


def count_entries(indices: Indices) -> int:
    """Count the entries of all parameters."""
    return sum(positions.size for positions in indices.values())


def _join(indices: Array, others: Array | None) -> Array:
    return indices if others is None else np.union1d(indices, others)
