"""Entries of a parameter as they stand in memory, whoever else is to see others there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by item size


@contextmanager
def untraced() -> Iterator[None]:
    """Keep what is compared and written here out of a graph that ``torch.jit`` records."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@contextmanager
def raw() -> Iterator[None]:
    """See parameters themselves, without gradients."""
    # A tensor made in inference mode could not be used in training later.
    with (
        torch._C.DisableTorchFunctionSubclass(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


def whole(parameter: Tensor) -> Tensor:
    """Gather a sharded parameter from all processes."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def gather(parameter: Tensor, indices: Tensor) -> Tensor:
    """Gather what stands in a parameter itself; flat indices, ``(count,)``."""
    with raw():
        return parameter.detach().flatten().index_select(0, indices)


def write(parameter: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Write entries, without gradients or torch functions."""
    # A parameter that was made in inference mode can be written only there.
    with torch.inference_mode(parameter.is_inference()):
        target, entries = parameter.detach(), entries.detach().to(parameter.dtype)
        if target.is_contiguous():
            # As integers: on a CPU this takes two thirds of index_copy_'s time, scatter_ of floats
            # four times as long.
            integers = _INTEGERS[target.element_size()]
            bits = target.view(-1).view(integers)
            bits.scatter_(0, indices.long(), entries.view(integers))
        else:
            target[torch.unravel_index(indices.long(), target.shape)] = entries


def move(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Move a tensor as ``fn`` does, but keep its dtype."""
    moved = fn(tensor)
    if moved.dtype == tensor.dtype:
        return moved
    return tensor if moved.device == tensor.device else tensor.to(moved.device)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Tell whether two tensors of one dtype hold the same bits."""
    integers = _INTEGERS[left.element_size()]
    return torch.equal(left.view(integers), right.detach().view(integers))
