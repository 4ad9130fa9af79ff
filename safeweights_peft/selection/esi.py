"""Expected Safety Impact: how much an entry, moved by its tensor's usual amount, moves safety.

ESI(theta_i) = |sigma(theta_i) * dS(theta)/dtheta_i| (arXiv 2604.08297), with sigma the standard
deviation of the tensor that holds theta_i.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection.objective import SafetyObjective


def accumulate_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    objective: SafetyObjective,
    on_term: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Computes dS/dtheta, summed over the objective's terms in float32 whatever the model's dtype.

    Each parameter's own gradient is added and freed as soon as backward has finished it, so that
    the accumulators are the only full-sized memory.

    Args:
        model: the model to be scored; left as it is, but for gradients that it held before.
        parameters: eligible parameters by name; only these get gradients.
        objective: what to differentiate.
        on_term: called after each term, for progress.

    Returns:
        Float32 gradients by name, of each parameter's shape, on its device.

    Raises:
        SelectionError: no parameter takes part in the objective.
    """
    gradients = {
        name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        for name, parameter in parameters.items()
    }
    reached: set[str] = set()
    hooks = []
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        parameter.grad = None
        hook = _adding_hook(name, gradients[name], reached)
        hooks.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        for term in objective.terms(model):
            if term.requires_grad:
                term.backward()
            on_term()
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, was_required in required.items():
            parameter.requires_grad_(was_required)
    _check_reached(gradients, reached)
    return gradients


def _adding_hook(
    name: str, gradient: torch.Tensor, reached: set[str]
) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            gradient.add_(parameter.grad)
            parameter.grad = None
            reached.add(name)

    return add


def _check_reached(gradients: Mapping[str, torch.Tensor], reached: set[str]) -> None:
    missed = sorted(set(gradients) - reached)
    if missed and len(missed) == len(gradients):
        raise SelectionError(
            f"{missed[0]}: expected a gradient, found none, nor for any other parameter; "
            "the objective doesn't depend on this model"
        )


def sigma(parameter: torch.Tensor) -> torch.Tensor:
    """Computes the standard deviation of a tensor, its entries' usual amount of change.

    Args:
        parameter: a tensor of any dtype.

    Returns:
        A float32 scalar, on its device.
    """
    return parameter.detach().float().std()


def esi_scores(
    parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yields ESI tensor by tensor.

    Args:
        parameters: eligible parameters by name.
        gradients: dS/dtheta of each, float32.

    Yields:
        Names and float32 scores of the parameter's shape.
    """
    for name, parameter in parameters.items():
        yield name, (sigma(parameter) * gradients[name]).abs_().cpu().numpy()


def random_scores(
    parameters: Mapping[str, nn.Parameter], *seed: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yields uniform scores: their top-k is a uniform choice, the control for ESI's.

    Args:
        parameters: eligible parameters by name.
        *seed: with a tensor's name, these fix that tensor's scores.

    Yields:
        Names and float32 scores in [0, 1) of the parameter's shape.
    """
    for name, parameter in parameters.items():
        generator = np.random.default_rng([*seed, zlib.crc32(name.encode())])
        yield name, generator.random(tuple(parameter.shape), dtype=np.float32)
