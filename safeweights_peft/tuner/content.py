"""What an adapter holds: made for a model, summed, described for its config and saved.

Here live the indices, values and digests of whole adapters. Where PEFT calls for them stands in
``model``; how they are loaded, in ``loading``; the format's own rules in ``format``.
"""

from collections.abc import Mapping, Sequence
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
from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.containers import is_coded
from safeweights_peft.tuner.fit import find_parameter
from safeweights_peft.tuner.layer import named_layers, selected_parameters
from safeweights_peft.tuner.parameter import SelectedParameter

Deltas = Mapping[str, SparseDelta]


def create_adapter(
    model: nn.Module,
    metadata: AdapterMetadata,
    indices: Mapping[str, Array],
    adapter_name: str = "default",
    values: Mapping[str, Array] | None = None,
) -> PeftModel:
    """Wrap a model with a new, trainable adapter, and activate it.

    Args:
        model: A causal language model, or a PeftModel that gets one more adapter. It is changed in
            place: the modules that own the parameters are wrapped.
        metadata: Description of the parameters, for instance from ``modeling.describe`` or of a
            safety map; counts and digests are made here. Where it has a base digest already, the
            base must match.
        indices: Flat indices by in-memory parameter name; each ``(count,)``, ascending, unique.
        adapter_name: Name of the adapter.
        values: Values by parameter name, to be rounded to their storage dtype; each ``(count,)``.
            Zeros if None.

    Returns:
        The PeftModel.

    Raises:
        ModelError: A parameter has no record.
    """
    deltas = {}
    dtype = DTYPES[metadata.values_dtype]
    for name, each in indices.items():
        record = metadata.tensors.get(name)
        if record is None:
            raise ModelError(
                f"{name}: expected a record in metadata, found none; describe the parameter first"
            )
        each = np.asarray(each, index_dtype(record.numel))
        new = np.zeros(each.shape, dtype) if values is None else np.asarray(values[name], dtype)
        deltas[name] = SparseDelta(record.shape, each, new)
    peft_model = model if isinstance(model, PeftModel) else None
    base = model if peft_model is None else peft_model.get_base_model()
    complete = describe_deltas(base, replace(metadata, mode=Mode.SET), deltas)
    config = SafeWeightsConfig.from_metadata(complete)
    if peft_model is None:
        peft_model = PeftModelForCausalLM(model, config, adapter_name)
    else:
        peft_model.add_adapter(adapter_name, config)
    fill(base, adapter_name, deltas)
    peft_model.set_adapter(adapter_name)
    return peft_model


def describe_deltas(model: nn.Module, metadata: AdapterMetadata, deltas: Deltas) -> AdapterMetadata:
    """Describe deltas of a model that is at hand."""
    selected = {each.name: each for _, layer in named_layers(model) for each in layer.owned}
    records = {}
    for name, delta in deltas.items():
        record, indices = metadata.tensors[name], to_torch(delta.indices)
        parameter = find_parameter(model, name, record)
        indices = indices.to(parameter.device)
        if name in selected:
            entries = selected[name].originals(indices)
        else:
            entries = parameter.detach().flatten().index_select(0, indices)
        if record.base_digest:
            check_entries(name, entries, record)
        records[name] = _with_digests(record, delta, entries, metadata.scale)
    return replace(metadata, tensors=records)


def fill(model: nn.Module, adapter: str, deltas: Deltas) -> None:
    """Put indices and values into an adapter that has room for them."""
    with torch.no_grad():
        for each in selected_parameters(model, adapter):
            each.indices[adapter].copy_(to_torch(deltas[each.name].indices))
            each.values[adapter].copy_(to_torch(deltas[each.name].values))
            each.layer.mark_checked(adapter)


def round_values(model: PeftModel | PreTrainedModel, adapter_name: str = "default") -> None:
    """Round an adapter's live values to their storage dtype, so that what is evaluated is shipped.

    Args:
        model: The PeftModel, or a model into which the adapter was loaded.
        adapter_name: The adapter.
    """
    dtype = getattr(torch, model.peft_config[adapter_name].values_dtype)
    with torch.no_grad():
        for each in selected_parameters(model, adapter_name):
            each.layer.check([adapter_name])
            values = each.values[adapter_name]
            values.copy_(values.to(dtype))


