"""Loads a base model with a patch merged into it: what is evaluated is what is shipped."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from safeweights_peft.modeling import BaseModel, load_model


def load_patched(
    base: BaseModel, adapter: Path, dtype: torch.dtype | str, device: torch.device
) -> PreTrainedModel:
    """Loads a base in its checkpoint's dtype, merges a patch, and only then converts.

    Args:
        base: the base model.
        adapter: the patch's directory.
        dtype: what to compute in; "auto" is the checkpoint's own.
        device: where the model goes.

    Returns:
        The merged model, whose weights are those of a merged checkpoint.
    """
    model = PeftModel.from_pretrained(load_model(base, "auto", device), str(adapter))
    merged = model.merge_and_unload()
    return merged if dtype == "auto" else merged.to(dtype)
