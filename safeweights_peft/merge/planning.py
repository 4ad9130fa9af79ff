"""What a merge would do and need: counts, disk and memory, before anything is written."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safeweights_peft.checkpoint import WINDOW_BYTES, files_to_copy
from safeweights_peft.delta import DTYPES, index_dtype
from safeweights_peft.merge.edits import changed_tensors
from safeweights_peft.merge.fit import PathLike
from safeweights_peft.merge.in_place import check_own_files
from safeweights_peft.merge.merging import open_base
from safeweights_peft.merge.patches import (
    Adapters,
    OnOverlap,
    count_entries,
    overlaps,
    read_patches,
)
from safeweights_peft.merge.undo import journal_bytes


def plan(
    base_dir: PathLike,
    adapters: Adapters,
    out_dir: PathLike | None,
    *,
    on_overlap: OnOverlap = "add",
) -> dict[str, Any]:
    """Tell what merging would do and need, and write nothing.

    Args:
        base_dir: The base's checkpoint; it is checked as for a merge.
        adapters: As for :func:`safeweights_peft.merge.merge`.
        out_dir: Where the merged checkpoint would appear; it need not exist. None to merge in
            place.
        on_overlap: What would be done where patches change the same entries.

    Returns:
        Plain JSON: tensors and entries that change, entries that patches share, bytes to be written
        (the copy, or the undo journal), bytes of memory (the patches and the part of a tensor that
        is looked at), bytes free there, and whether that is enough.
    """
    patches = read_patches(adapters)
    shared = overlaps(patches, on_overlap)
    reader = open_base(base_dir, patches)
    counts = {key: local.size for key, local in changed_tensors(reader, patches)}
    largest = max((reader.info(key).size_bytes for key in counts), default=0)
    if out_dir is None:
        check_own_files(reader)
        write_bytes = sum(journal_bytes(reader, key, count) for key, count in counts.items())
    else:
        write_bytes = sum(files_to_copy(reader).values())
    place = reader.directory if out_dir is None else _existing_parent(Path(out_dir))
    free_bytes = shutil.disk_usage(place).free
    held = [
        (index_dtype(record.numel).itemsize + DTYPES[metadata.values_dtype].itemsize) * record.count
        for metadata in (patch.adapter.metadata for patch in patches)
        for record in metadata.tensors.values()
    ]
    return {
        "tensors": len(counts),
        "entries": count_entries(patches),
        "overlap": [asdict(each) for each in shared],
        "write_bytes": write_bytes,
        "memory_bytes": min(largest, WINDOW_BYTES) + sum(held),
        "free_bytes": free_bytes,
        "fits": write_bytes <= free_bytes,
    }


def _existing_parent(path: Path) -> Path:
    """Find the nearest directory that is there, to ask for its disk."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.is_dir())
