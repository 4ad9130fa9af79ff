"""Tensors as numpy sees them, and the torch twin of the arithmetic rule in ``delta``."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES, Array
from safeweights_peft.patch.records import State, TensorRecord, check_state

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


@contextmanager
def require_gradients(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let some of a model's parameters alone require gradients for a while."""
    is_trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, was_trained in is_trained.items():
            parameter.requires_grad_(was_trained)


def to_numpy(tensor: Tensor, dtype: str | None = None) -> Array:
    """View a tensor as an array, without a copy where it is on the CPU, in the dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if dtype is not None:
        tensor = tensor.to(getattr(torch, dtype))
    if tensor.dtype in _WITHOUT_NUMPY:
        stored = WEIGHT_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        return tensor.view(_WITHOUT_NUMPY[tensor.dtype]).numpy().view(stored)
    return tensor.numpy()


def to_torch(array: Array) -> Tensor:
    """View an array as a tensor, without a copy where it may be written."""
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def check_entries(
    name: str,
    entries: Tensor,
    record: TensorRecord,
    expected: State = State.BASE,
    artifact: str = "adapter",
    hint: str = "load that one",
) -> Array:
    """Refuse a parameter's entries in another state; return them as in the checkpoint."""
    loaded = str(entries.dtype).removeprefix("torch.")
    # The digest is of the checkpoint's bits, which a cast to fewer digits has lost.
    if loaded not in ("float32", record.dtype):
        dtypes = dict.fromkeys((record.dtype, "float32"))
        hint += f" in {' or '.join(dtypes)}, not {loaded}"
    stored = to_numpy(entries, record.dtype)
    check_state(name, stored, record, expected, artifact=artifact, hint=hint)
    return stored
