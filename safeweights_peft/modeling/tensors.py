"""Tensors as numpy sees them, and the torch twin of the arithmetic rule in ``delta``."""

import numpy as np
import torch
from torch import Tensor

from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES, Array

# Dtypes that torch hands to numpy only as integers of their size.
_WITHOUT_NUMPY = {
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
}


def add_rounded(base: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
    """Add scaled values to base entries, bitwise as :func:`safeweights_peft.delta.add_rounded`."""
    change = values.float() * scale  # by itself: torch.add(..., alpha=scale) would fuse the two
    total = base.float() + change
    return total.to(base.dtype)


def to_numpy(tensor: Tensor) -> Array:
    """View a tensor as an array, without a copy where it is on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _WITHOUT_NUMPY:
        dtype = WEIGHT_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        return tensor.view(_WITHOUT_NUMPY[tensor.dtype]).numpy().view(dtype)
    return tensor.numpy()


def to_torch(array: Array) -> Tensor:
    """Copy an array into a tensor."""
    array = np.array(array)
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
