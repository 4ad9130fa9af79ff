"""Merge safety patches into a checkpoint as a new one.

Files are copied as they are, then only the touched entries are overwritten, so memory stays at the
patches and what becomes of their entries. Several shards are under way at a time: while one goes to
the disk, another is copied.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import CheckpointDraft, Progress, draft_copy
from safeweights_peft.delta import Array
from safeweights_peft.errors import CheckpointError, MergeError
from safeweights_peft.files import check_apart, check_target, sync
from safeweights_peft.merging.edits import edits
from safeweights_peft.merging.gather import PathLike, check_floats
from safeweights_peft.merging.patches import (
    Adapters,
    MergedPatch,
    OnOverlap,
    Overlap,
    Patch,
    count_entries,
    overlaps,
    read_patches,
)
from safeweights_peft.merging.undo import find_journal


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out_dir: The merged checkpoint.
        patches: What was merged, in the order in which it was added up.
        overlap: How many entries every two patches share in every parameter, where they do.
        tensors: Number of checkpoint tensors changed, tied copies included.
        entries: Number of entries that the patches change, each counted once.
        size_bytes: Size of the merged shards.
        seconds: Wall time.
    """

    out_dir: str
    patches: tuple[MergedPatch, ...]
    overlap: tuple[Overlap, ...]
    tensors: int
    entries: int
    size_bytes: int
    seconds: float

    @classmethod
    def of(
        cls,
        out_dir: PathLike,
        size_bytes: int,
        patches: Sequence[Patch],
        overlap: tuple[Overlap, ...],
        tensors: int,
        started: float,
    ) -> Self:
        """Describe a merge that is done."""
        return cls(
            out_dir=str(out_dir),
            patches=tuple(patch.described for patch in patches),
            overlap=overlap,
            tensors=tensors,
            entries=count_entries(patches),
            size_bytes=size_bytes,
            seconds=time.perf_counter() - started,
        )


def merge(
    base_dir: PathLike,
    adapters: Adapters,
    out_dir: PathLike,
    *,
    on_overlap: OnOverlap = "add",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Add safety patches to the checkpoint that they were made for, as a new checkpoint.

    The patches and the base are checked before anything is written, the result before it appears.
    Several patches are added up in the order given, by :func:`safeweights_peft.delta.sum_rounded`.

    Args:
        base_dir: The base's checkpoint.
        adapters: A patch's directory, or several; each alone, or with a factor on its values on
            top of the patch's own: ``[first, (second, 0.5)]``.
        out_dir: Where the merged checkpoint is to appear, whole or not at all.
        on_overlap: What to do where patches change the same entries.
        overwrite: Replace an existing non-empty directory, whatever it holds.
        progress: Told of the bytes copied.

    Returns:
        What was done.

    Raises:
        AlreadyMergedError: The base already holds the merged values of a patch.
        BaseMismatchError: A patch was made for another base.
        CheckpointError: The base is quantized to integers, or half merged in place.
        MergeError: A patch is a safety map, a scale is not finite, patches share entries and are
            not to, or ``out_dir`` is in the way of an input.
    """
    started = time.perf_counter()
    check_target(Path(out_dir), overwrite, MergeError)
    patches = read_patches(adapters)
    for patch in patches:
        inputs = {"base_dir": base_dir, "adapter_dir": patch.described.adapter}
        check_apart(Path(out_dir), inputs, MergeError)
    shared = overlaps(patches, on_overlap)
    reader = open_base(base_dir)
    changes: dict[str, list[tuple[str, Array, Array]]] = {name: [] for name in reader.index.shards}
    for edit in edits(reader, patches):  # what the base holds is let go
        changes[reader.info(edit.key).shard].append((edit.key, edit.indices, edit.merged))

    def write(draft: CheckpointDraft, shard: str) -> None:
        for change in changes[shard]:
            draft.patch(*change)
        sync(draft.reader.directory / shard)

    copying = draft_copy(reader, out_dir, overwrite=overwrite, progress=progress, change=write)
    with copying as draft:
        path = draft.reader.directory / CARD_FILE
        path.write_text(_describe(patches, shared), encoding="utf-8")
        size_bytes = CheckpointReader(draft.reader.directory).size_bytes  # opened as a user will
    tensors = sum(map(len, changes.values()))
    return MergeReport.of(out_dir, size_bytes, patches, shared, tensors, started)


def _describe(patches: Sequence[Patch], shared: Sequence[Overlap]) -> str:
    """Write the card of a merged checkpoint."""
    base = patches[0].adapter.metadata
    return render_card(
        "merged",
        *(base.base_model_name_or_path, base.revision),
        patches=[
            asdict(patch.described) | {"name": Path(patch.described.adapter).resolve().name}
            for patch in patches
        ],
        shared=sum(overlap.entries for overlap in shared),
    )


def open_base(base_dir: PathLike) -> CheckpointReader:
    """Open a checkpoint that patches are to be merged into, as far as headers tell."""
    reader = CheckpointReader(base_dir)
    check_floats(reader)
    journal = find_journal(reader)
    if journal is not None and journal.state() == "unfinished":
        raise CheckpointError(
            f"{base_dir}: expected a whole checkpoint, found an unfinished merge; "
            "run `safeweights unmerge` on it, or the same merge again"
        )
    return reader
