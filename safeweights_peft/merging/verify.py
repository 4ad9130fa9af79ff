"""Verify an adapter: by itself, against its base, and a merged model against both.

Here live the checks' order and the verdict. The rules of the format are checked in ``format``, the
base in ``fit``, a merged model in ``comparing``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import Progress
from safeweights_peft.errors import CheckpointError, CorruptAdapterError, SafeWeightsError
from safeweights_peft.files import read_header
from safeweights_peft.merging.edits import edits
from safeweights_peft.merging.gather import PathLike, base_state
from safeweights_peft.merging.match import (
    check_entries,
    compare_files,
    compare_tensors,
    match_tensors,
)
from safeweights_peft.merging.patches import Patch, describe_patch
from safeweights_peft.patch.artifacts import Artifact, SafetyMap
from safeweights_peft.patch.io import TENSORS_FILE, read_artifact, read_metadata

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Verdict(StrEnum):
    """What a check, or all of them, came to."""

    VERIFIED = "verified"
    FAILED = "failed"
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One result of :func:`verify`.

    Attributes:
        name: What was checked: "config", "tensors", "base", "commit", "result", "merged", "layout",
            "weights" or "files".
        verdict: What it came to.
        detail: What was found.
    """

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """The results of :func:`verify`, up to the first that does not hold.

    Attributes:
        content_id: The adapter's content id; None if it is broken.
        checks: The results, in order.
    """

    content_id: str | None
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of a check."""
        found = {check.verdict for check in self.checks}
        worst_first = Verdict.UNREADABLE, Verdict.FAILED, Verdict.UNKNOWN
        return next((each for each in worst_first if each in found), Verdict.VERIFIED)

    @property
    def ok(self) -> bool:
        """Whether everything was checked, and holds."""
        return self.verdict is Verdict.VERIFIED


@dataclass
class _Log:
    """The checks so far, and the one that is being made."""

    step: str = "config"
    checks: list[Check] = field(default_factory=list)

    def begin(self, step: str) -> None:
        self.step = step

    def end(self, detail: str, verdict: Verdict = Verdict.VERIFIED) -> None:
        self.checks.append(Check(self.step, verdict, detail))


def verify(
    adapter_dir: PathLike,
    base_dir: PathLike | None = None,
    merged_dir: PathLike | None = None,
    *,
    why_no_base: str = "no base was given",
    progress: Progress | None = None,
) -> VerifyReport:
    """Check that an adapter is intact and made for a base, and that a model is both and no more.

    "Verified" is said only of an adapter whose base was seen: its digests are claims until then. A
    model is verified if every tensor, and every file that loading reads, is the base's, but for the
    entries that the adapter changes, which are as merging makes them at the adapter's own scale. A
    safety map changes none.

    Args:
        adapter_dir: A safety patch or a safety map.
        base_dir: The base's checkpoint.
        merged_dir: A checkpoint that is to be the base with this adapter and nothing else.
        why_no_base: What the report says if there is no ``base_dir``.
        progress: Told of the bytes of ``merged_dir`` that were compared.

    Returns:
        The results; a broken adapter or model is a result, not an exception.
    """
    log, content_id = _Log(), None
    try:
        artifact = _check_adapter(Path(adapter_dir), log)
        content_id = artifact.metadata.content_id
        patches = []
        if not isinstance(artifact, SafetyMap):
            patches = [describe_patch(artifact, str(adapter_dir))]
        base = _check_base(artifact, patches, base_dir, why_no_base, log)
        if merged_dir is not None:
            _check_merged(artifact, patches, base, merged_dir, log, progress)
    except (CheckpointError, OSError) as reason:
        log.end(str(reason), Verdict.UNREADABLE)
    except SafeWeightsError as reason:
        log.end(str(reason), Verdict.UNREADABLE if log.step == "config" else Verdict.FAILED)
    return VerifyReport(content_id, tuple(log.checks))


def _check_adapter(folder: Path, log: _Log) -> Artifact:
    """Read an adapter: what can't be parsed is none, what breaks another rule is a broken one."""
    metadata = read_metadata(folder)
    read_header(folder / TENSORS_FILE, CorruptAdapterError)
    log.end(f"{metadata.mode.artifact}, {len(metadata.tensors)} parameters")
    log.begin("tensors")
    artifact = read_artifact(folder)
    entries = sum(part.size for part in artifact.indices.values())
    log.end(f"{entries} entries, as the config says")
    return artifact


def _check_base(
    artifact: Artifact,
    patches: Sequence[Patch],
    base_dir: PathLike | None,
    why_none: str,
    log: _Log,
) -> CheckpointReader | None:
    """Check a base, its commit and what merging makes of it; give it if it is proven to be one."""
    log.begin("base")
    if base_dir is None:
        log.end(f"not checked: {why_none}", Verdict.UNKNOWN)
        return None
    reader = CheckpointReader(base_dir)
    if base_state(reader, artifact.metadata, artifact.indices) == "merged":
        told = "holds the merged values, so what it held before can't be told; give the base itself"
        log.end(told, Verdict.UNKNOWN)
        return None
    log.end("holds the base values")
    _check_commit(Path(base_dir), artifact.metadata.revision, log)
    if patches:
        log.begin("result")
        tensors = sum(1 for _ in edits(reader, patches))
        log.end(f"merges into {tensors} tensors to the entries that it promises")
    return reader


def _check_commit(base: Path, recorded: str | None, log: _Log) -> None:
    """Compare commits where both are known: in the Hub's cache, folders are named by theirs."""
    folder = base.absolute()
    known = _COMMIT.fullmatch(folder.name) if folder.parent.name == "snapshots" else None
    if known is None or recorded is None or not _COMMIT.fullmatch(recorded):
        return
    log.begin("commit")
    if folder.name == recorded:
        log.end(f"{recorded}, as recorded")
    else:
        told = (
            f"expected {recorded}, found {folder.name}, which differs from it elsewhere if at all"
        )
        log.end(told, Verdict.UNKNOWN)


def _check_merged(
    artifact: Artifact,
    patches: Sequence[Patch],
    base: CheckpointReader | None,
    merged_dir: PathLike,
    log: _Log,
    progress: Progress | None,
) -> None:
    """Compare a merged model with all that it is to be made of, as far as that is known."""
    log.begin("layout")
    merged = CheckpointReader(merged_dir)
    if base is None:
        log.begin("merged")
        check_entries(merged, artifact.metadata, artifact.indices)
        log.end("holds the entries that merging gives")
        log.begin("weights")
        log.end("other entries were not compared: the base is not known", Verdict.UNKNOWN)
        return
    pairs = match_tensors(base, merged, artifact.metadata)
    log.end(f"{len(pairs)} tensors, in the base's dtypes and shapes")
    log.begin("weights")
    compare_tensors(base, merged, pairs, edits(base, patches), progress)
    log.end("every entry is the base's, or what the adapter makes of it")
    log.begin("files")
    count = compare_files(base.directory, merged.directory)
    log.end(f"{count} files that loading reads, as in the base")
