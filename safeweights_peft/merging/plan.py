"""What a merge would do and need: counts, disk, memory and time, before anything is written."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from safeweights_peft.checkpoint.threads import THREADS
from safeweights_peft.checkpoint.windows import WINDOW_BYTES
from safeweights_peft.checkpoint.writer import files_to_copy
from safeweights_peft.delta import DTYPES, index_dtype
from safeweights_peft.merging.edits import Edit, edits
from safeweights_peft.merging.gather import PathLike
from safeweights_peft.merging.in_place import check_own_files
from safeweights_peft.merging.merge import open_base
from safeweights_peft.merging.patches import (
    Adapters,
    OnOverlap,
    count_entries,
    overlaps,
    read_patches,
)
from safeweights_peft.merging.undo import journal_bytes

WRITE_RATE = 500_000_000
"""Bytes per second that the disk, which a merge waits for, is taken to write: an ordinary SSD's."""

_PAGE_BYTES = 4096


def plan(
    base_dir: PathLike,
    adapters: Adapters,
    out_dir: PathLike | None,
    *,
    on_overlap: OnOverlap = "add",
) -> dict[str, Any]:
    """Tell what merging would do and need, and write nothing."""
    started = time.perf_counter()
    patches = read_patches(adapters)
    shared = overlaps(patches, on_overlap)
    reader = open_base(base_dir)
    tensors = largest = undo_bytes = page_bytes = merged_bytes = 0
    for edit in edits(reader, patches):
        tensors, largest = tensors + 1, max(largest, reader.info(edit.key).size_bytes)
        undo_bytes += journal_bytes(reader, edit.key, edit.indices.size)
        page_bytes, merged_bytes = page_bytes + _page_bytes(edit), merged_bytes + edit.merged.nbytes
    if out_dir is None:
        check_own_files(reader)
        write_bytes, disk_bytes, new_bytes = undo_bytes, undo_bytes + page_bytes, 0
    else:
        write_bytes = disk_bytes = sum(files_to_copy(reader).values())
        new_bytes = merged_bytes
    place = reader.directory if out_dir is None else _existing_parent(Path(out_dir))
    free_bytes = shutil.disk_usage(place).free
    held = [
        (index_dtype(record.numel).itemsize + DTYPES[metadata.values_dtype].itemsize) * record.count
        for metadata in (patch.adapter.metadata for patch in patches)
        for record in metadata.tensors.values()
    ]
    return {
        "tensors": tensors,
        "entries": count_entries(patches),
        "overlap": [asdict(each) for each in shared],
        "write_bytes": write_bytes,
        "memory_bytes": THREADS * min(largest, WINDOW_BYTES) + sum(held) + new_bytes,
        "seconds": round(time.perf_counter() - started + disk_bytes / WRITE_RATE, 1),
        "free_bytes": free_bytes,
        "fits": write_bytes <= free_bytes,
    }


def _page_bytes(edit: Edit) -> int:
    """Count the bytes of the pages that an edit touches, each of which is written whole."""
    pages = edit.indices.astype(np.int64) * edit.base.itemsize // _PAGE_BYTES
    return np.unique(pages).size * _PAGE_BYTES


def _existing_parent(path: Path) -> Path:
    """Find the nearest directory that is there, to ask for its disk."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
