"""What a live adapter holds: made for a model, rounded, summed, described and saved."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from peft import PeftModel, PeftModelForCausalLM
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from safeweights_peft.delta import DTYPES, Array, SparseDelta, add_rounded, digest, index_dtype
from safeweights_peft.errors import BaseMismatchError, ModelError, UnsupportedFeatureError
from safeweights_peft.modeling.tensors import check_entries, to_numpy, to_torch
from safeweights_peft.patch.artifacts import encode_entries
from safeweights_peft.patch.metadata import (
    FORMAT_MINOR,
    AdapterMetadata,
    record_from_json,
    record_to_json,
)
from safeweights_peft.patch.records import Encoding, Mode, TensorRecord
from safeweights_peft.tuner.beside import is_stored
from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.layer import layers
from safeweights_peft.tuner.loading import find_parameter
from safeweights_peft.tuner.parameter import Term

Deltas = Mapping[str, SparseDelta]
# Children by which FSDP, activation checkpointing and torch.compile wrap a module.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def create_adapter(
    model: nn.Module,
    metadata: AdapterMetadata,
    indices: Mapping[str, Array],
    adapter_name: str = "default",
    values: Mapping[str, Array] | None = None,
) -> PeftModel:
    """Give a model a new, trainable adapter, and activate it.

    Args:
        model: A causal language model, or a PeftModel that gets one more adapter. It is changed in
            place: the values stand beside the parameters, in the modules that own them.
        metadata: Description of the parameters, such as a safety map's; counts and digests are
            made here. Where it has a base digest already, the base must match.
        indices: Flat indices by in-memory parameter name; each ``(count,)``, ascending, unique.
        adapter_name: Name of the adapter.
        values: Values by parameter name, to be rounded to their storage dtype; each ``(count,)``.
            Zeros if None.

    Returns:
        The PeftModel.

    Raises:
        ModelError: A parameter has no record.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from safeweights_peft import create_adapter, read_map
        >>> safety_map = read_map("demo/run/map")
        >>> base = AutoModelForCausalLM.from_pretrained("demo/base")
        >>> model = create_adapter(base, safety_map.metadata, safety_map.indices)
        >>> model.active_adapters
        ['default']
    """
    deltas = {}
    dtype = DTYPES[metadata.values_dtype]
    for name, flat in indices.items():
        record = metadata.tensors.get(name)
        if record is None:
            raise ModelError(
                f"{name}: expected a record in metadata, found none; describe the parameter first"
            )
        flat = np.asarray(flat, index_dtype(record.numel))
        new = np.zeros(flat.shape, dtype) if values is None else np.asarray(values[name], dtype)
        deltas[name] = SparseDelta(record.shape, flat, new)
    peft_model = model if isinstance(model, PeftModel) else None
    base = model if peft_model is None else peft_model.get_base_model()
    described = describe_deltas(base, replace(metadata, mode=Mode.SET), deltas)
    config = SafeWeightsConfig.from_metadata(described)
    if peft_model is None:
        peft_model = PeftModelForCausalLM(model, config, adapter_name)
    else:
        peft_model.add_adapter(adapter_name, config)
    fill(base, adapter_name, deltas)
    peft_model.set_adapter(adapter_name)
    return peft_model


def describe_deltas(model: nn.Module, metadata: AdapterMetadata, deltas: Deltas) -> AdapterMetadata:
    """Describe deltas of a model, with the digests of its entries."""
    found = {layer.name: layer for layer in layers(model)}
    records = {}
    for name, delta in deltas.items():
        record = metadata.tensors[name]
        parameter = find_parameter(model, name, record)
        indices = to_torch(delta.indices).to(parameter.device)
        if name in found:  # the parameter may hold entries of adapters
            entries = found[name].selection.gather(indices)
        else:
            entries = parameter.detach().flatten().index_select(0, indices)
        if record.base_digest:
            check_entries(name, entries, record)
        # In memory all indices are flat.
        records[name], _ = _with_digests(record, delta, entries, metadata.scale, may_group=False)
    return replace(metadata, tensors=records)


def new_deltas(model: nn.Module, config: SafeWeightsConfig) -> dict[str, SparseDelta]:
    """Describe in a config the patch of zeros that it asks for; none if it asks for no new one."""
    safety_map, config.safety_map = config.safety_map, None
    if safety_map is None:
        return {}
    metadata, deltas = replace(safety_map.metadata, mode=Mode.SET), {}
    for name, flat in safety_map.indices.items():
        zeros = np.zeros(flat.shape, DTYPES[metadata.values_dtype])
        deltas[name] = SparseDelta(metadata.tensors[name].shape, flat, zeros)
    config.tensors = describe_deltas(model, metadata, deltas).to_config()["tensors"]
    return deltas


def fill(model: nn.Module, adapter: str, deltas: Deltas) -> None:
    """Put indices and values into an adapter that has room for them."""
    with torch.no_grad():
        for layer in layers(model, adapter) if deltas else ():
            delta = deltas[layer.name]
            layer.indices[adapter].copy_(to_torch(delta.indices))
            layer[adapter].copy_(to_torch(delta.values))
            layer.accept(adapter)


def round_values(model: PeftModel | PreTrainedModel, adapter_name: str = "default") -> None:
    """Round an adapter's live values to their storage dtype, so that what is evaluated is shipped.

    Args:
        model: The PeftModel, or a model into which the adapter was loaded.
        adapter_name: The adapter.

    Raises:
        ModelError: The model has no such adapter.

    Example:
        >>> from safeweights_peft import load_model, round_values
        >>> model = load_model("demo/base", "demo/run/patch", merge=False)
        >>> round_values(model)  # after training, before evaluating
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ModelError(
            f"adapter {adapter_name!r}: expected an adapter of the model "
            f"({', '.join(configs) or 'it has none'}), found none; name one, or load it first"
        )
    dtype = getattr(torch, configs[adapter_name].values_dtype)
    with torch.no_grad():
        for layer in layers(model, adapter_name):
            layer.check([adapter_name])
            values = layer[adapter_name]
            values.copy_(values.to(dtype))
            layer.selection.sync()


