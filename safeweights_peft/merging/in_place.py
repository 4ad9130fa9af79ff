"""Merge safety patches into a checkpoint in place, and undo such a merge."""

import time
from dataclasses import dataclass

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import MergeError
from safeweights_peft.files import PathLike
from safeweights_peft.merging.merge import MergeReport, open_base
from safeweights_peft.merging.sums import (
    Adapters,
    OnOverlap,
    PatchSet,
    find_edits,
    gather_base,
    read_patches,
)
from safeweights_peft.merging.undo import (
    UNDO_DIR,
    UndoJournal,
    check_own_files,
    find_journal,
    sweep,
    write_journal,
)
from safeweights_peft.patch.records import State


@dataclass(frozen=True)
class UnmergeReport:
    """What an unmerge did; counts include tied copies."""

    directory: str
    tensors: int
    entries: int
    seconds: float


def merge_in_place(
    base_dir: PathLike, adapters: Adapters, *, on_overlap: OnOverlap = "add"
) -> MergeReport:
    """Merge safety patches into the checkpoint that they were made for, by changing its files.

    Time and memory grow with the patches, not with the checkpoint. All is checked before anything
    is changed. An interrupted merge is finished by the same call, or undone by :func:`unmerge`. The
    same call on a finished merge changes nothing.

    Args:
        base_dir: The base's checkpoint, which becomes the merged one.
        adapters: As for :func:`merge`.
        on_overlap: As for :func:`merge`.

    Returns:
        What was merged.

    Raises:
        AlreadyMergedError: The base already holds the merged values, and not by such a call.
        BaseMismatchError: A patch was made for another base.
        CheckpointError: The checkpoint was changed since an interrupted merge.
        MergeError: A patch cannot be merged, the shards belong to other places too, or something
            else is merged in place already.

    Example:
        >>> from safeweights_peft import merge_in_place, unmerge
        >>> merged = merge_in_place("demo/base", "demo/run/patch")
        >>> unmerge("demo/base").tensors == merged.tensors
        True
    """
    started = time.perf_counter()
    patches = read_patches(adapters, on_overlap)
    journal, state = _find_same_merge(CheckpointReader(base_dir), patches)
    if journal is None:
        reader = open_base(base_dir)
        check_own_files(reader)
        sweep(reader.directory)  # drafts of a journal whose writing was cut off
        edits = find_edits(gather_base(reader, patches))
        journal = write_journal(reader, patches.summaries, edits)
    # Also where all entries seem to be there: the last call may have ended before they were synced.
    journal.write(State.MERGED)
    return MergeReport(
        out_dir=str(base_dir),
        patches=patches.summaries,
        overlap=patches.overlap,
        tensors=journal.tensors,
        entries=patches.entries,
        size_bytes=journal.reader.size_bytes,
        seconds=time.perf_counter() - started,
        was_merged=State.MERGED in state,
    )


def unmerge(directory: PathLike) -> UnmergeReport:
    """Restore a checkpoint that patches were merged into in place, bit for bit.

    Args:
        directory: The checkpoint.

    Returns:
        What was restored.

    Raises:
        CheckpointError: The checkpoint or its undo journal was changed since.
        MergeError: There is no undo journal.

    Example:
        >>> from safeweights_peft import merge_in_place, unmerge, verify
        >>> merged = merge_in_place("demo/base", "demo/run/patch")
        >>> restored = unmerge("demo/base")
        >>> verify("demo/run/patch", "demo/base").ok
        True
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
    journal.state()  # refuses a checkpoint that was changed since
    # The journal goes last: as long as it is there, the next call can finish this one.
    journal.write(State.BASE)
    journal.remove()
    sweep(reader.directory)
    seconds = time.perf_counter() - started
    return UnmergeReport(str(directory), journal.tensors, journal.entries, seconds)


def _find_same_merge(
    reader: CheckpointReader, patches: PatchSet
) -> tuple[UndoJournal | None, State]:
    """Find the journal of the same merge, interrupted or done; refuse any other."""
    journal = find_journal(reader)
    if journal is None:
        return None, State.OTHER
    state = journal.state()
    expected = [(patch.content_id, patch.scale) for patch in patches.summaries]
    if expected != [(patch.get("content_id"), patch.get("scale")) for patch in journal.patches]:
        kind = "merge" if State.MERGED in state else "unfinished merge"
        names = ", ".join(str(patch.get("adapter"))[:200] for patch in journal.patches)
        raise MergeError(
            f"{reader.directory}: expected nothing merged in place, found the {kind} of {names}; "
            "unmerge it first, then merge all patches at once"
        )
    check_own_files(reader)
    return journal, state
