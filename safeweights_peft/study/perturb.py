"""Entries of a model in memory, perturbed for a while: what it loses shows what they carry."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safeweights_peft.delta import Array
from safeweights_peft.evaluation.utility import Patched
from safeweights_peft.freeze import FrozenEntries, make_switch
from safeweights_peft.modeling.tensors import add_rounded, to_torch
from safeweights_peft.selection.scores import compute_sigma

Change = Callable[[str, nn.Parameter, Tensor], Tensor]
"""Takes a parameter's name, the parameter, and some of its entries; returns their replacement."""


def perturb(model: PreTrainedModel, indices: Mapping[str, Array], change: Change) -> Patched:
    """Compute replacements of entries, to be in the model while a context lasts."""
    replaced = []
    for name, positions in indices.items():
        parameter = model.get_parameter(name)
        entries = FrozenEntries(name, parameter, to_torch(positions))
        replaced.append((entries, change(name, parameter, entries.originals)))
    return make_switch(model, replaced)


def noise(factor: float, *seed: int) -> Change:
    """Make a change that adds factor * sigma * N(0, 1), sigma of the whole tensor, as in ESI."""

    def add(name: str, parameter: nn.Parameter, entries: Tensor) -> Tensor:
        # By name, so that the draw of one parameter doesn't depend on which others are perturbed.
        generator = np.random.default_rng([*seed, zlib.crc32(f"noise at {name}".encode())])
        drawn = torch.from_numpy(generator.standard_normal(entries.numel(), np.float32))
        return add_rounded(entries, factor * compute_sigma(parameter) * drawn.to(entries.device))

    return add


def zeros(name: str, parameter: nn.Parameter, entries: Tensor) -> Tensor:
    """Replace entries by zeros."""
    return torch.zeros_like(entries)