def weighted_sum(
    model: nn.Module, configs: Mapping[str, SafeWeightsConfig], weights: Sequence[tuple[str, float]]
) -> tuple[AdapterMetadata, dict[str, SparseDelta]]:
    """Sum adapters over the union of their entries, in float32 and with their present scales."""
    records, deltas = {}, {}
    for layer in layers(model):
        layer.check(adapter for adapter, _ in weights)
        scaled = [
            term._replace(scale=weight * term.scale)
            for adapter, weight in weights
            for term in layer.terms([adapter])
        ]
        if scaled:
            name = layer.name
            records[name] = _common_record(name, [configs[term.adapter] for term in scaled])
            deltas[name] = _sum_terms(scaled, records[name].shape)
    first = configs[weights[0][0]].to_metadata(f"adapter {weights[0][0]!r}")
    adapters, factors = zip(*weights, strict=True)
    selection = {"method": "weighted_sum", "adapters": list(adapters), "weights": list(factors)}
    metadata = replace(
        first, scale=1.0, values_dtype="float32", selection=selection, tensors=records
    )
    return metadata, deltas


@contextmanager
def saving_checkpoints(model: PeftModel) -> Iterator[None]:
    """Save the active adapter as a state to resume from, not as a patch, while it trains."""
    # A Trainer saves a checkpoint as a user saves a patch. Its digests would be of values that the
    # next step changes: they stay null, and whoever takes a checkpoint for a patch is refused.
    config = model.peft_config[model.active_adapter]
    before = {name: getattr(config, name) for name in ("values_dtype", "tensors", "format_minor")}
    config.values_dtype = "float32"  # rounded values would not continue the same training
    config.is_patch = False
    try:
        yield
    finally:
        vars(config).update(before, is_patch=True)


def stored_tensors(
    model: nn.Module, config: SafeWeightsConfig, adapter: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Select an adapter's tensors as they are stored, and bring its config up to date."""
    stored: dict[str, Tensor] = {}
    records = dict(config.tensors)
    paths = {module: path for path, module in model.named_modules()}
    for layer in layers(model, adapter):
        layer.check([adapter])
        indices, values = (
            _find_stored(state_dict, f"{paths[module]}.{adapter}")
            for module in (layer.indices, layer)
        )
        if is_stored(indices, values):  # as before the check
            indices, values = layer.indices[adapter], layer[adapter].detach()
        values = values.to(getattr(torch, config.values_dtype))
        if isinstance(values, DTensor):
            raise UnsupportedFeatureError(
                f"{layer.name}: expected whole values to save, found sharded ones; pass the "
                "gathered state, as in save_pretrained(..., state_dict=full_state_dict)"
            )
        record = record_from_json(records[layer.name], layer.name)
        delta = SparseDelta(record.shape, to_numpy(indices), to_numpy(values))
        if config.is_patch:
            entries = layer.base_entries(adapter)
            record, first = _with_digests(record, delta, entries, config.scale)
            if record.encoding.group is not None:
                indices = to_torch(first)
        else:
            record = _without_digests(record)
        for module, tensor in ((layer.indices, indices), (layer, values)):
            stored[f"{_without_wrappers(paths[module])}.{adapter}"] = tensor
        records[layer.name] = record_to_json(record)
    config.tensors, config.format_minor = records, FORMAT_MINOR
    return stored


def _find_stored(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    """Find a tensor by its name in the model; some wrappers take their own names out of keys."""
    return state_dict[key if key in state_dict else _without_wrappers(key)]


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _with_digests(
    record: TensorRecord,
    delta: SparseDelta,
    entries: Tensor,
    scale: float,
    *,
    may_group: bool = True,
) -> tuple[TensorRecord, Array]:
    """Describe a delta; return the record, and the indices as it stores them."""
    base = to_numpy(entries, record.dtype)
    plain = replace(record, encoding=Encoding.PLAIN)
    described, stored, _ = encode_entries(
        Mode.SET, plain, delta.indices, delta.values, None, may_group=may_group
    )
    described = replace(
        described,
        base_digest=digest(base),
        merged_digest=digest(add_rounded(base, delta.values, scale)),
    )
    return described, stored


def _without_digests(record: TensorRecord) -> TensorRecord:
    """Forget the digests of stored and merged values, and the layout that is stored."""
    return replace(record, encoding=Encoding.PLAIN, streams={}, digest=None, merged_digest=None)


def _common_record(name: str, configs: Sequence[SafeWeightsConfig]) -> TensorRecord:
    """Take what all adapters say of a parameter, without what depends on their entries."""
    records = [
        replace(
            _without_digests(record_from_json(config.tensors[name], name)),
            count=0,
            content_digest=None,
            base_digest=None,
        )
        for config in configs
    ]
    if any(record != records[0] for record in records):
        raise BaseMismatchError(
            f"{name}: expected adapters that agree on shape, dtype and place on disk, found ones "
            "that do not; combine adapters of one base"
        )
    return records[0]


def _sum_terms(terms: Sequence[Term], shape: tuple[int, ...]) -> SparseDelta:
    indices = [to_numpy(term.indices) for term in terms]
    union = np.unique(np.concatenate(indices))
    total = np.zeros(union.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # SparseDelta refuses what is not finite
        for own, term in zip(indices, terms, strict=True):
            total[np.searchsorted(union, own)] += np.float32(term.scale) * to_numpy(term.values)
    return SparseDelta(shape, union, total)
