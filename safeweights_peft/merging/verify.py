"""Verify an adapter: by itself, against its base, and a merged model against both."""

import filecmp
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import OnBytes, files_that_load
from safeweights_peft.delta import bits_differ
from safeweights_peft.errors import (
    AlreadyMergedError,
    CheckpointError,
    CorruptAdapterError,
    MergeError,
    SafeWeightsError,
)
from safeweights_peft.files import STORED_DTYPES, PathLike, read_header, read_json
from safeweights_peft.merging.gather import (
    check_safety,
    find_copies,
    find_state,
)
from safeweights_peft.merging.sums import Edit, combine, describe_patch, find_edits, gather_base
from safeweights_peft.patch.artifacts import Artifact, SafetyMap
from safeweights_peft.patch.io import TENSORS_FILE, read_artifact, read_metadata
from safeweights_peft.patch.metadata import AdapterMetadata

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DTYPES = {dtype.name: dtype for dtype in STORED_DTYPES.values()}

# What transformers writes anew with each save: it says where a model came from, not what it does.
_PROVENANCE = ("_name_or_path", "transformers_version")


class Verdict(StrEnum):
    """The result of a check, or of all of them; the best first."""

    VERIFIED = "verified"
    UNKNOWN = "unknown"
    FAILED = "failed"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Check:
    """One result of :func:`verify`."""

    name: str  # config, tensors, base, commit, result, merged, layout, weights or files
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """The results of :func:`verify`, in order, up to the first that does not hold."""

    content_id: str | None  # None for a broken adapter
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of a check."""
        return max((check.verdict for check in self.checks), key=list(Verdict).index)

    @property
    def ok(self) -> bool:
        """Whether everything was checked, and holds."""
        return self.verdict is Verdict.VERIFIED


@dataclass
class _Log:
    """The checks so far, and the name of the one that is being made."""

    step: str = "config"
    checks: list[Check] = field(default_factory=list)

    def end(self, detail: str, verdict: Verdict = Verdict.VERIFIED) -> None:
        self.checks.append(Check(self.step, verdict, detail))


def verify(
    adapter_dir: PathLike,
    base_dir: PathLike | None = None,
    merged_dir: PathLike | None = None,
    *,
    why_no_base: str = "no base was given",
    progress: OnBytes | None = None,
) -> VerifyReport:
    """Check an adapter, its fit to a base, and that a merged model is the two and nothing else.

    "Verified" is said only of an adapter whose base was seen: its digests are claims until then. A
    merged model is verified if every tensor, and every file that loading reads, is the base's, but
    for the entries that the adapter changes, which must be what merging at the adapter's own scale
    gives. A safety map changes none.

    Args:
        adapter_dir: A safety patch or a safety map.
        base_dir: The base's checkpoint.
        merged_dir: A checkpoint that should be the base with this adapter and nothing else.
        why_no_base: What the report says if there is no ``base_dir``.
        progress: Called with the bytes of ``merged_dir`` compared so far, and all of them.

    Returns:
        The results; a broken adapter or model is a result, not an exception.

    Example:
        >>> from safeweights_peft import merge, verify
        >>> report = merge("demo/base", "demo/run/patch", "merged")
        >>> verify("demo/run/patch", "demo/base", "merged").ok
        True
        >>> verify("demo/run/patch").checks[-1].detail
        'not checked: no base was given'
    """
    log, content_id = _Log(), None
    try:
        artifact = _check_adapter(Path(adapter_dir), log)
        content_id = artifact.metadata.content_id
        log.step = "base"
        base = None
        if base_dir is None:
            log.end(f"not checked: {why_no_base}", Verdict.UNKNOWN)
        else:
            base = _check_base(artifact, Path(adapter_dir), Path(base_dir), log)
        if merged_dir is not None and base is None:
            _check_merged_alone(artifact, merged_dir, log)
        elif merged_dir is not None and base is not None:
            _check_merged(artifact.metadata, *base, merged_dir, log, progress)
    except (CheckpointError, OSError) as reason:
        log.end(str(reason), Verdict.UNREADABLE)
    except SafeWeightsError as reason:
        log.end(str(reason), Verdict.UNREADABLE if log.step == "config" else Verdict.FAILED)
    return VerifyReport(content_id, tuple(log.checks))


def _check_adapter(folder: Path, log: _Log) -> Artifact:
    # What cannot be parsed is no adapter; what breaks another rule of the format is a broken one.
    metadata = read_metadata(folder)
    read_header(folder / TENSORS_FILE, CorruptAdapterError)
    log.end(f"{metadata.mode.artifact}, {len(metadata.tensors)} parameters")
    log.step = "tensors"
    artifact = read_artifact(folder)
    entries = sum(indices.size for indices in artifact.indices.values())
    log.end(f"{entries} entries, as the config says")
    return artifact


def _check_base(
    artifact: Artifact, adapter_dir: Path, base_dir: Path, log: _Log
) -> tuple[CheckpointReader, list[Edit]] | None:
    """Check a base, its commit and what merging makes of it; return it, with all edits."""
    reader = CheckpointReader(base_dir)
    try:
        if isinstance(artifact, SafetyMap):
            find_state(reader, artifact)
            parameters = []
        else:
            # Held, so that the result is only looked at once all of the base is known to be one,
            # and a merged model is compared without reading the base's entries again.
            patches = combine([describe_patch(artifact, str(adapter_dir))])
            parameters = list(gather_base(reader, patches))
    except AlreadyMergedError:
        log.end(
            "holds the merged values, so what it held before can't be told; give the base itself",
            Verdict.UNKNOWN,
        )
        return None
    log.end("holds the base values")
    _check_commit(base_dir, artifact.metadata.revision, log)
    if isinstance(artifact, SafetyMap):
        return reader, []
    log.step = "result"
    edits = list(find_edits(parameters))
    log.end(f"merges into {len(edits)} tensors to the entries that it promises")
    return reader, edits


def _check_commit(base: Path, recorded: str | None, log: _Log) -> None:
    """Compare commits where both are known: in the Hub's cache, folders are named by theirs."""
    folder = base.absolute()
    known = _COMMIT.fullmatch(folder.name) if folder.parent.name == "snapshots" else None
    if known is None or recorded is None or not _COMMIT.fullmatch(recorded):
        return
    log.step = "commit"
    if folder.name == recorded:
        log.end(f"{recorded}, as recorded")
    else:
        log.end(
            f"expected {recorded}, found {folder.name}, which differs from it elsewhere if at all",
            Verdict.UNKNOWN,
        )


