"""Put a base's safety entries back into a model that was fine-tuned without protection.

What training would have kept (see ``training.preserve``) is restored after the fact: the tuned
checkpoint is copied, and the entries of a safety map or patch are overwritten with the base's.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import CheckpointDraft, Progress, draft_copy
from safeweights_peft.delta import DTYPES, Array, bits_differ
from safeweights_peft.errors import BaseMismatchError, MergeError
from safeweights_peft.files import check_apart, check_target
from safeweights_peft.merging.gather import PathLike, base_state, copies, gather_entries
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import Mode, TensorRecord, entries_by_block


@dataclass(frozen=True)
class ProtectReport:
    """What was put back.

    Attributes:
        out_dir: The protected checkpoint.
        tensors: Number of checkpoint tensors that the entries are in, tied copies included.
        entries: Number of entries of the safety map or patch.
        changed: How many of them the fine-tuning had moved, counted once per parameter.
        largest_change: The furthest that one had moved.
        size_bytes: Size of the protected shards.
        seconds: Wall time.
    """

    out_dir: str
    tensors: int
    entries: int
    changed: int
    largest_change: float
    size_bytes: int
    seconds: float


def protect(
    tuned_dir: PathLike,
    base_dir: PathLike,
    artifact_dir: PathLike,
    out_dir: PathLike,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ProtectReport:
    """Write a tuned checkpoint with its base's entries at the indices of a safety map or patch.

    The tuned checkpoint is left as it is. Where it has another dtype than the base, the base's
    entries are rounded to it, to nearest even. All is checked before anything is written, and the
    entries once more before the result appears.

    Args:
        tuned_dir: The fine-tuned checkpoint.
        base_dir: What it was tuned from: the map's base, or the patch's base with the patch merged.
        artifact_dir: The safety map or patch.
        out_dir: Where the protected checkpoint is to appear, whole or not at all.
        overwrite: Replace an existing non-empty directory, whatever it holds.
        progress: Told of the bytes copied.

    Returns:
        What was put back.

    Raises:
        BaseMismatchError: The base is not the map's, or does not hold the patch.
        MergeError: The tuned checkpoint lacks a tensor or has it in another shape, or ``out_dir``
            is in the way of an input.
    """
    started = time.perf_counter()
    check_target(Path(out_dir), overwrite, MergeError)
    inputs = {"tuned_dir": tuned_dir, "base_dir": base_dir, "artifact_dir": artifact_dir}
    check_apart(Path(out_dir), inputs, MergeError)
    artifact = read_artifact(artifact_dir)
    base, tuned = CheckpointReader(base_dir), CheckpointReader(tuned_dir)
    _check_base(base, artifact)
    records = {name: list(_tuned_copies(tuned, name, artifact)) for name in artifact.indices}
    tensors = changed = 0
    largest = 0.0
    with draft_copy(tuned, out_dir, overwrite=overwrite, progress=progress) as draft:
        for name, found in records.items():
            moved, furthest = _put_back(base, draft, artifact, name, found)
            tensors += sum(len(each.blocks) for each in found)
            changed, largest = changed + moved, max(largest, furthest)
        size_bytes = CheckpointReader(draft.reader.directory).size_bytes
    return ProtectReport(
        out_dir=str(out_dir),
        tensors=tensors,
        entries=sum(each.size for each in artifact.indices.values()),
        changed=changed,
        largest_change=largest,
        size_bytes=size_bytes,
        seconds=time.perf_counter() - started,
    )


def put_back(base: CheckpointReader, draft: CheckpointDraft, artifact: Artifact) -> None:
    """Overwrite an artifact's entries in a changed copy of its base with the base's own."""
    for name, record in artifact.metadata.tensors.items():
        _put_back(base, draft, artifact, name, copies(base, record))


def _check_base(base: CheckpointReader, artifact: Artifact) -> None:
    """Refuse a base without the safety that is to be kept: that of a patch must be merged in."""
    state = base_state(base, artifact.metadata, artifact.indices)
    if artifact.metadata.mode is Mode.SET and state == "base":
        raise BaseMismatchError(
            f"{base.directory}: expected the base with the safety patch merged in, found it "
            "without; give the checkpoint that `safeweights merge` wrote"
        )


def _tuned_copies(tuned: CheckpointReader, name: str, artifact: Artifact) -> Iterator[TensorRecord]:
    """Find a parameter in the tuned checkpoint, tied copies included, in the dtype it has there."""
    for copy in copies(tuned, artifact.metadata.tensors[name]):
        for block in copy.blocks:
            found = tuned.info(block.key).shape if block.key in tuned else None
            if found != block.shape:
                raise MergeError(
                    f"{name}: expected {block.key} of shape {list(block.shape)} in "
                    f"{tuned.directory}, found {'none' if found is None else list(found)}; give a "
                    "model that was tuned from this base, unresized"
                )
        dtypes = {tuned.info(block.key).dtype for block in copy.blocks}
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
            raise MergeError(
                f"{name}: expected one of the dtypes {', '.join(DTYPES)} in {tuned.directory}, "
                f"found {', '.join(sorted(dtypes))}; save the tuned model in one of them"
            )
        yield replace(copy, dtype=dtypes.pop())


def _put_back(
    base: CheckpointReader,
    draft: CheckpointDraft,
    artifact: Artifact,
    name: str,
    found: list[TensorRecord],
) -> tuple[int, float]:
    """Overwrite one parameter's entries, and tell how many had moved, how far."""
    indices = artifact.indices[name]
    own = copies(base, artifact.metadata.tensors[name])[0]
    original = gather_entries(base, name, own, indices)
    before = gather_entries(draft.reader, name, found[0], indices)
    for record in found:
        entries = original.astype(DTYPES[record.dtype])
        for key, (positions, local) in entries_by_block(record, indices).items():
            draft.patch(key, local, entries[positions])
    return _distance(before, original.astype(before.dtype))


def _distance(before: Array, after: Array) -> tuple[int, float]:
    """Count the entries whose bits differ, and measure the largest difference."""
    moved = bits_differ(before, after)
    if not moved.any():
        return 0, 0.0
    distance = np.abs(before[moved].astype(np.float64) - after[moved].astype(np.float64))
    return int(moved.sum()), float(distance.max())
