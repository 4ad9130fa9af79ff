"""Put a base's safety entries back into a model that was fine-tuned without protection."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import CheckpointDraft, OnBytes, draft_copy
from safeweights_peft.delta import DTYPES, Array, bits_differ
from safeweights_peft.errors import MergeError
from safeweights_peft.files import PathLike, check_apart, check_target
from safeweights_peft.merging.gather import check_safety, find_copies, gather_entries
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import TensorRecord, entries_by_block


@dataclass(frozen=True)
class ProtectReport:
    """What was put back."""

    out_dir: str
    tensors: int  # of the checkpoint, tied copies included
    entries: int  # of the safety map or patch
    changed: int  # how many of them fine-tuning had moved
    largest_change: float
    size_bytes: int  # of all shards
    seconds: float


def protect(
    tuned_dir: PathLike,
    base_dir: PathLike,
    artifact_dir: PathLike,
    out_dir: PathLike,
    *,
    overwrite: bool = False,
    progress: OnBytes | None = None,
) -> ProtectReport:
    """Copy a tuned checkpoint, with its base's entries at the indices of a safety map or patch.

    Where the tuned checkpoint has another dtype than the base, the base's entries are rounded to
    it, to nearest even. All is checked before anything is written, and the entries once more before
    the result appears.

    Args:
        tuned_dir: The fine-tuned checkpoint.
        base_dir: What it was tuned from: the map's base, or the patch's base with the patch merged.
        artifact_dir: The safety map or patch.
        out_dir: The protected checkpoint, which appears whole or not at all.
        overwrite: Replace an existing non-empty directory, whatever it holds.
        progress: Called with the bytes copied so far, and the bytes to copy.

    Returns:
        What was put back.

    Raises:
        BaseMismatchError: The base is not the map's, or does not hold the patch.
        MergeError: The tuned checkpoint lacks a tensor or has it in another shape, or ``out_dir``
            is in the way of an input.

    Example:
        >>> from safeweights_peft import protect
        >>> tuned = "demo/base"  # here your fine-tuned model
        >>> protect(tuned, "demo/base", "demo/run/map", "protected").changed
        0
    """
    started = time.perf_counter()
    check_target(Path(out_dir), overwrite, MergeError)
    inputs = {"the tuned model": tuned_dir, "the base": base_dir, "the map": artifact_dir}
    check_apart(Path(out_dir), inputs, MergeError)
    artifact = read_artifact(artifact_dir)
    base, tuned = CheckpointReader(base_dir), CheckpointReader(tuned_dir)
    # The whole base first, so that nothing is written for another one.
    check_safety(base, artifact)
    copies = {name: _find_tuned(tuned, name, artifact) for name in artifact.indices}
    with draft_copy(tuned, out_dir, overwrite=overwrite, progress=progress) as draft:
        moves = [_put_back(base, draft, artifact, name, copies[name]) for name in copies]
        size_bytes = CheckpointReader(draft.reader.directory).size_bytes
    return ProtectReport(
        out_dir=str(out_dir),
        tensors=sum(len(copy.blocks) for records in copies.values() for copy in records),
        entries=sum(indices.size for indices in artifact.indices.values()),
        changed=sum(changed for changed, _ in moves),
        largest_change=max((distance for _, distance in moves), default=0.0),
        size_bytes=size_bytes,
        seconds=time.perf_counter() - started,
    )


def put_back(base: CheckpointReader, draft: CheckpointDraft, artifact: Artifact) -> None:
    """Overwrite an artifact's entries in a changed copy of its base with the base's own."""
    for name, record in artifact.metadata.tensors.items():
        _put_back(base, draft, artifact, name, find_copies(base, record))


def _find_tuned(tuned: CheckpointReader, name: str, artifact: Artifact) -> list[TensorRecord]:
    """Find a parameter in the tuned checkpoint, tied copies included, in the dtype it has there."""
    copies = []
    for copy in find_copies(tuned, artifact.metadata.tensors[name]):
        hint = "give a model that was tuned from this base, unresized"
        dtypes = {
            tuned.check_tensor(block.key, block.shape, name=name, error=MergeError, hint=hint).dtype
            for block in copy.blocks
        }
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
            raise MergeError(
                f"{name}: expected one of the dtypes {', '.join(DTYPES)} in {tuned.directory}, "
                f"found {', '.join(sorted(dtypes))}; save the tuned model in one of them"
            )
        copies.append(replace(copy, dtype=dtypes.pop()))
    return copies


def _put_back(
    base: CheckpointReader,
    draft: CheckpointDraft,
    artifact: Artifact,
    name: str,
    copies: list[TensorRecord],
) -> tuple[int, float]:
    """Overwrite one parameter's entries; return how many had moved, and how far at most."""
    indices = artifact.indices[name]
    # The draft still holds what the tuned model had.
    original = gather_entries(base, name, artifact.metadata.tensors[name], indices)
    before = gather_entries(draft.reader, name, copies[0], indices)
    for record in copies:
        entries = original.astype(DTYPES[record.dtype])
        for key, (positions, local) in entries_by_block(record, indices).items():
            draft.patch(key, local, entries[positions])
    return _measure(before, original.astype(before.dtype))


def _measure(before: Array, after: Array) -> tuple[int, float]:
    """Count the entries whose bits differ, and find the largest difference."""
    moved = np.flatnonzero(bits_differ(before, after))
    distance = np.abs(before[moved].astype(np.float64) - after[moved].astype(np.float64))
    return moved.size, float(distance.max(initial=0.0))
