"""The diagonal of the Fisher information of benign answers: what changes of weights do to them.

F_i is the mean over requests x of (d log p(y | x) / d theta_i)^2 / T, for an answer y of T tokens
that is drawn from the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.data import Example, collate
from safeweights_peft.errors import SelectionError
from safeweights_peft.modeling.answers import answer_logits, find_layout
from safeweights_peft.selection.scores import DAMPING, check_finite, receiving_gradients

ANSWER_TOKENS = 16  # of an answer that is drawn


@dataclass
class SquareSum:
    """A sum of squared gradients, which can be saved after each row and resumed."""

    squares: dict[str, Tensor]  # float32, of each parameter's shape and on its device
    totals: dict[str, Tensor]  # float32 scalars: the sum of all squares of each watched parameter
    rows: int = 0


def sum_squares(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    watched: Mapping[str, nn.Parameter],
    examples: Sequence[Example],
    on_row: Callable[[SquareSum], None] = lambda _: None,
    *,
    resume_from: SquareSum | None = None,
) -> SquareSum:
    """Sum the squares of each row's gradient, and of watched parameters only their totals."""
    total = resume_from or SquareSum(
        {
            name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in parameters.items()
        },
        {name: torch.zeros((), device=parameter.device) for name, parameter in watched.items()},
    )

    def add(name: str, gradient: Tensor) -> None:
        squared = gradient.float().square()
        if name in total.totals:
            total.totals[name].add_(squared.sum())
        if name in total.squares:
            total.squares[name].add_(squared)

    with receiving_gradients(model, {**watched, **parameters}, add):
        for example in examples[total.rows :]:
            # Row by row: the square of a batch's gradient is not the sum of its rows' squares.
            score_answer(model, example).backward()
            total.rows += 1
            if total.rows == 1:
                check_finite(total.squares)
            on_row(total)
    return total


def score_answer(model: PreTrainedModel, example: Example) -> Tensor:
    """Compute the scalar whose squared gradient is one row's part of F."""
    batch = collate([example], 0, find_layout(model)).to(model.device)
    logits = answer_logits(model, batch)[0]
    losses = F.cross_entropy(logits, batch.answer_ids[0], reduction="sum")
    return losses / math.sqrt(len(example.answer_ids))


def average(totals: Mapping[str, Tensor], entries: int, rows: int) -> float:
    """Compute the mean of F over entries from all parameters' totals."""
    mean = math.fsum(float(totals[name]) for name in sorted(totals)) / entries / rows
    if not 0 < mean < math.inf:
        raise SelectionError(
            f"benign: expected answers that depend on the weights, found a Fisher information of "
            f"{mean:g} on average; check the requests and the model"
        )
    return mean


def damp(squares: Mapping[str, Tensor], rows: int, mean: float) -> dict[str, Tensor]:
    """Turn sums of squares, in place, into F plus a part of its mean."""
    return {name: total.div_(rows).add_(DAMPING * mean) for name, total in squares.items()}
