"""Scores that rank entries, the gradients behind them, and maps of the selected entries.

Sources: arXiv 2604.08297, ESI(theta_i) = |sigma(theta_i) * dS(theta)/dtheta_i|, with sigma the
standard deviation of the tensor that holds theta_i. Near the base, KL(base || theta) is half of
sum F_i * d_i^2 over changes d, F being the diagonal of the Fisher information: the most that an
entry gains of S per KL goes as g^2 / F.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

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
from safeweights_peft.modeling.tensors import require_gradients
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode, TensorRecord, entries_by_block
from safeweights_peft.selection.groups import AXES
from safeweights_peft.selection.objective import SafetyObjective
from safeweights_peft.selection.pattern import find_place
from safeweights_peft.selection.topk import Order, Selected
from safeweights_peft.settings import Aggregation, Granularity, Method

NOTHING = torch.empty(0)
DAMPING = 0.1  # of the mean of F, added to F: of some hundred rows, F is 0 where it can't be


class Evidence(NamedTuple):
    """What one parameter's scores are computed from: tensors of its shape, or `NOTHING`."""

    parameter: Tensor
    gradient: Tensor  # dS/dtheta, or the change by training
    harm: Tensor  # damped Fisher information of benign answers
    generator: np.random.Generator
    granularity: Granularity  # of what is selected


class Reads(StrEnum):
    """What a score reads beside the weights."""

    NOTHING = "nothing"
    GRADIENT = "gradient"  # of safety
    HARM = "harm"  # the gradient, and what changes do to benign answers
    CHANGE = "change"  # what training does to the weights


@dataclass(frozen=True)
class Score:
    """One way to score entries, and which end of the ranking is selected."""

    compute: Callable[[Evidence], Tensor]
    order: Order = Order.TOP
    reads: Reads = Reads.GRADIENT

    @property
    def needs_gradient(self) -> bool:
        """Whether safety is differentiated."""
        return self.reads in (Reads.GRADIENT, Reads.HARM)


def compute_sigma(parameter: Tensor) -> Tensor:
    """Compute the standard deviation of a tensor's entries, in float32."""
    return parameter.detach().float().std()


def _compute_esi(evidence: Evidence) -> Tensor:
    return (compute_sigma(evidence.parameter) * evidence.gradient).abs_()


def _compute_gain_per_harm(evidence: Evidence) -> Tensor:
    # The division comes first: squares of small gradients are no float32 numbers.
    return (evidence.gradient / evidence.harm).mul_(evidence.gradient)


def _draw_uniform(evidence: Evidence) -> Tensor:
    # One number for all of a group: means over groups would favour the shortest ones.
    shape, granularity = list(evidence.parameter.shape), evidence.granularity
    if granularity is Granularity.AUTO:
        granularity = Granularity.ROW if evidence.generator.random() < 0.5 else Granularity.COLUMN
    if granularity in AXES:
        shape[AXES[granularity]] = 1
    drawn = torch.from_numpy(evidence.generator.random(shape, dtype=np.float32))
    return drawn.expand(evidence.parameter.shape)


# A new score is a member of `settings.Method` and an entry here.
SCORES: Mapping[Method, Score] = MappingProxyType(
    {
        Method.ESI: Score(_compute_esi),
        Method.FISHER: Score(_compute_gain_per_harm, reads=Reads.HARM),
        # Controls: weights that were not chosen at all, and the weights that matter least.
        Method.RANDOM: Score(_draw_uniform, reads=Reads.NOTHING),
        Method.BOTTOM: Score(_compute_esi, Order.BOTTOM),
        Method.MAGNITUDE: Score(lambda it: it.parameter.float().abs(), reads=Reads.NOTHING),
        Method.MOVEMENT: Score(lambda it: it.gradient.abs(), reads=Reads.CHANGE),
    }
)


def score_entries(
    score: Score,
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, Tensor],
    *seed: int,
    harms: Mapping[str, Tensor] = MappingProxyType({}),
    granularity: Granularity = Granularity.ENTRY,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield each parameter's name and scores, float32 of its shape."""
    for name, parameter in parameters.items():
        # Seeded by name, so that neither the order of parameters nor passes change a draw.
        generator = np.random.default_rng([*seed, zlib.crc32(name.encode())])
        gradient, harm = (kind.get(name, NOTHING) for kind in (gradients, harms))
        evidence = Evidence(parameter.detach(), gradient, harm, generator, granularity)
        yield name, score.compute(evidence).float().cpu().numpy()


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
    is_signed = aggregation is Aggregation.ABS_OF_MEAN

    def add(name: str, gradient: Tensor) -> None:
        total.gradients[name].add_(gradient if is_signed else gradient.abs())

    with receiving_gradients(model, parameters, add):
        for term in objective.terms(model, total.terms):
            if term.requires_grad:
                term.backward()
            total.terms += 1
            if total.terms == 1:  # before hours are spent on the others
                check_finite(total.gradients)
            on_term(total)
    return total.gradients


@contextmanager
def receiving_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    receive: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Hand over each gradient as soon as a backward pass has made it, and keep none."""
    with require_gradients(model, parameters.values()):
        hooks = []
        for name, parameter in parameters.items():
            parameter.grad = None
            hook = _make_hook(name, receive)
            hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def _make_hook(name: str, receive: Callable[[str, Tensor], None]) -> Callable[[Tensor], None]:
    def hand_over(parameter: Tensor) -> None:
        if parameter.grad is not None:
            receive(name, parameter.grad)
            # Freed at once: the totals are the only memory of the model's size.
            parameter.grad = None

    return hand_over


def check_finite(gradients: Mapping[str, Tensor]) -> None:
    """Refuse gradients, or their squares, that hold what is no number."""
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
