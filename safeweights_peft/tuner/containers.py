"""What a wrapper holds of each adapter: values and indices, in a coded form until they are decoded.

PEFT walks these containers; transformers sets loaded tensors in them, by name, where the shape is
the one that it finds. So a coded tensor begins as bytes of the recorded size, under the name that
its content keeps. Decoding stands in ``loading``; when it is done, in ``layer``.
"""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from safeweights_peft.modeling.tensors import to_torch
from safeweights_peft.patch.artifacts import Layout

_UNLOADED = {torch.uint8: 255, torch.int32: -1, torch.int64: -1}
"""What fills indices that were never loaded: no index, and no stream either."""


class CodedValues(nn.Parameter):
    """Values in a coded form. Bytes have no gradient, so what is asked for is kept for later."""

    is_trained = False

    def __new__(cls, data: Tensor, requires_grad: bool = False, **_: Any) -> Self:
        """Make it of bytes; PEFT passes on whatever attributes it finds."""
        return super().__new__(cls, data.detach(), False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Note whether the values are to be trained."""
        self.is_trained = requires_grad
        return self


class Values(nn.ParameterDict):
    """The values of one parameter, by adapter; ``model.half()`` and the like leave their dtype."""

    def __init__(self, on_set: Callable[[str], None]) -> None:
        super().__init__()
        self.on_set = on_set

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep coded values what they are when loaded ones take their place."""
        held = self.__dict__.get("_parameters", {}).get(name)
        if isinstance(held, CodedValues) and isinstance(value, Tensor) and is_coded(value):
            value = CodedValues(value).requires_grad_(held.is_trained)
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            self.on_set(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Indices(BufferDict):
    """The flat indices of one parameter, by adapter."""

    def __init__(self, on_set: Callable[[str], None]) -> None:
        super().__init__(persistent=True)
        self.on_set = on_set

    def __setattr__(self, name: str, value: Any) -> None:
        """Tell of tensors."""
        super().__setattr__(name, value)
        if isinstance(value, Tensor):
            self.on_set(name)


def values_room(layout: Layout, device: torch.device) -> nn.Parameter:
    """Make room for values that are loaded later."""
    dtype, shape = layout
    if dtype == np.uint8:
        return CodedValues(torch.zeros(shape, dtype=torch.uint8, device=device))
    return nn.Parameter(torch.zeros(shape, device=device))


def indices_room(layout: Layout, device: torch.device) -> Tensor:
    """Make room for indices that are loaded later, filled with what cannot pass the checks."""
    dtype = to_torch(np.empty(0, layout[0])).dtype
    return torch.full(layout[1], _UNLOADED[dtype], dtype=dtype, device=device)


def is_unloaded(indices: Tensor) -> bool:
    """Tell whether indices are still what :func:`indices_room` has made."""
    return indices.numel() > 0 and bool((indices == _UNLOADED[indices.dtype]).all())


def is_coded(tensor: Tensor) -> bool:
    """Tell whether indices or values are in a coded form."""
    return tensor.dtype is torch.uint8
