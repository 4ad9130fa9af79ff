"""A LoRA that leaves safety weights alone, on disk: the adapter, and a correction beside it.

The correction is a safety patch like any other: added to the base, it takes out at the frozen
entries what the LoRA adds there. So base, correction and LoRA together are what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import Array, SparseDelta, add_rounded, digest
from safeweights_peft.errors import ModelError
from safeweights_peft.fetching import BaseModel
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import Adapter, Artifact
from safeweights_peft.patch.io import write_adapter
from safeweights_peft.patch.records import Mode
from safeweights_peft.training.preserve import compute_correction

CORRECTION = "correction"
"""The correction's directory in that of the LoRA."""


def correct(model: PeftModel, artifact: Artifact) -> dict[str, Array]:
    """Compute what takes a LoRA's part at frozen entries out again."""
    values = compute_correction(model, artifact)
    if not values:
        raise ModelError(
            f"model: expected a LoRA on tensors of the {artifact.metadata.mode.artifact}, found "
            "one that changes none of them; it needs no protection"
        )
    return {name: to_numpy(each) for name, each in values.items()}


def write_corrected(
    folder: Path,
    model: PeftModel,
    base: BaseModel,
    artifact: Artifact,
    values: Mapping[str, Array],
) -> None:
    """Write a LoRA, its correction and a card into a folder."""
    correction = build_correction(CheckpointReader(base.path), artifact, values)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.name, base.revision
    model.save_pretrained(str(folder))
    write_adapter(folder / CORRECTION, correction)
    card = render_card(
        "lora",
        *(base.name, base.revision),
        entries=sum(indices.size for indices in artifact.indices.values()),
        tensors=len(artifact.indices),
        artifact=artifact.metadata.mode.artifact,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def build_correction(
    reader: CheckpointReader, artifact: Artifact, values: Mapping[str, Array]
) -> Adapter:
    """Make a safety patch of values at an artifact's entries."""
    records, deltas = {}, {}
    for name, each in values.items():
        record, indices = artifact.metadata.tensors[name], artifact.indices[name]
        entries = gather_entries(reader, name, record, indices)
        corrected = digest(add_rounded(entries, each, 1.0))
        records[name] = replace(record, base_digest=digest(entries), merged_digest=corrected)
        deltas[name] = SparseDelta(record.shape, indices, each)
    metadata = replace(
        artifact.metadata,
        mode=Mode.SET,
        values_dtype="float32",
        scale=1.0,
        selection=artifact.metadata.selection | {"correction_of": "a LoRA beside it"},
        tensors=records,
    )
    return Adapter(metadata, deltas)
