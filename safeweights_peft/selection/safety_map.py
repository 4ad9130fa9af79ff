"""From selected entries to a safety map that names its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedModel

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, digest
from safeweights_peft.format import AdapterMetadata, Mode, SafetyMap, TensorRecord
from safeweights_peft.modeling import BaseModel, describe
from safeweights_peft.selection.topk import Selected


def build_map(
    model: PreTrainedModel,
    base: BaseModel,
    selected: Mapping[str, Selected],
    selection: dict[str, Any],
) -> SafetyMap:
    """Records where selected entries are, on which base, and how they were chosen.

    Args:
        model: the base model, without adapters.
        base: where it came from; its checkpoint's keys and dtypes are recorded.
        selected: selected entries by parameter name.
        selection: how they were chosen, plain JSON.

    Returns:
        The map, with digests of the checkpoint's own entries at the indices.
    """
    reader = CheckpointReader(base.path)
    records = describe(model, selected, base.path)
    for name, entries in selected.items():
        found = _base_entries(reader, records[name], entries.indices)
        records[name] = replace(records[name], count=found.size, base_digest=digest(found))
    metadata = AdapterMetadata(
        mode=Mode.SPA,
        base_model_name_or_path=base.name,
        revision=base.revision,
        transformers_version=transformers.__version__,
        selection=selection,
        tensors=records,
    )
    return SafetyMap(
        metadata,
        {name: entries.indices for name, entries in selected.items()},
        {name: entries.scores for name, entries in selected.items()},
    )


def _base_entries(reader: CheckpointReader, record: TensorRecord, indices: Array) -> Array:
    """Reads entries from disk: the model in memory may hold them in a narrower dtype."""
    entries = np.empty(indices.size, DTYPES[record.dtype])
    for block in record.blocks:
        positions, local = block.locate(indices)
        entries[positions] = reader.gather(block.key, local)
    return entries
