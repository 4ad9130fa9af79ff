"""Merge safety patches into a checkpoint where it lies, and take the merge back out.

The time goes with the patches, not with the checkpoint. What is changed stands in an undo journal
beforehand (see ``undo``), so that after an interruption the next call finishes or undoes it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import MergeError
from safeweights_peft.merging.edits import edits
from safeweights_peft.merging.gather import PathLike
from safeweights_peft.merging.merge import MergeReport, open_base
from safeweights_peft.merging.patches import Adapters, OnOverlap, Patch, overlaps, read_patches
from safeweights_peft.merging.undo import UNDO_DIR, UndoJournal, find_journal, sweep, write_journal


@dataclass(frozen=True)
class UnmergeReport:
    """What an unmerge did.

    Attributes:
        directory: The checkpoint.
        tensors: Number of checkpoint tensors restored, tied copies included.
        entries: Number of entries restored, tied copies included.
        seconds: Wall time.
    """

    directory: str
    tensors: int
    entries: int
    seconds: float


def merge_in_place(
    base_dir: PathLike, adapters: Adapters, *, on_overlap: OnOverlap = "add"
) -> MergeReport:
    """Add safety patches to the checkpoint that they were made for, by changing its files.

    All is checked before anything is changed. An interrupted merge is finished by the same call,
    or undone by :func:`unmerge`. The same call on what it has finished changes nothing.

    Args:
        base_dir: The base's checkpoint, which becomes the merged one.
        adapters: As for :func:`merge`.
        on_overlap: What to do where patches change the same entries.

    Returns:
        What was done.

    Raises:
        AlreadyMergedError: The base already holds the merged values, and not by such a call.
        BaseMismatchError: A patch was made for another base.
        CheckpointError: The checkpoint was changed since an interrupted merge.
        MergeError: A patch cannot be merged, the shards belong to other places too, or something
            else is merged in place already.
    """
    started = time.perf_counter()
    patches = read_patches(adapters)
    shared = overlaps(patches, on_overlap)
    journal = _begun(CheckpointReader(base_dir), patches)
    if journal is None:
        reader = open_base(base_dir)
        check_own_files(reader)
        sweep(reader.directory)
        described = [patch.described for patch in patches]
        journal = write_journal(reader, described, edits(reader, patches))
    journal.write("merged")
    size_bytes = CheckpointReader(base_dir).size_bytes
    return MergeReport.of(base_dir, size_bytes, patches, shared, journal.tensors, started)


def unmerge(directory: PathLike) -> UnmergeReport:
    """Restore a checkpoint that patches were merged into in place, bit for bit.

    Args:
        directory: The checkpoint.

    Returns:
        What was done.

    Raises:
        CheckpointError: The checkpoint or its undo journal was changed since.
        MergeError: There is no undo journal.
    """
    started = time.perf_counter()
    reader = CheckpointReader(directory)
    journal = find_journal(reader)
    if journal is None:
        sweep(reader.directory)
        raise MergeError(
            f"{directory}: expected the undo journal {UNDO_DIR}, found none, so nothing is merged "
            "in place here; use the base that was merged"
        )
    check_own_files(reader)
    journal.state()
    journal.write("base")
    report = UnmergeReport(
        str(directory), journal.tensors, journal.entries, time.perf_counter() - started
    )
    journal.remove()
    sweep(reader.directory)
    return report


def check_own_files(reader: CheckpointReader) -> None:
    """Check that a checkpoint's shards may be changed: that no other place shares them."""
    for shard in reader.index.shards:
        path = reader.directory / shard
        if path.is_symlink() or path.stat().st_nlink > 1:
            raise MergeError(
                f"{path}: expected a file of its own, found a link, as in the Hugging Face cache, "
                "so that others would change too; write a merged copy elsewhere"
            )
        try:
            path.open("r+b").close()
        except OSError as reason:
            raise MergeError(
                f"{path}: expected a file that may be changed, found {reason}; "
                "write a merged copy elsewhere"
            ) from reason


def _begun(reader: CheckpointReader, patches: Sequence[Patch]) -> UndoJournal | None:
    """Find the journal of the same merge, interrupted or done; refuse any other."""
    journal = find_journal(reader)
    if journal is None:
        return None
    wanted = [(each.described.content_id, each.described.scale) for each in patches]
    found = [(each.get("content_id"), each.get("scale")) for each in journal.patches]
    state = journal.state()
    if found != wanted:
        kind = "merge" if state == "merged" else "unfinished merge"
        names = ", ".join(str(each.get("adapter"))[:200] for each in journal.patches)
        raise MergeError(
            f"{reader.directory}: expected nothing merged in place, found the {kind} of {names}; "
            "unmerge it first, then merge all patches at once"
        )
    check_own_files(reader)
    return journal
