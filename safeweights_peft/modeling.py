"""Base models: find them, load them, name their parameters, and say where each lives on disk.

The only translator between in-memory parameters and checkpoint keys, and the only file that uses
transformers' weight conversion. It never sees an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.core_model_loading import revert_weight_conversion

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import ModelError
from safeweights_peft.format import Block, TensorRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class BaseModel:
    """Where a base model was found.

    Attributes:
        name: the Hub id or path as the user gave it; recorded in adapters.
        path: the local directory with its files.
        revision: the Hub commit, or None for a plain directory.
    """

    name: str
    path: Path
    revision: str | None


def resolve_base(
    base: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES
) -> BaseModel:
    """Finds a base model: a local directory, or a Hub id (downloaded into the cache).

    Args:
        base: directory or Hub id.
        revision: branch, tag or commit on the Hub; the default branch if None.
        files: which files of a Hub id are needed, as patterns.

    Returns:
        The local directory and, for a Hub id, the commit that it holds.

    Raises:
        ModelError: there is no such directory or repository, it has no config.json, or a revision
            of a directory is asked for.
    """
    path = Path(base)
    commit = None
    if path.is_dir() and revision is not None:
        raise ModelError(
            f"--revision {revision}: expected a base on the Hub, found the directory {base}, which "
            "has no revisions; leave it out"
        )
    if not path.is_dir():
        path = download(base, files, "a model directory or a Hub id", revision)
        commit = path.name
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{base}: expected a Hugging Face model with config.json, found none; "
            "give the directory that save_pretrained wrote, or a Hub id"
        )
    return BaseModel(base, path, commit)


def download(
    source: str, patterns: Sequence[str], wanted: str, revision: str | None = None
) -> Path:
    """Downloads files of a Hub repository into the cache, unless they are there.

    Args:
        source: the Hub id.
        patterns: which files.
        wanted: what the user was to give, for the message.
        revision: branch, tag or commit; the default branch if None.

    Returns:
        The snapshot's directory, which is named by its commit.

    Raises:
        ModelError: there is no such repository, or it can't be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{source}: expected {wanted}, found neither ({error}); "
            "check the spelling, the network and your access"
        ) from error


def pick_device(device: str | None = None) -> torch.device:
    """Chooses where to compute.

    Args:
        device: a torch device, or None for the accelerator where there is one.

    Returns:
        The device.

    Raises:
        ModelError: torch doesn't know `device`, or can't use it here.
    """
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
    """Chooses the dtype to compute in.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: float32 on a CPU, where 16-bit
            arithmetic is slow, and the checkpoint's own dtype elsewhere.
        device: where the model will run.

    Returns:
        A torch dtype, or "auto" for the checkpoint's own.

    Raises:
        ModelError: `dtype` is none of these.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ModelError(f"--dtype: expected auto, {', '.join(DTYPES)}, found {dtype}; choose one")
    found: torch.dtype = getattr(torch, dtype)
    return found


def load_model(
    base: BaseModel, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Loads a causal language model for inference: evaluation mode, no gradients.

    Args:
        base: a resolved base model.
        dtype: what to load the weights in; "auto" is the checkpoint's own.
        device: where the model goes.

    Returns:
        The model.

    Raises:
        ModelError: transformers can't load it, or its weights are quantized.
    """
    return _load(AutoModelForCausalLM, "causal language model", base, dtype, device)


def load_classifier(
    base: BaseModel, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Loads a sequence classifier for inference: evaluation mode, no gradients.

    Args:
        base: the resolved classifier.
        dtype: what to load the weights in; "auto" is the checkpoint's own.
        device: where the model goes.

    Returns:
        The model.

    Raises:
        ModelError: transformers can't load it, or its weights are quantized.
    """
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
            f"found {type(error).__name__}: {error}"
        ) from error
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"{base.name}: expected float weights, found a quantized model; use its original"
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer and makes sure that it can pad.

    Args:
        base: a resolved base model.

    Returns:
        The tokenizer; the end-of-text token pads where no padding token is set.

    Raises:
        ModelError: there is no tokenizer, or it has neither a padding nor an end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{base.name}: expected a tokenizer, found none: {error}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{base.name}: expected a padding or end token in the tokenizer")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def total_parameters(model: nn.Module) -> int:
    """Counts the entries of all parameters, tied ones once.

    Args:
        model: any module.

    Returns:
        The count that densities refer to, as in the paper (embeddings included).
    """
    return sum(parameter.numel() for parameter in model.parameters())


def eligible_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Lists the parameters that may carry selected entries.

    Embeddings (and an untied output head), norms, biases and routers are left out: norms and
    biases are vectors (one for each expert where experts are fused), and moving embeddings or
    routers changes the model everywhere at once.

    Args:
        model: a causal language model without adapters.

    Returns:
        In-memory parameter names and parameters, in the model's order.
    """
    head = model.get_output_embeddings()
    left_out = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in left_out and not _is_left_out(name)
    }


def _is_left_out(name: str) -> bool:
    """Tells routers by their module's name, and biases by their own."""
    module, _, own = name.rpartition(".")
    return module.rpartition(".")[2] in ROUTER_NAMES or own.endswith("bias")


def describe(
    model: PreTrainedModel, names: Iterable[str], base_path: Path | None
) -> dict[str, TensorRecord]:
    """Says for each parameter what it is and where it lives in the base's checkpoint.

    Args:
        model: a causal language model without adapters.
        names: in-memory parameter names.
        base_path: the base's directory, whose keys, shapes and dtypes are checked; None for a model
            that was never on disk.

    Returns:
        One record per parameter, without count and digests: these depend on the indices.

    Raises:
        ModelError: the model has no such parameter, or the checkpoint has no counterpart of it, or
            one of another shape.
    """
    reader = None if base_path is None else CheckpointReader(base_path)
    parameters = dict(model.named_parameters())
    records = {}
    for name in names:
        if name not in parameters:
            raise ModelError(
                f"{name}: expected a parameter of the model, found none; a tied one goes by its "
                "first name, as in named_parameters()"
            )
        records[name] = _describe_parameter(model, name, parameters[name], reader)
    return records


