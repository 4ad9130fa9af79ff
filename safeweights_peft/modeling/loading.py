"""Load base models, guards and tokenizers; choose where and in which dtype they run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import ModelError
from safeweights_peft.fetching import BaseModel


def pick_device(device: str | None = None) -> torch.device:
    """Choose where to compute: as named, else an accelerator where there is one."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ModelError(
            f"--device {device}: expected a torch device of this machine, found none: {error}; "
            "choose another, or none for the best one here"
        ) from error


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """Choose the dtype to compute in; "auto" on a GPU is the checkpoint's own."""
    if dtype == "auto":
        # On most CPUs, 16-bit matrix products are slower, and sampled gradients need float32.
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ModelError(f"--dtype: expected auto, {', '.join(DTYPES)}, found {dtype}; choose one")
    return getattr(torch, dtype)


def load_model(
    base: BaseModel, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model for inference: evaluation mode, no gradients."""
    return _load(AutoModelForCausalLM, "causal language model", base, dtype, device)


def build_empty(base: BaseModel) -> PreTrainedModel:
    """Build a causal language model of the right names, shapes and ties without its weights."""
    try:
        config = AutoConfig.from_pretrained(base.path)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a wrong number in a config makes models fail in any way
        raise ModelError(
            f"{base.name}: expected the config of a causal language model that transformers "
            f"knows, found {type(error).__name__}: {error}; give the right base by --base"
        ) from error
    return model


def load_classifier(
    base: BaseModel, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a sequence classifier for inference: evaluation mode, no gradients."""
    return _load(AutoModelForSequenceClassification, "sequence classifier", base, dtype, device)


def _load(
    loader: Any,
    kind: str,
    base: BaseModel,
    dtype: torch.dtype | str,
    device: torch.device | str,
) -> PreTrainedModel:
    try:
        model: PreTrainedModel = loader.from_pretrained(base.path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{base.name}: expected a {kind} that transformers can load, "
            f"found {type(error).__name__}: {error}; give a directory or Hub id of one"
        ) from error
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"{base.name}: expected float weights, found a quantized model; use its original"
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, and make sure that it can pad."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{base.name}: expected a tokenizer, found none: {error}; save it beside the model"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{base.name}: expected a padding or end token in the tokenizer, found neither; "
                "set tokenizer.pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
