"""The undo journal of a checkpoint that is merged in place: what changes, written down beforehand.

It is a directory beside the shards. ``entries.bin`` holds, for each tensor that changes, the flat
indices of its entries, what they were and what they become; ``journal.json`` says where, of which
tensors, and by which patches. So the entries on disk themselves tell how far a merge has got, and
every call may write them again, either way.
"""

import math
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.threads import in_threads
from safeweights_peft.checkpoint.writer import CheckpointDraft
from safeweights_peft.delta import WEIGHT_DTYPES, bits_differ, digest, index_dtype
from safeweights_peft.errors import CheckpointError, MergeError
from safeweights_peft.files import publish, read_json, sync, write_json
from safeweights_peft.merging.sums import Edit, MergedPatch
from safeweights_peft.patch.records import State

UNDO_DIR = "safeweights_undo"
JOURNAL_FILE, ENTRIES_FILE = "journal.json", "entries.bin"
VERSION = 1


class UndoJournal:
    """The undo journal of a checkpoint that was, or is being, merged in place."""

    reader: CheckpointReader
    patches: list[dict[str, Any]]  # each MergedPatch as plain JSON, not checked further

    def __init__(self, reader: CheckpointReader) -> None:
        """Read the journal's description, and check it against the checkpoint's headers."""
        self.reader = reader
        content = read_json(self._path / JOURNAL_FILE, CheckpointError)
        if content.get("version") != VERSION:
            self._refuse(f"version {VERSION}", repr(content.get("version")))
        self.patches = content.get("patches", [])
        self._tensors: dict[str, dict[str, Any]] = content.get("tensors", {})
        if not isinstance(self._tensors, dict) or not isinstance(self.patches, list):
            self._refuse("tensors and patches", "something else")
        if not all(isinstance(patch, dict) for patch in self.patches):
            self._refuse("a description of each patch", "something else")
        for key, record in self._tensors.items():
            self._check_record(key, record)

    @property
    def tensors(self) -> int:
        """Number of tensors that change, tied copies included."""
        return len(self._tensors)

    @property
    def entries(self) -> int:
        """Number of entries that change, tied copies included."""
        return sum(record["count"] for record in self._tensors.values())

    def state(self) -> State:
        """Tell what the checkpoint holds now; OTHER is an unfinished merge."""

        def compare(key: str) -> State:
            edit = self._edit(key)
            now = self.reader.gather(key, edit.indices)
            not_base, not_merged = bits_differ(now, edit.base), bits_differ(now, edit.merged)
            if (not_base & not_merged).any():
                raise CheckpointError(
                    f"{self.reader.directory}: {key}: expected the entries from before the merge "
                    "or after it, found others, so the checkpoint was changed since; use the "
                    "original base"
                )
            is_base = State.OTHER if not_base.any() else State.BASE
            return is_base | (State.OTHER if not_merged.any() else State.MERGED)

        state = State.EITHER
        for tensor_state in in_threads(compare, self._tensors):
            state &= tensor_state
        return state

    def write(self, state: State) -> None:
        """Overwrite the entries by the base's or the merged ones, and bring them to the disk."""
        draft = CheckpointDraft(self.reader)

        def restore(shard: str) -> None:
            for key, record in self._tensors.items():
                if record["shard"] == shard:
                    edit = self._edit(key)
                    draft.patch(
                        key, edit.indices, edit.base if state is State.BASE else edit.merged
                    )
            sync(self.reader.directory / shard)

        for _ in in_threads(restore, sorted({r["shard"] for r in self._tensors.values()})):
            pass

    def remove(self) -> None:
        """Remove the journal, whole or not at all."""
        old = self._path.with_name(f".{UNDO_DIR}.{secrets.token_hex(4)}.tmp")
        self._path.rename(old)
        sync(old.parent)
        shutil.rmtree(old)

    @property
    def _path(self) -> Path:
        return self.reader.directory / UNDO_DIR

    def _edit(self, key: str) -> Edit:
        """Read a tensor's indices and its entries before and after, checked by their digest."""
        path, record = self._path / ENTRIES_FILE, self._tensors[key]
        count, start = record["count"], record["start"]
        arrays = []
        for dtype in _dtypes(record):
            arrays.append(np.fromfile(path, dtype, count, offset=start))
            start += count * dtype.itemsize
        found = digest(*arrays)
        if found != record.get("digest"):
            self._refuse(f"entries of {key} with digest {record.get('digest')}", found)
        return Edit(key, *arrays)

    def _check_record(self, key: str, record: Any) -> None:
        if key not in self.reader:
            self._refuse(f"only tensors of {self.reader.directory}", repr(key))
        place = _place(self.reader, key)
        if not isinstance(record, dict) or {name: record.get(name) for name in place} != place:
            self._refuse(f"{key} as it is in {self.reader.directory}", "it laid out in another way")
        count, start = record.get("count"), record.get("start")
        size = (self._path / ENTRIES_FILE).stat().st_size
        # To isinstance, true is an int.
        if type(count) is int and type(start) is int and count >= 0 <= start:
            if start + journal_bytes(self.reader, key, count) <= size:
                return
        self._refuse(f"{key} with a count and a start in {size} bytes", f"{count} and {start}")

    def _refuse(self, expected: str, found: str) -> NoReturn:
        raise CheckpointError(
            f"{self._path}: expected {expected}, found {found[:200]}; do not use this checkpoint, "
            "fetch the base again"
        )


