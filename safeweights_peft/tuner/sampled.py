"""Matrix products at selected entries alone, or rows or columns, and a layer trained by them.

Autograd multiplies whole matrices, of which one entry in a hundred is kept. Here each selected
entry is one dot product over the tokens, which at low density takes a third of the time. Whole rows
or columns are a smaller product of the same kind, on any device and in any dtype.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from safeweights_peft.modeling.tensors import to_numpy, to_torch
from safeweights_peft.patch.groups import Group, find_groups

DENSEST = 0.1
"""Above this density the whole product is faster on a CPU."""


class Lines(NamedTuple):
    """Whole rows or columns of a matrix."""

    group: Group
    numbers: Tensor  # (rank,), ascending, int64


def find_lines(indices: Tensor, shape: Sequence[int]) -> Lines | None:
    """Find the rows or columns of a matrix that flat indices fill; None if they don't."""
    if len(shape) != 2 or type(indices) is not Tensor or indices.is_meta:  # nothing to look at
        return None
    found = find_groups(to_numpy(indices), shape)
    if found is None:
        return None
    return Lines(found[0], to_torch(found[1]).to(indices.device, torch.int64))


def csr_pattern(indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Build the CSR pattern that ``torch.sparse.sampled_addmm`` expects from flat indices."""
    rows, columns = shape
    starts = torch.arange(
        0, (rows + 1) * columns, columns, dtype=indices.dtype, device=indices.device
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.searchsorted(indices, starts, out_int32=indices.dtype is torch.int32),
            indices % columns,
            # Products are written with beta 0: nothing reads what stands here.
            torch.zeros(1, device=indices.device).expand(indices.shape),
            size=shape,
            check_invariants=False,  # indices are checked when they are loaded
        )


def sampled_product(pattern: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute ``left @ right.T`` at the entries of a pattern."""
    return torch.sparse.sampled_addmm(pattern, left.contiguous(), right.contiguous().T, beta=0.0)


def columns_of_tokens(tensor: Tensor) -> Tensor:
    """Copy tokens from rows to columns, in float32; ``(features, tokens)``."""
    # Sparse products run along tokens, four times as fast as in the layout that a layer leaves.
    return transposed(tensor.reshape(-1, tensor.shape[-1]).float().contiguous())


def transposed(matrix: Tensor) -> Tensor:
    """Copy a matrix into its transpose."""
    rows, columns = matrix.shape
    count = matrix.numel()
    if matrix.device.type != "cpu" or not count:  # an expert may be sent no token
        return matrix.T.contiguous()
    # On a CPU ``matrix.T.contiguous()`` may take as long as the sparse product. Shuffling as many
    # groups of channels as there are rows is the same, and takes half the time; the strides are
    # those of the channels-last layout, for which torch has that kernel.
    channels = matrix.as_strided((1, count, 1, 1), (count, 1, count, count))
    return F.channel_shuffle(channels, rows).view(columns, rows)


def can_sample(weight: Tensor, count: int) -> bool:
    """Tell whether single entries of a weight's gradient are worth computing."""
    matrix = weight.dim() == 2 and weight.dtype is torch.float32 and weight.device.type == "cpu"
    return matrix and count <= DENSEST * weight.numel()


def sampled_linear(
    input: Tensor,
    entries: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    indices: Tensor,
    mark: Tensor,
    lines: Lines | None = None,
) -> Tensor:
    """Compute a linear layer whose weight's gradient goes to the entries alone."""
    return _SampledLinear.apply(input, entries, bias, weight.detach(), indices, mark, lines)


class _SampledLinear(torch.autograd.Function):
    """A linear layer whose gradient goes to the input, the selected entries and the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        entries: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        indices: Tensor,
        mark: Tensor,
        lines: Lines | None,
    ) -> Tensor:
        # The weight too: so that torch refuses to go back through one that was written since.
        ctx.save_for_backward(input, entries, weight, mark)
        # A plain attribute, not a saved tensor: DDP writes the (same) buffers before each forward.
        ctx.indices, ctx.lines = indices, lines
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        input, entries, weight, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        # A second derivative needs operations that have one, and several at once none that choose
        # rows by what is in them.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient):
            gradients = _go_back_densely(gradient, input, entries, weight, ctx.indices, needed)
        else:
            gradients = _go_back(gradient, input, weight, ctx.lines or ctx.indices, needed)
        return *gradients, None, None, None, None


Gradients = tuple[Tensor | None, Tensor, Tensor | None]
"""Of a linear layer's input, its weight's selected entries, and its bias."""


def _go_back(
    gradient: Tensor, input: Tensor, weight: Tensor, places: Lines | Tensor, needed: Sequence[bool]
) -> Gradients:
    rows, inputs = _tokens(gradient), _tokens(input)
    if gradient.device.type != "cpu":  # counting tokens would wait for the device
        return (
            gradient @ weight if needed[0] else None,
            _products(rows, inputs, places),
            rows.sum(0) if needed[2] else None,
        )
    # Padding has no gradient, nor has what comes after the last token that is learned.
    learned = rows.any(1).nonzero().squeeze(1)
    rows = rows[learned]
    return (
        _scattered(rows @ weight, learned, input) if needed[0] else None,
        _products(rows, inputs[learned], places),
        rows.sum(0) if needed[2] else None,
    )


def _go_back_densely(
    gradient: Tensor,
    input: Tensor,
    entries: Tensor,
    weight: Tensor,
    indices: Tensor,
    needed: Sequence[bool],
) -> Gradients:
    """Compute the same by operations that have a derivative, by the entries too."""
    places = indices.long()
    weight = weight.flatten().index_copy(0, places, entries).view(weight.shape)
    rows, inputs = _tokens(gradient), _tokens(input)
    return (
        gradient @ weight if needed[0] else None,
        (rows.T @ inputs).reshape(-1).index_select(0, places),
        rows.sum(0) if needed[2] else None,
    )


def _tokens(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _scattered(rows: Tensor, positions: Tensor, input: Tensor) -> Tensor:
    """Put the gradients of some tokens where they belong in the input's."""
    gradient = torch.zeros_like(input, memory_format=torch.contiguous_format)
    return _tokens(gradient).index_copy_(0, positions, rows).view_as(input)


def _products(gradient: Tensor, input: Tensor, places: Lines | Tensor) -> Tensor:
    """Compute ``(gradient.T @ input).flatten()[places]``; rows are tokens."""
    if isinstance(places, Lines):
        group, numbers = places
        if group == "row":
            return (gradient.index_select(1, numbers).T @ input).reshape(-1)
        return (gradient.T @ input.index_select(1, numbers)).reshape(-1)
    pattern = csr_pattern(places, (gradient.shape[-1], input.shape[-1]))
    return sampled_product(pattern, columns_of_tokens(gradient), columns_of_tokens(input)).values()
