"""Scores that rank entries, the gradients behind them, and maps of the selected entries.

Source: arXiv 2604.08297, ESI(theta_i) = |sigma(theta_i) * dS(theta)/dtheta_i|, with sigma the
standard deviation of the tensor that holds theta_i.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, digest
from safeweights_peft.errors import SelectionError
from safeweights_peft.fetching import BaseModel
from safeweights_peft.modeling.layout import describe
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode, TensorRecord, entries_by_block
from safeweights_peft.selection.objective import SafetyObjective
from safeweights_peft.selection.pattern import find_place
from safeweights_peft.selection.topk import Order, Selected
from safeweights_peft.settings import Aggregation, Method

NO_GRADIENT = torch.empty(0)


@dataclass(frozen=True)
class Score:
    """One way to score entries, and which end of the ranking is selected."""

    # Of a parameter, its gradient (`NO_GRADIENT` unless needed) and a generator of its own.
    compute: Callable[[Tensor, Tensor, np.random.Generator], Tensor]
    order: Order = Order.TOP
    needs_gradient: bool = True


def compute_sigma(parameter: Tensor) -> Tensor:
    """Compute the standard deviation of a tensor's entries, in float32."""
    return parameter.detach().float().std()


def _compute_esi(parameter: Tensor, gradient: Tensor, _: np.random.Generator) -> Tensor:
    return (compute_sigma(parameter) * gradient).abs_()


def _draw_uniform(parameter: Tensor, _: Tensor, generator: np.random.Generator) -> Tensor:
    return torch.from_numpy(generator.random(tuple(parameter.shape), dtype=np.float32))


# A new score is a member of `settings.Method` and an entry here.
SCORES: Mapping[Method, Score] = MappingProxyType(
    {
        Method.ESI: Score(_compute_esi),
        # Controls: the weights that matter least, and weights that were not chosen at all.
        Method.BOTTOM: Score(_compute_esi, Order.BOTTOM),
        Method.RANDOM: Score(_draw_uniform, needs_gradient=False),
    }
)


def score_entries(
    score: Score,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    *seed: int,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield each parameter's name and scores, float32 of its shape."""
    for name, parameter in parameters.items():
        # Seeded by name, so that neither the order of parameters nor passes change a draw.
        generator = np.random.default_rng([*seed, zlib.crc32(name.encode())])
        gradient = gradients.get(name, NO_GRADIENT)
        yield name, score.compute(parameter.detach(), gradient, generator).float().cpu().numpy()


@dataclass
class GradientSum:
    """A sum of gradients, which can be saved after each term and resumed."""

    gradients: dict[str, Tensor]  # float32, of each parameter's shape and on its device
    terms: int = 0


def sum_gradients(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    objective: SafetyObjective,
    on_term: Callable[[GradientSum], None] = lambda _: None,
    *,
    aggregation: Aggregation = Aggregation.ABS_OF_MEAN,
    resume_from: GradientSum | None = None,
) -> dict[str, Tensor]:
    """Sum dS/dtheta over an objective's terms, in float32 whatever the model's dtype."""
    total = resume_from or GradientSum(
        {
            name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in parameters.items()
        }
    )
    with _add_gradients(model, parameters, total.gradients, aggregation):
        for term in objective.terms(model, total.terms):
            if term.requires_grad:
                term.backward()
            total.terms += 1
            if total.terms == 1:  # before hours are spent on the others
                _check_finite(total.gradients)
            on_term(total)
    return total.gradients


@contextmanager
def _add_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    totals: Mapping[str, Tensor],
    aggregation: Aggregation,
) -> Iterator[None]:
    """Add each gradient to its total as soon as a backward pass has made it."""
    is_trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    hooks = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        parameter.grad = None
        hook = _make_hook(totals[name], aggregation)
        hooks.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, was_trained in is_trained.items():
            parameter.requires_grad_(was_trained)


def _make_hook(total: Tensor, aggregation: Aggregation) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            is_signed = aggregation is Aggregation.ABS_OF_MEAN
            total.add_(parameter.grad if is_signed else parameter.grad.abs())
            # Freed at once: the totals are the only memory of the model's size.
            parameter.grad = None

    return add


def _check_finite(gradients: Mapping[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise SelectionError(
                f"{name}: expected a finite gradient, found NaN or infinity; check the model's "
                "weights, or compute in float32 or bfloat16"
            )


def split_by_layer(names: Iterable[str], layers_per_pass: int | None) -> list[list[str]]:
    """Split names into passes of some layers each; names between layers count as a layer."""
    layers = [list(layer) for _, layer in groupby(names, lambda name: find_place(name).layer)]
    size = layers_per_pass or len(layers)
    passes: list[Sequence[list[str]]] = [
        layers[start : start + size] for start in range(0, len(layers), size)
    ]
    return [[name for layer in group for name in layer] for group in passes]


def check_left(parameters: Mapping[str, nn.Parameter], excluded: Mapping[str, Array]) -> None:
    """Check that a control can select as many entries as are excluded from it."""
    count = sum(indices.size for indices in excluded.values())
    left = sum(
        parameter.numel() - (excluded[name].size if name in excluded else 0)
        for name, parameter in parameters.items()
    )
    if count > left:
        raise SelectionError(
            f"map: expected at most as many entries as it leaves to compare with, found {count} "
            f"and {left} eligible ones left; use a map of lower density"
        )


def build_map(
    model: PreTrainedModel,
    base: BaseModel,
    selected: Mapping[str, Selected],
    selection: dict[str, Any],
    described: Mapping[str, TensorRecord] | None = None,
) -> SafetyMap:
    """Build a map that records where the entries are, on which base, and how they were chosen."""
    reader = CheckpointReader(base.path)
    described = described or describe(model, selected, base.path)
    records = {name: described[name] for name in selected}
    for name, entries in selected.items():
        # From disk: the model in memory may hold the entries in a narrower dtype.
        record, pieces = records[name], entries_by_block(records[name], entries.indices)
        values = reader.gather_pieces(pieces, entries.indices.size, DTYPES[record.dtype])
        records[name] = replace(record, count=values.size, base_digest=digest(values))
    metadata = AdapterMetadata(
        mode=Mode.SPA,
        base_model_name_or_path=base.name,
        revision=base.revision,
        transformers_version=transformers.__version__,
        selection=selection,
        tensors=records,
    )
    return SafetyMap(
        metadata,
        {name: entries.indices for name, entries in selected.items()},
        {name: entries.scores for name, entries in selected.items()},
    )
