"""Merge a safety patch into a checkpoint as a new one.

Files are copied as they are, then only the touched entries are overwritten, so memory stays at one
parameter's entries.
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safeweights_peft.checkpoint import (
    CheckpointDraft,
    CheckpointReader,
    Progress,
    draft_copy,
    files_to_copy,
)
from safeweights_peft.delta import Array, SparseDelta, add_rounded, digest
from safeweights_peft.errors import AlreadyMergedError, MergeError
from safeweights_peft.files import check_apart, check_target
from safeweights_peft.format import (
    Adapter,
    Mode,
    TensorRecord,
    entries_by_block,
    read_adapter,
    read_metadata,
)
from safeweights_peft.merge.fit import PathLike, base_state, copies, gather_entries


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out_dir: The merged checkpoint.
        scale: The factor on the values: the adapter's own times the requested one.
        tensors: Number of checkpoint tensors changed, tied copies included.
        entries: Number of entries that the adapter changes.
        size_bytes: Size of the merged shards.
        seconds: Wall time.
    """

    out_dir: str
    scale: float
    tensors: int
    entries: int
    size_bytes: int
    seconds: float


def merge(
    base_dir: PathLike,
    adapter_dir: PathLike,
    out_dir: PathLike,
    *,
    scale: float = 1.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Add a safety patch to the checkpoint that it was made for, as a new checkpoint.

    The adapter and the base are checked before anything is written, the result before it appears.

    Args:
        base_dir: The base's checkpoint.
        adapter_dir: The patch.
        out_dir: Where the merged checkpoint is to appear, whole or not at all.
        scale: Factor on the values, on top of the adapter's own.
        overwrite: Replace an existing non-empty directory, whatever it holds.
        progress: Told of the bytes copied.

    Returns:
        What was done.

    Raises:
        AlreadyMergedError: The base already holds the merged values.
        BaseMismatchError: The adapter was made for another base.
        MergeError: The adapter is a safety map, the scale is not finite, or ``out_dir`` is in the
            way of an input.
    """
    started = time.perf_counter()
    check_target(Path(out_dir), overwrite, MergeError)
    check_apart(Path(out_dir), {"base_dir": base_dir, "adapter_dir": adapter_dir}, MergeError)
    reader, adapter = _read_inputs(base_dir, adapter_dir)
    factor = _factor(adapter.metadata.scale, scale)
    with draft_copy(reader, out_dir, overwrite=overwrite, progress=progress) as draft:
        tensors = sum(
            _merge_parameter(reader, draft, adapter, name, factor, check=scale == 1.0)
            for name in adapter.deltas
        )
    return MergeReport(
        out_dir=str(out_dir),
        scale=factor,
        tensors=tensors,
        entries=sum(delta.count for delta in adapter.deltas.values()),
        size_bytes=CheckpointReader(out_dir).size_bytes,
        seconds=time.perf_counter() - started,
    )


def plan(base_dir: PathLike, adapter_dir: PathLike, out_dir: PathLike) -> dict[str, Any]:
    """Tell what :func:`merge` would do and need, and write nothing.

    Args:
        base_dir: The base's checkpoint; it is checked as for a merge.
        adapter_dir: The patch.
        out_dir: Where the merged checkpoint would appear; it need not exist.

    Returns:
        Plain JSON: tensors and entries that change, bytes to be copied, bytes of memory (the patch
        and the largest tensor that changes), bytes free at ``out_dir``, and whether that is enough.
    """
    reader, adapter = _read_inputs(base_dir, adapter_dir)
    deltas = adapter.deltas
    keys = {
        key
        for name, record in adapter.metadata.tensors.items()
        for copy in copies(reader, record)
        for key, (_, local) in entries_by_block(copy, deltas[name].indices).items()
        if local.size
    }
    largest = max((reader.info(key).size_bytes for key in keys), default=0)
    copy_bytes = sum(files_to_copy(reader).values())
    free_bytes = shutil.disk_usage(_existing_parent(Path(out_dir))).free
    return {
        "tensors": len(keys),
        "entries": sum(delta.count for delta in deltas.values()),
        "copy_bytes": copy_bytes,
        "memory_bytes": largest + sum(delta.size_bytes for delta in deltas.values()),
        "free_bytes": free_bytes,
        "fits": copy_bytes <= free_bytes,
    }


def _read_inputs(base_dir: PathLike, adapter_dir: PathLike) -> tuple[CheckpointReader, Adapter]:
    """Read a patch, and open the base that it was made for."""
    if read_metadata(adapter_dir).mode is Mode.SPA:
        raise MergeError(
            f"{adapter_dir}: expected a safety patch, found a safety map, which has no values; "
            "train with it instead"
        )
    adapter, reader = read_adapter(adapter_dir), CheckpointReader(base_dir)
    if base_state(reader, adapter.metadata, adapter.indices) == "merged":
        raise AlreadyMergedError(
            f"{base_dir}: expected the base, found the adapter's values already merged into it; "
            "use it as it is, or give the original base"
        )
    return reader, adapter


def _existing_parent(path: Path) -> Path:
    """Find the nearest directory that is there, to ask for its disk."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())


def _merge_parameter(
    reader: CheckpointReader,
    draft: CheckpointDraft,
    adapter: Adapter,
    name: str,
    factor: float,
    check: bool,
) -> int:
    """Write one parameter's merged entries to the draft, read them back, and count its tensors."""
    record, delta = adapter.metadata.tensors[name], adapter.deltas[name]
    entries = gather_entries(reader, name, record, delta.indices)
    merged = add_rounded(entries, delta.values, factor)
    if np.isnan(merged).any():
        raise MergeError(
            f"{name}: expected numbers after merging, found NaN; "
            "use a base without NaN, or a smaller scale"
        )
    expected = record.merged_digest if check else digest(merged)
    tensors = 0
    for copy in copies(reader, record):
        tensors += _patch(draft, copy, delta, merged)
        found = digest(gather_entries(draft.reader, name, copy, delta.indices))
        if found != expected:
            raise MergeError(
                f"{name}: expected merged entries with digest {expected}, found {found}; "
                "the adapter contradicts itself, do not use it"
            )
    return tensors


def _patch(draft: CheckpointDraft, record: TensorRecord, delta: SparseDelta, new: Array) -> int:
    touched = 0
    for key, (positions, local) in entries_by_block(record, delta.indices).items():
        draft.patch(key, local, new[positions])
        touched += positions.size > 0
    return touched


def _factor(own: float, requested: float) -> float:
    factor = own * requested
    if not math.isfinite(factor) or abs(factor) > float(np.finfo(np.float32).max):
        raise MergeError(
            f"scale: expected a factor that is finite in float32, found {factor}; "
            "give a smaller one"
        )
    return factor