def _describe_parameter(
    model: PreTrainedModel, name: str, parameter: nn.Parameter, reader: CheckpointReader | None
) -> TensorRecord:
    positions = torch.arange(parameter.numel()).view(parameter.shape)
    blocks = tuple(
        _block(name, key, value.numpy())
        for key, value in revert_weight_conversion(model, {name: positions}).items()
    )
    dtype = str(parameter.dtype).removeprefix("torch.")
    if reader is not None:
        blocks = tuple(_on_disk(model, name, block, reader) for block in blocks)
        dtype = _common_dtype(name, {reader.info(block.key).dtype for block in blocks})
    return TensorRecord(
        shape=tuple(parameter.shape),
        dtype=dtype,
        blocks=blocks,
        tied_keys=_tied_names(model, name, parameter),
    )


def _block(name: str, key: str, positions: np.ndarray) -> Block:
    """Describes a checkpoint tensor as a strided view of the parameter's flat storage."""
    origin = (0,) * positions.ndim
    offset = int(positions[origin])
    strides = []
    for axis, size in enumerate(positions.shape):
        step = tuple(int(i == axis) for i in range(positions.ndim))
        strides.append(int(positions[step]) - offset if size > 1 else 1)
    rebuilt = np.full((), offset, dtype=np.int64)
    for stride, size in zip(strides, positions.shape, strict=True):
        rebuilt = rebuilt[..., None] + stride * np.arange(size)
    if not np.array_equal(rebuilt, positions):
        raise ModelError(
            f"{name}: expected checkpoint tensor {key} to be a strided view of it, found another "
            "layout; this architecture can't be patched on disk yet"
        )
    return Block(key=key, shape=positions.shape, offset=offset, strides=tuple(strides))


def _on_disk(model: PreTrainedModel, name: str, block: Block, reader: CheckpointReader) -> Block:
    bare = block.key.removeprefix(f"{model.base_model_prefix}.")
    key = next((key for key in (block.key, bare) if key in reader), None)
    if key is None:
        raise ModelError(
            f"{name}: expected {block.key} in {reader.directory}, found no such tensor; "
            "was the checkpoint saved by another version of transformers?"
        )
    shape = reader.info(key).shape
    if tuple(shape) != tuple(block.shape):
        raise ModelError(
            f"{name}: expected {key} of shape {tuple(block.shape)}, found {tuple(shape)}; "
            "the checkpoint does not belong to this model"
        )
    return replace(block, key=key)


def _common_dtype(name: str, dtypes: set[str]) -> str:
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ModelError(
            f"{name}: expected one of the dtypes {', '.join(DTYPES)} on disk, "
            f"found {', '.join(sorted(dtypes))}; convert the checkpoint first"
        )
    return dtypes.pop()


def _tied_names(model: nn.Module, name: str, parameter: nn.Parameter) -> tuple[str, ...]:
    everything = model.named_parameters(remove_duplicate=False)
    return tuple(other for other, value in everything if value is parameter and other != name)


class AnswerBatch(Protocol):
    """Prompts and answers side by side; `data.Batch` is one and explains them."""

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, P + A) token ids."""
        ...

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, P + A), 1 where a token stands."""
        ...

    @property
    def position_ids(self) -> torch.Tensor:
        """(B, P + A), counted over each row's tokens."""
        ...

    @property
    def answer_ids(self) -> torch.Tensor:
        """(B, A) answers, padded on the right."""
        ...

    @property
    def shared(self) -> int:
        """How many leading columns are the same in all rows."""
        ...


def answer_logits(model: nn.Module, batch: AnswerBatch) -> torch.Tensor:
    """Computes the logits that predict the answers; no others are materialised.

    Columns that all rows share (a system prompt) are computed once, not once per row, where the
    model keeps plain keys and values of its past; gradients flow through them all the same.

    Args:
        model: a causal language model, with or without adapters.
        batch: B rows with answers of at most A tokens.

    Returns:
        (B, A, V) float32: column t predicts answer token t.
    """
    past = _shared_past(model, batch) if batch.shared and len(batch.input_ids) > 1 else None
    start = batch.shared if past else 0
    output = model(
        input_ids=batch.input_ids[:, start:],
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids[:, start:],
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=last_columns(batch.answer_ids.shape[1] + 1)[:-1],
    )
    return output.logits.float()


def last_columns(count: int) -> torch.Tensor:
    """Names the last columns of a batch in the form for which a model computes logits fastest.

    Told a number instead, transformers takes a view of the hidden states, for which torch copies
    the whole output matrix once per row: half of a short step's time.

    Args:
        count: how many columns.

    Returns:
        ``logits_to_keep`` for a model of transformers: (count,) int64, -count to -1.
    """
    return torch.arange(-count, 0)


def _shared_past(model: nn.Module, batch: AnswerBatch) -> DynamicCache | None:
    """Computes the shared columns once; None for a model with another kind of memory."""
    columns = slice(0, batch.shared)
    past = model(
        input_ids=batch.input_ids[:1, columns],
        position_ids=batch.position_ids[:1, columns],
        use_cache=True,
        logits_to_keep=last_columns(1),
    ).past_key_values
    if not isinstance(past, DynamicCache) or {type(each) for each in past.layers} != {DynamicLayer}:
        return None
    past.batch_repeat_interleave(len(batch.input_ids))
    return past