def _check_merged_alone(artifact: Artifact, merged_dir: PathLike, log: _Log) -> None:
    """Compare a merged model with the adapter's digests, for want of the base."""
    log.step = "layout"
    merged = CheckpointReader(merged_dir)
    log.step = "merged"
    check_safety(merged, artifact)
    log.end("holds the entries that merging gives")
    log.step = "weights"
    log.end("other entries were not compared: the base is not known", Verdict.UNKNOWN)


def _check_merged(
    metadata: AdapterMetadata,
    base: CheckpointReader,
    edits: Sequence[Edit],
    merged_dir: PathLike,
    log: _Log,
    progress: OnBytes | None,
) -> None:
    """Compare a merged model, tensor by tensor and file by file, with what it is made of."""
    log.step = "layout"
    merged = CheckpointReader(merged_dir)
    pairs = _match_tensors(base, merged, metadata)
    log.end(f"{len(pairs)} tensors, in the base's dtypes and shapes")
    log.step = "weights"
    _compare_tensors(base, merged, pairs, edits, progress)
    log.end("every entry is the base's, or what the adapter makes of it")
    log.step = "files"
    count = _compare_files(base.directory, merged.directory)
    log.end(f"{count} files that loading reads, as in the base")


def _match_tensors(
    base: CheckpointReader, merged: CheckpointReader, metadata: AdapterMetadata
) -> list[tuple[str, str]]:
    """Pair the tensors of a base with those of a merged checkpoint that should be made of them."""
    pairs = [(key, key) for key in base.keys() if key in merged]
    # Models are saved with their tied copies or without. A copy that stands in one checkpoint alone
    # is compared with its parameter in the other, whatever the adapter says of it.
    for record in metadata.tensors.values():
        (before, *copies_before), (after, *copies_after) = (
            [copy.blocks[0].key for copy in find_copies(reader, record)]
            for reader in (base, merged)
        )
        pairs += [(key, after) for key in copies_before if key not in merged]
        pairs += [(before, key) for key in copies_after if key not in base]
    missing = sorted({*base.keys()} - {key for key, _ in pairs})
    extra = sorted({*merged.keys(), *merged.unlisted()} - {key for _, key in pairs})
    for keys, expected, found in (
        (missing, "the tensors of the base", "without"),
        (extra, "no tensors but the base's", "with"),
    ):
        if keys:
            raise MergeError(
                f"{merged.directory}: expected {expected}, found it {found} {_list_names(keys)}; "
                "merge into the base again"
            )
    for source, key in pairs:
        info, hint = base.info(source), "merge into the base again, in its own dtype"
        merged.check_tensor(key, info.shape, info.dtype, error=MergeError, hint=hint)
    return pairs


