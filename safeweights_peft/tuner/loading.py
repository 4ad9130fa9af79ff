"""From an adapter's stored tensors to what a live model holds: checked, and decoded with its base.

Codings and the checks on them stand in ``format``; where coded tensors wait, in ``containers``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from safeweights_peft.delta import Array, check_finite
from safeweights_peft.errors import CorruptAdapterError
from safeweights_peft.modeling.tensors import check_entries, to_numpy, to_torch
from safeweights_peft.patch.artifacts import check_layout, decode_entries
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import indices_key, values_key
from safeweights_peft.tuner.containers import CodedValues, is_coded, is_unloaded
from safeweights_peft.tuner.parameter import SelectedParameter


class Content(NamedTuple):
    """What an adapter has for one parameter, on the parameter's device.

    Attributes:
        indices: Flat indices; ``(count,)``.
        values: Values in float32; ``(count,)``.
    """

    indices: Tensor
    values: Tensor


def take_in(
    parts: Sequence[SelectedParameter], adapter: str, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check an adapter's tensors and its base; take over what is not for PEFT to load."""
    is_in_use = all(each.layer.is_checked(adapter) for each in parts)
    loaded = dict(stored)
    if not is_in_use or any(map(is_coded, stored.values())):
        absent = {each.layer for each in parts if each.parameter.is_meta}
        present = [each for each in parts if each.layer not in absent]
        arrays = {key: to_numpy(tensor) for key, tensor in stored.items()}
        content = decode(present, _description(parts, adapter), arrays, f"adapter {adapter!r}")
        for name, (indices, values) in content.items():
            loaded |= {indices_key(name): indices, values_key(name): values}
    if is_in_use:
        _check_again(parts, adapter, loaded)
    else:
        for layer in {each.layer for each in present}:
            layer.accept(adapter, content)
    return {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in loaded.items()
    }


def decode_loaded(
    parts: Sequence[SelectedParameter], adapter: str, metadata: AdapterMetadata
) -> dict[str, Content]:
    """Check and decode what was loaded by name and shape alone. Nothing is changed."""
    source = f"adapter {adapter!r}"
    stored: dict[str, Array] = {}
    for each in parts:
        indices, values = each.indices[adapter], each.values[adapter]
        if is_unloaded(indices):
            raise CorruptAdapterError(
                f"{source}: {each.name}: expected loaded indices, found none; "
                "load a complete adapter, or use create_adapter"
            )
        if not is_coded(values):
            values = values.to(getattr(torch, metadata.values_dtype))
        stored |= {
            indices_key(each.name): to_numpy(indices),
            values_key(each.name): to_numpy(values),
        }
    return decode(parts, metadata, stored, source)


def decode(
    parts: Sequence[SelectedParameter],
    metadata: AdapterMetadata,
    stored: Mapping[str, Array],
    source: str,
) -> dict[str, Content]:
    """Check stored tensors, and that the base is theirs; decode them. Nothing is changed."""
    check_layout(metadata, {key: (each.dtype, each.shape) for key, each in stored.items()}, source)
    content = {}
    # Whatever was made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        for each in parts:
            entries = decode_entries(metadata, each.name, stored, source)
            indices = to_torch(entries.indices).to(each.parameter.device)
            base = each.originals(indices)
            check_entries(each.name, base, entries.record)
            values = entries.values_at(to_numpy(base.to(getattr(torch, entries.record.dtype))))
            content[each.name] = Content(indices, to_torch(values).to(indices.device).float())
    return content


def put(part: SelectedParameter, adapter: str, content: Content) -> None:
    """Put decoded tensors in place of coded ones. Loaded values that are not coded stay."""
    coded = part.values[adapter]
    if isinstance(coded, CodedValues):
        part.values[adapter] = nn.Parameter(content.values, coded.is_trained)
    if is_coded(part.indices[adapter]):
        part.indices[adapter] = content.indices
    else:
        part.indices[adapter].copy_(content.indices)


def _description(parts: Sequence[SelectedParameter], adapter: str) -> AdapterMetadata:
    """Give what an adapter's config says, which was checked when room was made for it."""
    each = [part.layer.described(adapter) for part in parts]
    records = {name: record for metadata in each for name, record in metadata.tensors.items()}
    return replace(each[0], tensors=records)


def _check_again(
    parts: Sequence[SelectedParameter], adapter: str, tensors: Mapping[str, Tensor]
) -> None:
    """Check tensors that are loaded into an adapter that is in use, as when training resumes."""
    names = {key(each.name) for each in parts for key in (indices_key, values_key)}
    for key in sorted(names ^ set(tensors)):
        raise CorruptAdapterError(
            f"adapter {adapter!r}: {key}: expected the same parameters as before, found others; "
            "load this adapter under another name"
        )
    for each in parts:
        indices, values = tensors[indices_key(each.name)], tensors[values_key(each.name)]
        if values.shape != indices.shape or not np.array_equal(
            to_numpy(indices), to_numpy(each.indices[adapter])
        ):
            raise CorruptAdapterError(
                f"adapter {adapter!r}: {each.name}: expected the same indices as before, found "
                "others; load this adapter under another name"
            )
        check_finite(f"adapter {adapter!r}: {values_key(each.name)}", to_numpy(values))