def find_journal(reader: CheckpointReader) -> UndoJournal | None:
    """Open a checkpoint's undo journal, if there is one."""
    return UndoJournal(reader) if (reader.directory / UNDO_DIR).exists() else None


def write_journal(
    reader: CheckpointReader, patches: Sequence[MergedPatch], edits: Iterable[Edit]
) -> UndoJournal:
    """Write an undo journal, which is on the disk when this returns."""
    with publish(reader.directory / UNDO_DIR, False, CheckpointError) as draft:
        tensors = {}
        with (draft / ENTRIES_FILE).open("wb") as file:
            for edit in edits:
                record = _place(reader, edit.key)
                indices = edit.indices.astype(_dtypes(record)[0])
                arrays = indices, edit.base, edit.merged
                record |= {"count": indices.size, "start": file.tell(), "digest": digest(*arrays)}
                for array in arrays:
                    file.write(np.ascontiguousarray(array).view(np.uint8).data)
                tensors[edit.key] = record
        # The journal may be uploaded with its checkpoint, so no path of this machine is in it.
        described = [
            asdict(patch) | {"adapter": Path(patch.adapter).resolve().name} for patch in patches
        ]
        content = {"version": VERSION, "patches": described, "tensors": tensors}
        write_json(draft / JOURNAL_FILE, content)
    # Read back from the disk: what is wrong with it shows before a shard is changed.
    return UndoJournal(reader)


def journal_bytes(reader: CheckpointReader, key: str, count: int) -> int:
    """Return how much of a journal a tensor's entries take."""
    return count * sum(dtype.itemsize for dtype in _dtypes(_place(reader, key)))


def check_own_files(reader: CheckpointReader) -> None:
    """Check that a checkpoint's shards may be changed: that no other place shares them."""
    for shard in reader.shards:
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


def sweep(directory: Path) -> None:
    """Remove what an interrupted call may have left of a journal: one half written or removed."""
    for leftover in directory.glob(f".{UNDO_DIR}.*.tmp"):
        shutil.rmtree(leftover)


def _place(reader: CheckpointReader, key: str) -> dict[str, Any]:
    info = reader.info(key)
    return {
        "shard": info.shard,
        "shape": list(info.shape),
        "dtype": info.dtype,
        "offset": info.offset,
    }


def _dtypes(record: Mapping[str, Any]) -> tuple[np.dtype[Any], ...]:
    """Return the dtypes of a tensor's indices, base entries and merged entries in a journal."""
    entries = WEIGHT_DTYPES[record["dtype"]]
    return index_dtype(math.prod(record["shape"])), entries, entries
