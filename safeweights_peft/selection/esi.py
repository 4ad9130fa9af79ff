"""Expected Safety Impact: how much an entry, moved by its tensor's usual amount, moves safety.

ESI(theta_i) = |sigma(theta_i) * dS(theta)/dtheta_i| (arXiv 2604.08297), with sigma the standard
deviation of the tensor that holds theta_i.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection.objective import SafetyObjective
from safeweights_peft.settings import Aggregation


@dataclass
class Accumulated:
    """What has been summed up to now.

    Attributes:
        gradients: float32 by name, of each parameter's shape, on its device.
        terms: of how many terms.
    """

    gradients: dict[str, torch.Tensor]
    terms: int = 0


def accumulate_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    objective: SafetyObjective,
    on_term: Callable[[Accumulated], None] = lambda _: None,
    *,
    aggregation: Aggregation = Aggregation.ABS_OF_MEAN,
    so_far: Accumulated | None = None,
) -> dict[str, torch.Tensor]:
    """Compute dS/dtheta, summed over the objective's terms in float32 whatever the model's dtype.

    Each parameter's own gradient is added and freed as soon as backward has finished it, so that
    the accumulators are the only full-sized memory.
    """
    if so_far is None:
        so_far = Accumulated(
            {
                name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
                for name, parameter in parameters.items()
            }
        )
    hooks = []
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        parameter.grad = None
        hook = _adding_hook(so_far.gradients[name], aggregation)
        hooks.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        for term in objective.terms(model, so_far.terms):
            if term.requires_grad:
                term.backward()
            so_far.terms += 1
            if so_far.terms == 1:
                _check_finite(so_far.gradients)
            on_term(so_far)
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, was_required in required.items():
            parameter.requires_grad_(was_required)
    return so_far.gradients


def _adding_hook(
    gradient: torch.Tensor, aggregation: Aggregation
) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            is_signed = aggregation is Aggregation.ABS_OF_MEAN
            gradient.add_(parameter.grad if is_signed else parameter.grad.abs())
            parameter.grad = None

    return add


def _check_finite(gradients: Mapping[str, torch.Tensor]) -> None:
    """Look at the first term's gradients, before hours are spent on the others."""
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise SelectionError(
                f"{name}: expected a finite gradient, found NaN or infinity; check the model's "
                "weights, or compute in float32 or bfloat16"
            )


def layer_groups(names: Iterable[str], layers_per_pass: int | None) -> list[list[str]]:
    """Share parameters out over passes, a few layers in each."""
    layers = [list(each) for _, each in groupby(names, layer_of)]
    size = layers_per_pass or len(layers)
    passes = (layers[start : start + size] for start in range(0, len(layers), size))
    return [[name for layer in each for name in layer] for each in passes]


def layer_of(name: str) -> str | None:
    """Find the numbered layer that a parameter belongs to."""
    found = re.search(r"\.\d+\.", name)
    return name[: found.end()] if found else None


def sigma(parameter: torch.Tensor) -> torch.Tensor:
    """Compute the standard deviation of a tensor, its entries' usual amount of change."""
    return parameter.detach().float().std()


def esi_scores(
    parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield ESI tensor by tensor."""
    for name, parameter in parameters.items():
        yield name, (sigma(parameter) * gradients[name]).abs_().cpu().numpy()


def random_scores(
    parameters: Mapping[str, nn.Parameter], *seed: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield uniform scores: their top-k is a uniform choice, the control for ESI's."""
    for name, parameter in parameters.items():
        generator = np.random.default_rng([*seed, zlib.crc32(name.encode())])
        yield name, generator.random(tuple(parameter.shape), dtype=np.float32)
