"""What a merge would change and need: counts, disk and memory, before anything is written."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeweights_peft.checkpoint.threads import THREADS
from safeweights_peft.checkpoint.windows import WINDOW_BYTES
from safeweights_peft.checkpoint.writer import files_to_copy
from safeweights_peft.delta import DTYPES, index_dtype
from safeweights_peft.merging.edits import edits
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


def plan(
    base_dir: PathLike,
    adapters: Adapters,
    out_dir: PathLike | None,
    *,
    on_overlap: OnOverlap = "add",
) -> dict[str, Any]:
    """Tell what merging would do and need, and write nothing."""
    patches = read_patches(adapters)
    shared = overlaps(patches, on_overlap)
    reader = open_base(base_dir)
    tensors = largest = undo_bytes = merged_bytes = 0
    for edit in edits(reader, patches):
        tensors, largest = tensors + 1, max(largest, reader.info(edit.key).size_bytes)
        undo_bytes += journal_bytes(reader, edit.key, edit.indices.size)
        merged_bytes += edit.merged.nbytes
    if out_dir is None:
        check_own_files(reader)
        write_bytes, new_bytes = undo_bytes, 0
    else:
        write_bytes, new_bytes = sum(files_to_copy(reader).values()), merged_bytes
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
        "free_bytes": free_bytes,
        "fits": write_bytes <= free_bytes,
    }


def _existing_parent(path: Path) -> Path:
    """Find the nearest directory that is there, to ask for its disk."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
