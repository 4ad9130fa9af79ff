"""Checkpoint directories as transformers saves them: index, lazy reads, patched copies."""

from safeweights_peft.checkpoint.index import CheckpointIndex, open_index
from safeweights_peft.checkpoint.reader import CheckpointReader, TensorInfo
from safeweights_peft.checkpoint.threads import THREADS, in_threads
from safeweights_peft.checkpoint.windows import WINDOW_BYTES
from safeweights_peft.checkpoint.writer import (
    CheckpointDraft,
    Progress,
    draft_copy,
    files_that_load,
    files_to_copy,
)

__all__ = [
    "THREADS",
    "WINDOW_BYTES",
    "CheckpointDraft",
    "CheckpointIndex",
    "CheckpointReader",
    "Progress",
    "TensorInfo",
    "draft_copy",
    "files_that_load",
    "files_to_copy",
    "in_threads",
    "open_index",
]
