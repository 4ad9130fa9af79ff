"""Chosen entries of a matrix in torch's CSR layout, and a product of two matrices at them alone.

Autograd multiplies whole matrices; here an entry is one dot product. Both factors are laid out so
that it runs along memory, which makes it four times as fast as the layout that a layer leaves.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F


def csr_pattern(indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Lay entries of a matrix out as torch's sparse products want to be told of them."""
    rows, columns = shape
    starts = torch.arange(
        0, (rows + 1) * columns, columns, dtype=indices.dtype, device=indices.device
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.searchsorted(indices, starts, out_int32=indices.dtype is torch.int32),
            indices % columns,
            torch.zeros(1, device=indices.device).expand(indices.shape),
            size=shape,
            check_invariants=False,
        )


def sampled_product(pattern: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute ``left @ right.T`` at the entries of a pattern."""
    return torch.sparse.sampled_addmm(pattern, left.contiguous(), right.contiguous().T, beta=0.0)


def columns_of_tokens(tensor: Tensor) -> Tensor:
    """Copy tokens from rows to columns, in float32: sparse products are faster along tokens."""
    return transposed(tensor.reshape(-1, tensor.shape[-1]).float().contiguous())


def transposed(matrix: Tensor) -> Tensor:
    """Copy a matrix into its transpose.

    On a CPU ``matrix.T.contiguous()`` may take as long as the sparse product. Shuffling as many
    groups of channels as there are rows is the same, and takes half the time; the strides are those
    of the channels-last layout, for which torch has that kernel.
    """
    rows, columns = matrix.shape
    count = matrix.numel()
    if matrix.device.type != "cpu" or not count:  # an expert may be sent no token
        return matrix.T.contiguous()
    channels = matrix.as_strided((1, count, 1, 1), (count, 1, count, count))
    return F.channel_shuffle(channels, rows).view(columns, rows)
