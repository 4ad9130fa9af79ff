"""Entries of a parameter: how values are added, how numpy sees them, and whose they are.

Here live the torch twin of the arithmetic rule in ``delta``, and the checks that a base is the one
that an adapter was made for, or has it merged in. Which entries a live model runs on is the matter
of ``parameter``.
"""

import numpy as np
import torch
from torch import Tensor

from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES, Array, digest
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, FormatError
from safeweights_peft.format import TensorRecord

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


def check_base(name: str, entries: Tensor, record: TensorRecord, artifact: str = "adapter") -> None:
    """Check that a parameter is the one that an adapter was made for."""
    found = _digest(entries, record)
    if found == record.base_digest:
        return
    if found == record.merged_digest:
        raise AlreadyMergedError(
            f"{name}: expected the base's entries, found the adapter's merged ones; "
            "use the model as it is, or load the adapter onto the original base"
        )
    raise BaseMismatchError(
        f"{name}: expected the base that the {artifact} was made for (entries of digest "
        f"{record.base_digest}), found another ({found}); load that base"
        f"{_dtype_hint(entries, record)}"
    )


def check_merged(name: str, entries: Tensor, record: TensorRecord, scale: float) -> None:
    """Check that a parameter has a safety patch merged in."""
    if record.merged_digest is None:
        raise FormatError(
            f"{name}: expected a merged_digest in the safety patch, found null; save the patch "
            "with save_pretrained, which computes it, and give its directory"
        )
    found = _digest(entries, record)
    if found == record.merged_digest:
        return
    if found == record.base_digest:
        raise BaseMismatchError(
            f"{name}: expected the base with the safety patch merged in, found the base without "
            "it; merge the patch first"
        )
    raise BaseMismatchError(
        f"{name}: expected the base with the safety patch merged in at its own scale {scale} "
        f"(entries of digest {record.merged_digest}), found another ({found}); load that model"
        f"{_dtype_hint(entries, record)}"
    )


def _digest(entries: Tensor, record: TensorRecord) -> str:
    """Digest entries in the checkpoint's dtype, whatever they were loaded in."""
    return digest(to_numpy(entries.to(getattr(torch, record.dtype))))


def _dtype_hint(entries: Tensor, record: TensorRecord) -> str:
    """Name the dtypes that keep the checkpoint's bits, where the entries have another."""
    dtype = str(entries.dtype).removeprefix("torch.")
    lossy = dtype not in ("float32", record.dtype)
    return f" in {record.dtype} or float32, not {dtype}" if lossy else ""