def _compare_tensors(
    base: CheckpointReader,
    merged: CheckpointReader,
    pairs: Sequence[tuple[str, str]],
    edits: Iterable[Edit],
    progress: OnBytes | None,
) -> None:
    """Compare every entry of a merged checkpoint with the base's or the merged one."""
    changes = {edit.key: edit for edit in edits}
    done, total = 0, sum(merged.info(key).size_bytes for _, key in pairs)
    for source, key in pairs:
        _compare_pair(base, merged, source, key, changes.get(source))
        done += merged.info(key).size_bytes
        if progress is not None:
            progress(done, total)


def _compare_pair(
    base: CheckpointReader, merged: CheckpointReader, source: str, key: str, edit: Edit | None
) -> None:
    dtype = _DTYPES.get(base.info(source).dtype, np.dtype(np.uint8))  # else byte by byte
    indices, entries = np.empty(0, np.int64), np.empty(0, dtype)
    if edit is not None:
        order = np.argsort(edit.indices)
        indices, entries = edit.indices[order].astype(np.int64), edit.merged[order]
    first = wrong = 0
    message = ""
    windows = zip(base.read_windows(source), merged.read_windows(key), strict=True)
    for expected, found in ((left.view(dtype), right.view(dtype)) for left, right in windows):
        here = slice(*np.searchsorted(indices, [first, first + expected.size]))
        expected[indices[here] - first] = entries[here]  # of a window that was read for this alone
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


def _compare_files(base: Path, merged: Path) -> int:
    """Compare the files beside the shards that can change what a loaded model does."""
    ours, theirs = (set(files_that_load(folder)) for folder in (base, merged))
    changes = [f"{name} missing" for name in sorted(ours - theirs)]
    changes += [f"{name} added" for name in sorted(theirs - ours)]
    for name in sorted(ours & theirs):
        if not filecmp.cmp(base / name, merged / name, shallow=False):
            changes += [f"{name} changed{place}" for place in _changes(base / name, merged / name)]
    if changes:
        raise MergeError(
            f"{merged}: expected the files that loading reads as they are in {base}, found "
            f"{'; '.join(changes)}; take these files from the base"
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
        yield f" in {_list_names(sorted(keys))}"


def _fields(content: Mapping[str, Any]) -> dict[str, str]:
    # As text, since to Python 1, 1.0 and true are equal.
    return {
        key: json.dumps(value, sort_keys=True)
        for key, value in content.items()
        if key not in _PROVENANCE
    }


def _list_names(keys: Sequence[str]) -> str:
    """List a few keys, and count the others."""
    few = ", ".join(repr(key[:200]) for key in keys[:3])
    return few if len(keys) <= 3 else f"{few} and {len(keys) - 3} more"
