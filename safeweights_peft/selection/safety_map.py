"""Safety maps made of selected entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, digest
from safeweights_peft.fetching import BaseModel
from safeweights_peft.modeling.layout import describe
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode, entries_by_block
from safeweights_peft.selection.topk import Selected


def build_map(
    model: PreTrainedModel,
    base: BaseModel,
    selected: Mapping[str, Selected],
    selection: dict[str, Any],
) -> SafetyMap:
    """Build a map that records where the entries are, on which base, and how they were chosen."""
    reader = CheckpointReader(base.path)
    records = describe(model, selected, base.path)
    for name, entries in selected.items():
        # From disk: the model in memory may hold the entries in a narrower dtype.
        record, pieces = records[name], entries_by_block(records[name], entries.indices)
        values = reader.gather_pieces(pieces, entries.indices.size, DTYPES[record.dtype])
        records[name] = replace(record, count=values.size, base_digest=digest(values))
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
