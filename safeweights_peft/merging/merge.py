"""Merge safety patches into a checkpoint as a new one, or tell what merging them would need."""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.checkpoint.reader import WINDOW_BYTES, CheckpointReader
from safeweights_peft.checkpoint.threads import THREADS
from safeweights_peft.checkpoint.writer import (
    CheckpointDraft,
    OnBytes,
    draft_copy,
    files_to_copy,
)
from safeweights_peft.delta import DTYPES, Array
from safeweights_peft.errors import CheckpointError, MergeError
from safeweights_peft.files import PathLike, check_apart, check_target, read_json, sync
from safeweights_peft.merging.sums import (
    Adapters,
    MergedPatch,
    OnOverlap,
    Overlap,
    PatchSet,
    find_edits,
    gather_base,
    read_patches,
)
from safeweights_peft.merging.undo import check_own_files, find_journal, journal_bytes


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    out_dir: str  # the merged checkpoint
    patches: tuple[MergedPatch, ...]  # in the order in which they were added up
    overlap: tuple[Overlap, ...]
    tensors: int  # changed in the checkpoint, tied copies included
    entries: int  # changed, each counted once
    size_bytes: int  # of all shards
    seconds: float
    was_merged: bool = False  # in place, by an earlier call: nothing changed


def merge(
    base_dir: PathLike,
    adapters: Adapters,
    out_dir: PathLike,
    *,
    on_overlap: OnOverlap = "add",
    overwrite: bool = False,
    progress: OnBytes | None = None,
) -> MergeReport:
    """Merge safety patches into a copy of the checkpoint that they were made for.

    The patches and the base are checked before anything is written, the result before it appears.
    Several patches are added up in the order given: each value times its scale, summed in float32,
    rounded once to the base's dtype.

    Args:
        base_dir: The base's checkpoint.
        adapters: A patch's directory, or several; each alone, or with a factor on its values on
            top of the patch's own: ``[first, (second, 0.5)]``.
        out_dir: The merged checkpoint, which appears whole or not at all.
        on_overlap: Where patches change the same entries, "add" them up or raise an "error".
        overwrite: Replace an existing non-empty directory, whatever it holds.
        progress: Called with the bytes copied so far, and the bytes to copy.

    Returns:
        What was merged.

    Raises:
        AlreadyMergedError: The base already holds the merged values of a patch.
        BaseMismatchError: A patch was made for another base.
        CheckpointError: The base is quantized to integers, or half merged in place.
        MergeError: A patch is a safety map, a scale is not finite, patches overlap and may not, or
            ``out_dir`` is in the way of an input.

    Example:
        >>> from safeweights_peft import merge
        >>> report = merge("demo/base", "demo/run/patch", "merged")
        >>> report.entries == report.patches[0].entries > 0
        True
    """
    started = time.perf_counter()
    check_target(Path(out_dir), overwrite, MergeError)
    patches = read_patches(adapters, on_overlap)
    for patch in patches.summaries:
        check_apart(Path(out_dir), {"the base": base_dir, "the patch": patch.adapter}, MergeError)
    reader = open_base(base_dir)
    # All sums come first, so that nothing is written for a base that is refused. What the base
    # holds is let go: memory stays at the patches and what their entries become.
    changes: dict[str, list[tuple[str, Array, Array]]] = {name: [] for name in reader.shards}
    for edit in find_edits(gather_base(reader, patches)):
        changes[reader.info(edit.key).shard].append((edit.key, edit.indices, edit.merged))

    def write(draft: CheckpointDraft, shard: str) -> None:
        for change in changes[shard]:
            draft.patch(*change)
        # Synced here, a shard goes to the disk while others are copied.
        sync(draft.reader.directory / shard)

    copying = draft_copy(reader, out_dir, overwrite=overwrite, progress=progress, change=write)
    with copying as draft:
        folder = draft.reader.directory
        (folder / CARD_FILE).write_text(_describe(patches), encoding="utf-8")
        size_bytes = CheckpointReader(folder).size_bytes  # opened as a user will
    return MergeReport(
        out_dir=str(out_dir),
        patches=patches.summaries,
        overlap=patches.overlap,
        tensors=sum(map(len, changes.values())),
        entries=patches.entries,
        size_bytes=size_bytes,
        seconds=time.perf_counter() - started,
    )


def plan(
    base_dir: PathLike,
    adapters: Adapters,
    out_dir: PathLike | None,
    *,
    on_overlap: OnOverlap = "add",
) -> dict[str, Any]:
    """Return what merging, in place without `out_dir`, would change and need, and write nothing."""
    patches = read_patches(adapters, on_overlap)
    reader = open_base(base_dir)
    tensors = largest = undo_bytes = merged_bytes = 0
    for edit in find_edits(gather_base(reader, patches)):
        tensors += 1
        largest = max(largest, reader.info(edit.key).size_bytes)
        undo_bytes += journal_bytes(reader, edit.key, edit.indices.size)
        merged_bytes += edit.merged.nbytes
    if out_dir is None:
        check_own_files(reader)
        write_bytes, new_bytes, place = undo_bytes, 0, reader.directory
    else:
        write_bytes, new_bytes = sum(files_to_copy(reader).values()), merged_bytes
        path = Path(out_dir).absolute()
        place = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(place).free
    # Reading maps a window of a tensor in each thread.
    memory_bytes = new_bytes + THREADS * min(largest, WINDOW_BYTES)
    memory_bytes += sum(own.nbytes for part in patches.parts.values() for _, own in part)
    for patch in patches.patches:
        value_bytes = DTYPES[patch.adapter.metadata.values_dtype].itemsize
        memory_bytes += patch.summary.entries * value_bytes
    return {
        "tensors": tensors,
        "entries": patches.entries,
        "overlap": [asdict(overlap) for overlap in patches.overlap],
        "write_bytes": write_bytes,
        "memory_bytes": memory_bytes,
        "free_bytes": free_bytes,
        "fits": write_bytes <= free_bytes,
    }


def open_base(base_dir: PathLike) -> CheckpointReader:
    """Open a checkpoint that patches are to be merged into, and check it as far as headers tell."""
    reader = CheckpointReader(base_dir)
    _check_floats(reader)
    journal = find_journal(reader)
    if journal is not None and not journal.state():
        raise CheckpointError(
            f"{base_dir}: expected a whole checkpoint, found an unfinished merge; "
            "run `safeweights unmerge` on it, or the same merge again"
        )
    return reader


def _check_floats(reader: CheckpointReader) -> None:
    """Refuse a checkpoint whose weights are quantized to integers."""
    # Scaled float8 weights are what they are on disk; a patch fits them or not, as digests tell.
    config = reader.directory / "config.json"
    described = read_json(config, CheckpointError) if config.is_file() else {}
    quantization = described.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    for key in reader.keys():
        dtype = reader.info(key).dtype
        if not dtype.lower().startswith(("f", "bf")):
            raise CheckpointError(
                f"{reader.directory}: expected float weights, found {key} in {dtype}, quantized by "
                f"{str(method)[:80]!r}; use the model that was quantized"
            )


def _describe(patches: PatchSet) -> str:
    """Write the card of a merged checkpoint."""
    base = patches.patches[0].adapter.metadata
    return render_card(
        "merged",
        *(base.base_model_name_or_path, base.revision),
        patches=[
            asdict(patch) | {"name": Path(patch.adapter).resolve().name}
            for patch in patches.summaries
        ],
        shared=sum(overlap.entries for overlap in patches.overlap),
    )
