"""Loads a base model with a patch merged into it: what is evaluated is what is shipped."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from safeweights_peft.modeling import BaseModel, load_model
from safeweights_peft.pipeline.adapting import CORRECTION


def load_patched(
    base: BaseModel, adapter: Path, dtype: torch.dtype | str, device: torch.device
) -> PreTrainedModel:
    """Loads a base in its checkpoint's dtype, merges a patch, and only then converts.

    Args:
        base: the base model.
        adapter: directory of the patch, or of a LoRA, which may have a correction.
        dtype: what to compute in; "auto" is the checkpoint's own.
        device: where the model goes.

    Returns:
        The merged model, whose weights are those of a merged checkpoint.
    """
    model = load_model(base, "auto", device)
    correction = adapter / CORRECTION
    parts = [correction, adapter] if correction.is_dir() else [adapter]
    for part in parts:
        model = PeftModel.from_pretrained(model, str(part)).merge_and_unload()
    return model if dtype == "auto" else model.to(dtype)