def weighted_sum(
    model: nn.Module, configs: Mapping[str, SafeWeightsConfig], terms: Sequence[tuple[str, float]]
) -> tuple[AdapterMetadata, dict[str, SparseDelta]]:
    """Sum adapters over the union of their entries, in float32 and with their present scales."""
    parts: dict[str, SelectedParameter] = {}
    for adapter, _ in terms:
        parts |= {each.name: each for each in selected_parameters(model, adapter)}
    records, deltas = {}, {}
    for name, each in parts.items():
        held = [(adapter, weight) for adapter, weight in terms if adapter in each.values]
        each.layer.check(adapter for adapter, _ in held)
        records[name] = _common_record(name, [configs[adapter] for adapter, _ in held])
        deltas[name] = _sum_entries(each, held, records[name].shape)
    first = configs[terms[0][0]].to_metadata(f"adapter {terms[0][0]!r}")
    adapters, weights = zip(*terms, strict=True)
    selection = {"method": "weighted_sum", "adapters": list(adapters), "weights": list(weights)}
    metadata = replace(
        first, scale=1.0, values_dtype="float32", selection=selection, tensors=records
    )
    return metadata, deltas


def stored_tensors(
    model: nn.Module, config: SafeWeightsConfig, adapter: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Select an adapter's tensors as they are stored, and bring its config up to date."""
    stored: dict[str, Tensor] = {}
    records = dict(config.tensors)
    for path, layer in named_layers(model):
        layer.check([adapter])
        for each in layer.owned:
            if adapter not in each.values:
                continue
            key = f"{path}.safeweights_{{}}__{each.own}.{adapter}".format
            indices, values = state_dict[key("indices")], state_dict[key("values")]
            if is_coded(indices) or is_coded(values):  # as before the check
                indices, values = each.indices[adapter], each.values[adapter].detach()
            values = values.to(getattr(torch, config.values_dtype))
            if isinstance(values, DTensor):
                raise UnsupportedFeatureError(
                    f"{each.name}: expected whole values to save, found sharded ones; pass the "
                    "gathered state, as in save_pretrained(..., state_dict=full_state_dict)"
                )
            stored |= {key("indices"): indices, key("values"): values}
            record = record_from_json(records[each.name], each.name)
            delta = SparseDelta(record.shape, to_numpy(indices), to_numpy(values))
            entries = _base_entries(each, adapter, state_dict, f"{path}.base_layer.{each.own}")
            record = _with_digests(record, delta, entries, config.scale)
            records[each.name] = record_to_json(record)
    config.tensors, config.format_minor = records, FORMAT_MINOR
    return stored


def _base_entries(
    each: SelectedParameter, adapter: str, state_dict: Mapping[str, Tensor], key: str
) -> Tensor:
    indices = each.indices[adapter]
    if not isinstance(each.parameter, DTensor):
        return each.originals(indices)
    base = state_dict[key]  # gathered; a sharded parameter is never overwritten
    return base.flatten().index_select(0, indices.to(base.device))


def _with_digests(
    record: TensorRecord, delta: SparseDelta, entries: Tensor, scale: float
) -> TensorRecord:
    base = to_numpy(entries.to(getattr(torch, record.dtype)))
    plain = replace(record, encoding=Encoding.PLAIN)
    described, *_ = encode_entries(Mode.SET, plain, delta.indices, delta.values, None)
    return replace(
        described,
        base_digest=digest(base),
        merged_digest=digest(add_rounded(base, delta.values, scale)),
    )


def _common_record(name: str, configs: Sequence[SafeWeightsConfig]) -> TensorRecord:
    """Take what all adapters say of a parameter, without what depends on their entries."""
    records = [
        replace(
            record_from_json(config.tensors[name], name),
            count=0,
            encoding=Encoding.PLAIN,
            streams={},
            digest=None,
            content_digest=None,
            base_digest=None,
            merged_digest=None,
        )
        for config in configs
    ]
    if any(record != records[0] for record in records):
        raise BaseMismatchError(
            f"{name}: expected adapters that agree on shape, dtype and place on disk, found ones "
            "that do not; combine adapters of one base"
        )
    return records[0]


def _sum_entries(
    each: SelectedParameter, terms: Sequence[tuple[str, float]], shape: tuple[int, ...]
) -> SparseDelta:
    indices = [to_numpy(each.indices[adapter]) for adapter, _ in terms]
    union = np.unique(np.concatenate(indices))
    total = np.zeros(union.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # SparseDelta refuses what is not finite
        for own, (adapter, weight) in zip(indices, terms, strict=True):
            factor = np.float32(weight * each.layer.scaling[adapter])
            total[np.searchsorted(union, own)] += factor * to_numpy(each.values[adapter])
    return SparseDelta(shape, union, total)
