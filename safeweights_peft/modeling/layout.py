"""A model's parameters: which may be selected, and where each lives in the base's checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import BaseMismatchError, ModelError
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import TensorRecord

_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


def total_parameters(model: nn.Module) -> int:
    """Count the entries of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def eligible_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """List the parameters that may carry selected entries: matrices, but for a few kinds."""
    # Moving embeddings, an output head or routers changes the model everywhere at once; what text
    # never reaches, as a vision tower, would make a random control weaker than it says.
    head, reached = model.get_output_embeddings(), _find_reached(model)
    excluded = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in reached
        and id(parameter) not in excluded
        and _is_map(model, name, parameter)
    }


def is_router(modules: Iterable[str]) -> bool:
    """Return whether the names of a parameter's modules say that it chooses experts."""
    # Many routers are modules of their own around a linear layer, so any name on the path counts.
    return any(module in _ROUTER_NAMES or module.endswith("_router") for module in modules)


def _find_reached(model: PreTrainedModel) -> set[int]:
    """Identify the parameters of the language model that a text without images or sound uses."""
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():  # ModernBERT calls its output layer so
        decoder = model.base_model
    # Mllama skips these layers where there is no image.
    skipped = getattr(model.config.get_text_config(), "cross_attention_layers", None) or ()
    layers = tuple(f".layers.{number}." for number in skipped)
    return {
        id(parameter)
        for name, parameter in decoder.named_parameters()
        if not any(layer in f".{name}" for layer in layers)
    }


def _is_map(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter holds linear maps, and is no bias, embedding or router."""
    *modules, own = name.split(".")
    # Biases of fused experts and vectors that are shaped to be broadcast have several dimensions.
    if sum(size > 1 for size in parameter.shape) < 2 or own.endswith("bias"):
        return False
    if is_router(modules) or any(module.startswith("embed") for module in modules):
        return False
    # A table such as a state space's A_log stands beside the linear layers of its module.
    children = model.get_submodule(".".join(modules)).children()
    return own.endswith("weight") or not any(
        matrix.ndim >= 2 for child in children for matrix in child.parameters()
    )


def describe(
    model: PreTrainedModel, names: Iterable[str], base_path: Path | None
) -> dict[str, TensorRecord]:
    """Describe parameters: shape, dtype, and where each lives in the base's checkpoint, if any."""
    reader = None if base_path is None else CheckpointReader(base_path)
    parameters = dict(model.named_parameters())
    names_by_parameter: dict[nn.Parameter, list[str]] = {}  # tied ones have several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_parameter.setdefault(parameter, []).append(name)
    names = list(names)
    for name in names:
        if name not in parameters:
            raise ModelError(
                f"{name}: expected a parameter of the model, found none; a tied one goes by its "
                "first name, as in named_parameters()"
            )
    unconverted = _find_unconverted(model, {name: parameters[name] for name in names})
    records = {}
    for name in names:
        parameter, own = parameters[name], name
        tied = names_by_parameter[parameter]
        if name in unconverted:
            # Of tied tensors a file holds the one that the model is tied to, as CamemBERT's the
            # embeddings, which need not be the model's first.
            if reader is not None and len(tied) > 1:
                own = next((key for key in tied if _find_key(model, key, reader)), name)
            blocks = [Block.dense(own, parameter.shape)]
        else:
            blocks = _convert(model, name, parameter)
        dtype = str(parameter.dtype).removeprefix("torch.")
        if reader is not None:
            blocks = [_find_on_disk(model, name, block, reader) for block in blocks]
            dtype = _common_dtype(name, {reader.info(block.key).dtype for block in blocks})
        tied_keys = tuple(other for other in tied if other != own)
        shape = tuple(parameter.shape)
        records[name] = TensorRecord(
            shape=shape, dtype=dtype, blocks=tuple(blocks), tied_keys=tied_keys
        )
    return records


def check_shape(name: str, parameter: Tensor | None, record: TensorRecord, hint: str) -> None:
    """Refuse a parameter that is missing, or of another shape than an adapter records."""
    if parameter is None or tuple(parameter.shape) != record.shape:
        found = "no such parameter" if parameter is None else list(parameter.shape)
        raise BaseMismatchError(
            f"{name}: expected shape {list(record.shape)}, found {found}; {hint}"
        )


def _find_unconverted(model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> set[str]:
    """Find the parameters that are saved as they are, all at once and without any data."""
    empty = {name: torch.empty(p.shape, device="meta") for name, p in parameters.items()}
    saved = revert_weight_conversion(model, dict(empty))
    return {name for name, tensor in empty.items() if saved.get(name) is tensor}


def _convert(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> list[Block]:
    """Follow each entry of a parameter to where it is saved."""
    # transformers' own conversion moves positions as it would weights: whatever it does to them
    # can be read off. They are the largest thing here, so as narrow as they may be.
    narrow = torch.int32 if parameter.numel() < 2**31 else torch.int64
    positions = torch.arange(parameter.numel(), dtype=narrow).view(parameter.shape)
    saved = revert_weight_conversion(model, {name: positions})
    return [_make_block(name, key, tensor.numpy()) for key, tensor in saved.items()]


def _make_block(name: str, key: str, positions: np.ndarray) -> Block:
    """Describe a checkpoint tensor as a strided view of the parameter's flat storage."""
    origin = (0,) * positions.ndim
    offset = int(positions[origin])
    strides = []
    for axis, size in enumerate(positions.shape):
        step = tuple(int(i == axis) for i in range(positions.ndim))
        strides.append(int(positions[step]) - offset if size > 1 else 1)
    rebuilt = np.full((), offset, dtype=positions.dtype)
    for stride, size in zip(strides, positions.shape, strict=True):
        rebuilt = rebuilt[..., None] + stride * np.arange(size, dtype=positions.dtype)
    if not np.array_equal(rebuilt, positions):
        raise ModelError(
            f"{name}: expected checkpoint tensor {key} to be a strided view of it, found another "
            "layout; this architecture can't be patched on disk yet"
        )
    return Block(key=key, shape=positions.shape, offset=offset, strides=tuple(strides))


def _find_on_disk(
    model: PreTrainedModel, name: str, block: Block, reader: CheckpointReader
) -> Block:
    key = _find_key(model, block.key, reader) or block.key
    hint = "give the model's own checkpoint, saved by this version of transformers"
    if block.key != name and key in reader and _is_part(block.shape, reader.info(key).shape):
        hint = (
            "on disk, this architecture keeps several parameters in one tensor, of which no part "
            "can be patched yet"
        )
    reader.check_tensor(key, block.shape, name=name, error=ModelError, hint=hint)
    return replace(block, key=key)


def _find_key(model: PreTrainedModel, key: str, reader: CheckpointReader) -> str | None:
    # A text tower's class names the prefix that tells it from other towers of the checkpoint.
    prefixed = f"{model.base_model_prefix}.{key}"
    return prefixed if key not in reader and prefixed in reader else reader.find_key(key)


def _is_part(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Return whether a shape could be that of a piece of a tensor along one axis."""
    differing = [(own, all_) for own, all_ in zip(shape, whole, strict=False) if own != all_]
    return len(shape) == len(whole) and len(differing) == 1 and differing[0][0] < differing[0][1]


def _common_dtype(name: str, dtypes: set[str]) -> str:
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ModelError(
            f"{name}: expected one of the dtypes {', '.join(DTYPES)} on disk, "
            f"found {', '.join(sorted(dtypes))}; convert the checkpoint first"
        )
    return dtypes.pop()
