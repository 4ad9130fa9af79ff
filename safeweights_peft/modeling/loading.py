"""Load base models, guards and tokenizers; choose where and in which dtype they run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import ModelError
from safeweights_peft.fetching import BaseModel

_LANGUAGE_MODEL, _CLASSIFIER = "causal language model", "sequence classifier"
_OLD_LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")


def pick_device(device: str | None = None) -> torch.device:
    """Choose where to compute: as named, else an accelerator where there is one."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        place = torch.empty(0, device=device).device
        if place.type == "meta":
            raise RuntimeError("meta holds shapes alone")
        return place
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


def find_memory(device: torch.device) -> int | None:
    """Find how many bytes of memory a device, or this process, may have; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    limits = [psutil.virtual_memory().total + psutil.swap_memory().total]
    # A container's limit: whoever passes it is killed without a word.
    for path in (Path("/sys/fs/cgroup/memory.max"), _OLD_LIMIT):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def load_model(
    base: BaseModel, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a causal language model for inference: evaluation mode, no gradients."""
    return _load(None, _LANGUAGE_MODEL, base, dtype, device)


def build_empty(
    base: BaseModel, keys: Iterable[str] = (), *, is_classifier: bool = False
) -> PreTrainedModel:
    """Build a model of the right names, shapes and ties without its weights."""
    kind = _CLASSIFIER if is_classifier else _LANGUAGE_MODEL
    try:
        config = _load_config(base)
        auto = AutoModelForSequenceClassification if is_classifier else _find_class(config, base)
        with torch.device("meta"):
            model: PreTrainedModel = _build(auto, config, base)
    except Exception as error:  # a wrong number in a config makes models fail in any way
        raise ModelError(
            f"{base.name}: expected the config of a {kind} that transformers "
            f"knows, found {_first_line(error)}; give the right base"
        ) from error
    if keys := list(keys):
        _note_conversions(model, keys)
    return model


def _find_class(config: PreTrainedConfig, base: BaseModel) -> Any:
    """Choose the class, of transformers or its Auto ones, that reads a checkpoint as text."""
    own = getattr(config, "auto_map", None) or {}
    if base.trust_remote_code and AutoModelForCausalLM.__name__ in own:
        return AutoModelForCausalLM
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        if type(config) in auto._model_mapping and not _is_encoder_decoder(auto, config):
            return auto
    # A text tower that was saved by itself, as Mllama's, is in no Auto class.
    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if name.endswith("ForCausalLM") and hasattr(model_class, "from_pretrained"):
            return model_class
    raise ValueError(f"a {config.model_type}, which is none")


def _is_encoder_decoder(auto: Any, config: PreTrainedConfig) -> bool:
    # As causal language models, such architectures leave their encoder out.
    return auto is AutoModelForMultimodalLM and config.get_text_config(True).is_encoder_decoder


def _build(model_class: Any, config: PreTrainedConfig, base: BaseModel) -> PreTrainedModel:
    """Build a model by its class, or by an Auto class."""
    is_auto = hasattr(model_class, "from_config")
    build = model_class.from_config if is_auto else model_class._from_config
    model: PreTrainedModel = build(config, **(_own_code(base) if is_auto else {}))
    return model


def _own_code(base: BaseModel) -> dict[str, bool]:
    """Say whether a checkpoint's own code may run."""
    # Without a word, transformers asks on stdout, and waits.
    return {"trust_remote_code": base.trust_remote_code}


def _load_config(base: BaseModel) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(base.path, **_own_code(base))
    return config


def _note_conversions(model: PreTrainedModel, keys: Iterable[str]) -> None:
    """Let a model know how a checkpoint's keys are converted, as loading it would."""
    # Otherwise transformers takes a model with eyes, whose text tower alone is built, for one
    # that was saved without them.
    conversions = get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    for key in keys:
        rename_source_key(key, renamings, converters)
    model._weight_conversions = [item for item in conversions if item.was_used()]


def _first_line(error: Exception) -> str:
    """Shorten what transformers says: some messages list all classes that there are."""
    line = str(error).split("\n")[0]
    line = line if len(line) <= 300 else line[:299] + "…"
    hint = ", which takes --trust-remote-code" if "trust_remote_code" in str(error) else ""
    return f"{type(error).__name__}: {line}{hint}"


def load_classifier(
    base: BaseModel, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a sequence classifier for inference: evaluation mode, no gradients."""
    return _load(AutoModelForSequenceClassification, _CLASSIFIER, base, dtype, device)


def _load(
    model_class: Any | None,
    kind: str,
    base: BaseModel,
    dtype: torch.dtype | str,
    device: torch.device | str,
) -> PreTrainedModel:
    if any(base.path.glob("*.safetensors")):
        # Broken files are named here; transformers says neither which nor what to do.
        CheckpointReader(base.path).unlisted()
    try:
        loader = model_class or _find_class(_load_config(base), base)
        model: PreTrainedModel
        model, report = loader.from_pretrained(
            base.path, dtype=dtype, output_loading_info=True, **_own_code(base)
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{base.name}: expected a {kind} that transformers can load, "
            f"found {_first_line(error)}; give a directory or Hub id of one"
        ) from error
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ModelError(
            f"{base.name}: expected all tensors of a {kind}, found none for {missing[0]}{others}; "
            "fetch the checkpoint again"
        )
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"{base.name}: expected float weights, found a quantized model; use its original"
        )
    # In evaluation, RWKV divides its weights in place where this is set, and its states in turn:
    # entries that are written later would stand undivided among them.
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, and make sure that it can pad."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, **_own_code(base))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{base.name}: expected a tokenizer, found none ({_first_line(error).rstrip(': ')}); "
            "save it beside the model"
        ) from error
    return prepare_tokenizer(tokenizer, base.name)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Make sure that a tokenizer can pad."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{name}: expected a padding or end token in the tokenizer, found neither; "
                "set tokenizer.pad_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
