"""Whose a parameter's entries are: those of an adapter's base, or those with it merged in."""

import torch
from torch import Tensor

from safeweights_peft.delta import digest
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, FormatError
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.records import TensorRecord


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
