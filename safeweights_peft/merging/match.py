"""Is a checkpoint a base plus patches, and nothing else? Every tensor and file is compared.

Tensors are read one window after the other, so that memory stays at a window of each checkpoint
and one parameter's entries. Which results make which verdict is told in ``verifying``.
"""

import filecmp
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import Progress, files_that_load
from safeweights_peft.delta import Array, bits_differ, digest
from safeweights_peft.errors import MergeError
from safeweights_peft.files import STORED_DTYPES, read_json
from safeweights_peft.merging.edits import Edit
from safeweights_peft.merging.gather import copies, gather_entries
from safeweights_peft.patch.metadata import AdapterMetadata

# What transformers writes anew with each save; it says where a model came from, not what it does.
_PROVENANCE = ("_name_or_path", "transformers_version")

_DTYPES = {dtype.name: dtype for dtype in STORED_DTYPES.values()}


def check_entries(
    merged: CheckpointReader, metadata: AdapterMetadata, indices: Mapping[str, Array]
) -> None:
    """Check by the digests alone that a checkpoint holds what merging an adapter gives."""
    for name, record in metadata.tensors.items():
        wanted = record.merged_digest or record.base_digest  # a safety map changes nothing
        for copy in copies(merged, record):
            found = digest(gather_entries(merged, name, copy, indices[name]))
            if found != wanted:
                kind = "the base's, without the adapter" if found == record.base_digest else found
                raise MergeError(
                    f"{name}: expected merged entries with digest {wanted} in {merged.directory}, "
                    f"found {kind}; merge into the base again"
                )


def match_tensors(
    base: CheckpointReader, merged: CheckpointReader, metadata: AdapterMetadata
) -> list[tuple[str, str]]:
    """Pair the tensors of a base with those of a merged checkpoint that are to be made of them.

    Shards may differ. A tied copy that the adapter names may stand in one checkpoint alone, since
    models are saved with it or without; it is paired with its parameter in the other, which it is
    to be a copy of, whatever the adapter says.
    """
    pairs = [(key, key) for key in base.keys() if key in merged]
    for record in metadata.tensors.values():
        (before, *copies_before), (after, *copies_after) = (
            [copy.blocks[0].key for copy in copies(reader, record)] for reader in (base, merged)
        )
        pairs += [(key, after) for key in copies_before if key not in merged]
        pairs += [(before, key) for key in copies_after if key not in base]
    missing = sorted({*base.keys()} - {key for key, _ in pairs})
    extra = sorted({*merged.keys(), *merged.unlisted()} - {key for _, key in pairs})
    for keys, wanted, found in (
        (missing, "the tensors of the base", "without"),
        (extra, "no tensors but the base's", "with"),
    ):
        if keys:
            raise MergeError(
                f"{merged.directory}: expected {wanted}, found it {found} {_names(keys)}; "
                "merge into the base again"
            )
    for pair in pairs:
        _check_same_kind(base, merged, *pair)
    return pairs


def compare_tensors(
    base: CheckpointReader,
    merged: CheckpointReader,
    pairs: Sequence[tuple[str, str]],
    changes: Iterable[Edit],
    progress: Progress | None = None,
) -> None:
    """Compare every entry of a merged checkpoint with the base's or the merged one."""
    done, total = 0, sum(merged.info(key).size_bytes for _, key in pairs)
    waiting: dict[str, list[str]] = {}
    for source, key in pairs:
        waiting.setdefault(source, []).append(key)

    def compare(source: str, edit: Edit | None) -> None:
        nonlocal done
        for key in waiting.pop(source, []):
            _compare_pair(base, merged, source, key, edit)
            done += merged.info(key).size_bytes
            if progress is not None:
                progress(done, total)

    for edit in changes:
        compare(edit.key, edit)
    for source in list(waiting):
        compare(source, None)


def compare_files(base: Path, merged: Path) -> int:
    """Compare the files beside the shards that can change what a loaded model does.

    The same bytes are the same, and so is JSON that says the same but for who saved it when.
    """
    ours, theirs = (set(files_that_load(folder)) for folder in (base, merged))
    found = [f"{name} missing" for name in sorted(ours - theirs)]
    found += [f"{name} added" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        if not filecmp.cmp(base / name, merged / name, shallow=False):
            found += [f"{name} changed{told}" for told in _changes(base / name, merged / name)]
    if found:
        raise MergeError(
            f"{merged}: expected the files that loading reads as they are in {base}, found "
            f"{'; '.join(found)}; take these files from the base"
        )
    return len(ours)


def _changes(before: Path, after: Path) -> Iterator[str]:
    """Tell where two files of other bytes differ: nowhere if they are JSON that says the same."""
    if before.suffix != ".json":
        yield ""
        return
    left, right = (_fields(read_json(path, MergeError)) for path in (before, after))
    keys = [key for key in left.keys() | right.keys() if left.get(key) != right.get(key)]
    if keys:
        yield f" in {_names(sorted(keys))}"


def _fields(content: Mapping[str, Any]) -> dict[str, str]:
    """Write an object's fields as text, in which 1, 1.0 and true are three things."""
    return {
        key: json.dumps(value, sort_keys=True)
        for key, value in content.items()
        if key not in _PROVENANCE
    }


def _check_same_kind(
    base: CheckpointReader, merged: CheckpointReader, source: str, key: str
) -> None:
    before, after = base.info(source), merged.info(key)
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        raise MergeError(
            f"{key}: expected {before.dtype} {list(before.shape)} in {merged.directory} as in the "
            f"base, found {after.dtype} {list(after.shape)}; merge into the base again, in its own "
            "dtype"
        )


def _compare_pair(
    base: CheckpointReader, merged: CheckpointReader, source: str, key: str, edit: Edit | None
) -> None:
    dtype = _DTYPES.get(base.info(source).dtype, np.dtype(np.uint8))  # else byte by byte
    indices, entries = _in_order(edit, dtype)
    first = wrong = 0
    message = ""
    windows = zip(base.read_windows(source), merged.read_windows(key), strict=True)
    for expected, found in ((left.view(dtype), right.view(dtype)) for left, right in windows):
        here = slice(*np.searchsorted(indices, [first, first + expected.size]))
        expected[indices[here] - first] = entries[here]
        differ = np.flatnonzero(bits_differ(expected, found))
        if differ.size and not wrong:
            at = int(differ[0])
            kind = "the merged" if first + at in indices[here] else "the base's"
            message = f"{kind} {expected[at]} at index {first + at}, found {found[at]}"
        wrong += differ.size
        first += expected.size
    if wrong:
        raise MergeError(
            f"{key}: expected in {merged.directory} {message} ({wrong} of its entries differ); "
            "this is not the base with this adapter alone"
        )


def _in_order(edit: Edit | None, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Give an edit's indices, ascending, and the merged entries there."""
    if edit is None:
        return np.empty(0, np.int64), np.empty(0, dtype)
    order = np.argsort(edit.indices)
    return edit.indices[order].astype(np.int64), edit.merged[order]


def _names(keys: list[str]) -> str:
    """Name a few keys, and count the others."""
    few = ", ".join(repr(key[:200]) for key in keys[:3])
    return few if len(keys) <= 3 else f"{few} and {len(keys) - 3} more"
