"""A LoRA that leaves safety weights alone, on disk: the adapter, and a correction beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.delta import Array, SparseDelta, add_rounded, digest
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import Adapter, Artifact
from safeweights_peft.patch.io import write_adapter
from safeweights_peft.patch.metadata import CORRECTION_OF
from safeweights_peft.patch.records import Mode
from safeweights_peft.training.preserve import compute_correction

CORRECTION = "correction"
"""The correction's directory in that of the LoRA."""


def correct(model: PeftModel, artifact: Artifact) -> dict[str, Array]:
    """Compute what cancels a LoRA's part at an artifact's entries: at those that it moves."""
    return {name: to_numpy(tensor) for name, tensor in compute_correction(model, artifact).items()}


def write_corrected(
    folder: Path,
    model: PeftModel,
    job: Job,
    artifact: Artifact | None,
    values: Mapping[str, Array],
    held: int = 0,
) -> None:
    """Write a LoRA, its correction (unless it needs none) and a card into a folder."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = job.base.name, job.base.revision
    model.save_pretrained(str(folder))
    # A safety patch like any other: it, base and LoRA add up to what was trained.
    if artifact and values:
        write_adapter(folder / CORRECTION, _build_correction(job, artifact, values))
    card = render_card(
        "lora",
        *(job.base.name, job.base.revision),
        **describe_kept(artifact, held),
        is_corrected=bool(values),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def describe_kept(artifact: Artifact | None, held: int) -> dict[str, Any]:
    """Say to a card what was kept: an artifact's entries, and answers that an anchor held."""
    indices = artifact.indices if artifact else {}
    return {
        "entries": sum(flat.size for flat in indices.values()),
        "tensors": len(indices),
        "artifact": artifact.metadata.mode.artifact if artifact else None,
        "held": held,
    }


def _build_correction(job: Job, artifact: Artifact, values: Mapping[str, Array]) -> Adapter:
    records, deltas = {}, {}
    for name, change in values.items():
        record, indices = artifact.metadata.tensors[name], artifact.indices[name]
        entries = gather_entries(job.reader, name, record, indices)
        merged = digest(add_rounded(entries, change, 1.0))
        records[name] = replace(record, base_digest=digest(entries), merged_digest=merged)
        deltas[name] = SparseDelta(record.shape, indices, change)
    metadata = replace(
        artifact.metadata,
        mode=Mode.SET,
        values_dtype="float32",
        scale=1.0,
        selection=artifact.metadata.selection | {CORRECTION_OF: "a LoRA beside it"},
        tensors=records,
    )
    return Adapter(metadata, deltas)
