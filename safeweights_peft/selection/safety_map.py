"""From selected entries to a safety map that names its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from safeweights_peft.delta import digest
from safeweights_peft.format import AdapterMetadata, Mode, SafetyMap
from safeweights_peft.modeling import BaseModel, describe, to_numpy
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
        The map, with digests of the base's values at the indices in the checkpoint's dtype.
    """
    records = describe(model, selected, base.path)
    for name, entries in selected.items():
        record = records[name]
        indices = torch.from_numpy(entries.indices).long()
        values = model.get_parameter(name).detach().reshape(-1).cpu()[indices]
        records[name] = replace(
            record,
            count=entries.indices.size,
            base_digest=digest(to_numpy(values.to(getattr(torch, record.dtype)))),
        )
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
