"""Take an adapter into a model: does it fit, is its content right, and what does that decode to?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safeweights_peft.delta import DTYPES, Array, check_finite
from safeweights_peft.errors import (
    BaseMismatchError,
    CorruptAdapterError,
    ModelError,
    UnsupportedFeatureError,
)
from safeweights_peft.modeling.layout import check_shape
from safeweights_peft.modeling.tensors import check_entries, to_numpy, to_torch
from safeweights_peft.patch.artifacts import check_layout, decode_entries, stored_arrays
from safeweights_peft.patch.groups import find_groups
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import TensorRecord, indices_key, values_key
from safeweights_peft.tuner.beside import CodedValues, is_coded, is_stored
from safeweights_peft.tuner.layer import SafeWeightsLayer, layers
from safeweights_peft.tuner.patched import Patched

_BASE_DTYPES = frozenset(getattr(torch, name) for name in DTYPES)
# What stands in these means something: a layer beside the parameter would be run, or counted.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_UNLOADED = {torch.uint8: 255, torch.int32: -1, torch.int64: -1}
"""What fills indices that were never loaded: no index, and no stream either."""


def check_fit(model: nn.Module, adapter: str, metadata: AdapterMetadata) -> None:
    """Check that a model has the parameters that an adapter selects from, fit for use."""
    if getattr(model, "is_quantized", False):
        raise UnsupportedFeatureError(
            "base: expected float weights, found a quantized model; load it unquantized"
        )
    if "." in adapter or hasattr(SafeWeightsLayer, adapter):
        raise ModelError(
            f"adapter {adapter!r}: expected another name, found one that PEFT's layers use for "
            "themselves; give adapter_name another"
        )
    # Of a base on disk PEFT would write the files anew, under other names; it has taken the hooks
    # away by now, which `load_adapter` leaves.
    is_on_disk = "disk" in set((getattr(model, "hf_device_map", None) or {}).values())
    is_offloaded = is_on_disk or any(hasattr(module, "_hf_hook") for module in model.modules())
    names: dict[int, str] = {}
    for name, record in metadata.tensors.items():
        parameter = find_parameter(model, name, record)
        if parameter.is_meta and is_offloaded:
            raise UnsupportedFeatureError(
                f"{name}: expected a parameter in memory, found one that is offloaded; "
                "load the model without offloading, or merge the adapter into the checkpoint"
            )
        first = names.setdefault(id(parameter), name)
        if first != name:
            raise BaseMismatchError(
                f"{name}: expected a parameter of its own, found the one of {first}; "
                "load the base with untied weights, as the adapter was made for"
            )
    for layer in layers(model):
        other = names.get(id(layer.parameter), layer.name)
        if other != layer.name:
            raise UnsupportedFeatureError(
                f"{other}: expected the name that other adapters use for this tied parameter, "
                f"{layer.name}, found another; load the base with untied weights"
            )


def find_parameter(model: nn.Module, name: str, record: TensorRecord) -> nn.Parameter:
    """Find a base parameter, and check that it can carry an adapter."""
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # get_submodule's, where there is none
        module = nn.Module()
    if isinstance(module, BaseTunerLayer):
        raise UnsupportedFeatureError(
            f"{name}: expected a module without adapters of other methods, found "
            f"{type(module).__name__}; merge or unload that adapter first"
        )
    parameter = module._parameters.get(own)
    hint = "load the base that the adapter was made for, with the transformers version it records"
    check_shape(name, parameter, record, hint)
    assert parameter is not None
    # Quantized and sharded tensors claim the dtype that they stand for.
    is_plain = type(parameter) in (nn.Parameter, Patched) and type(parameter.data) is Tensor
    if parameter.dtype not in _BASE_DTYPES or not is_plain:
        found = type(parameter if type(parameter.data) is Tensor else parameter.data).__name__
        raise UnsupportedFeatureError(
            f"{name}: expected a whole tensor of {', '.join(DTYPES)}, found {parameter.dtype} in a "
            f"{found}; load the base unquantized and unsharded"
        )
    if getattr(module, "max_norm", None) is not None:
        raise UnsupportedFeatureError(
            f"{name}: expected an embedding that leaves its weights alone, found max_norm"
        )
    if isinstance(module, _CONTAINERS):
        raise UnsupportedFeatureError(
            f"{name}: expected a parameter of a module whose children may have any name, found a "
            f"{type(module).__name__}; select no entries there"
        )
    return parameter


def make_room(layer: SafeWeightsLayer, metadata: AdapterMetadata) -> tuple[nn.Parameter, Tensor]:
    """Make values and indices of the recorded sizes, to be loaded."""
    layouts, device = stored_arrays(metadata, layer.name), layer.parameter.device
    (dtype, shape), (values_dtype, values_shape) = layouts.values()
    own = getattr(torch, dtype.name)
    indices = torch.full(shape, _UNLOADED[own], dtype=own, device=device)
    # transformers loads a tensor by name where it finds one of its shape: so coded values begin as
    # bytes of the recorded size, under the name that decoded ones keep.
    if values_dtype == np.uint8:
        return CodedValues(torch.zeros(values_shape, dtype=torch.uint8, device=device)), indices
    return nn.Parameter(torch.zeros(values_shape, device=device)), indices


def check_loaded(layer: SafeWeightsLayer, adapter: str) -> None:
    """Check and decode what was loaded into a layer by name and shape alone."""
    name, source = layer.name, f"adapter {adapter!r}"
    metadata = layer.metadata_of(adapter)
    assert metadata is not None
    indices, values = layer.indices[adapter], layer[adapter]
    if indices.numel() and bool((indices == _UNLOADED[indices.dtype]).all()):
        # transformers' load_adapter renames tensors as it would a checkpoint's, and some patterns,
        # as Laguna's, match the names that modules have in memory.
        raise CorruptAdapterError(
            f"{source}: {name}: expected loaded indices, found none; load a complete adapter, by "
            "PeftModel.from_pretrained where load_adapter misses some, or use create_adapter"
        )
    dtype = None if is_coded(values) else metadata.values_dtype
    stored = {indices_key(name): to_numpy(indices), values_key(name): to_numpy(values, dtype)}
    metadata = replace(metadata, tensors={name: metadata.tensors[name]})
    content = _decode([layer], metadata, stored, source)
    *decoded, entries = content[name]
    if is_stored(indices, values):
        _put(layer, adapter, *decoded)
    layer.accept(adapter, entries)


def take_in(model: nn.Module, adapter: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check an adapter's tensors and put them into a model; return them for PEFT to load."""
    owners = layers(model, adapter)
    # What selects from parameters without data is decoded and checked at its first use.
    ready = [layer for layer in owners if not layer.lacks_data()]
    is_in_use = all(layer.is_accepted(adapter) for layer in owners)
    loaded, entries = dict(stored), {}
    if not is_in_use or any(map(is_coded, stored.values())):
        arrays = {key: to_numpy(tensor) for key, tensor in stored.items()}
        metadata = owners[0].metadata_of(adapter)
        assert metadata is not None
        content = _decode(ready, metadata, arrays, f"adapter {adapter!r}")
        for name, (indices, values, entries[name]) in content.items():
            loaded |= {indices_key(name): indices, values_key(name): values}
    if is_in_use:
        _check_again(owners, adapter, loaded)
    for layer in ready:
        first, second = indices_key(layer.name), values_key(layer.name)
        if is_in_use:  # they are equal, but may be stored as rows or columns
            loaded[first] = layer.indices[adapter]
        _put(layer, adapter, loaded[first], loaded[second])
        layer.accept(adapter, entries.get(layer.name))
        # PEFT copies these into the model's own: the same tensors, so nothing is copied.
        loaded[first], loaded[second] = layer.indices[adapter], layer[adapter]
    return {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in loaded.items()
    }


def _decode(
    owners: Sequence[SafeWeightsLayer],
    metadata: AdapterMetadata,
    stored: Mapping[str, Array],
    source: str,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Check stored tensors, and that the base is theirs; return indices, values, base entries."""
    layout = {key: (array.dtype, array.shape) for key, array in stored.items()}
    check_layout(metadata, layout, source)
    content = {}
    for layer in owners:
        entries = decode_entries(metadata, layer.name, stored, source)
        indices = to_torch(entries.indices).to(layer.parameter.device)
        base = layer.selection.gather(indices)
        stored_base = check_entries(layer.name, base, entries.record)
        content[layer.name] = indices, to_torch(entries.values_at(stored_base)), base
    return content


def _put(layer: SafeWeightsLayer, adapter: str, indices: Tensor, values: Tensor) -> None:
    """Copy content into the room that was made for it, or new room where it was coded or meta."""
    old_indices, old_values = layer.indices[adapter], layer[adapter]
    device = layer.parameter.device
    # Whatever was made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        if is_coded(old_values) or old_values.is_meta:
            is_trained = getattr(old_values, "is_trained", old_values.requires_grad)
            new = values.to(device, torch.float32, copy=True)
            layer[adapter] = nn.Parameter(new, is_trained)
        else:
            old_values.copy_(values)
        if is_stored(old_indices, layer[adapter]) or old_indices.is_meta:
            layer.indices[adapter] = indices.to(device, copy=True)
        else:
            old_indices.copy_(indices)


def _check_again(
    owners: Sequence[SafeWeightsLayer], adapter: str, loaded: Mapping[str, Tensor]
) -> None:
    """Check tensors that are loaded into an adapter in use, as when training resumes."""
    names = {key(layer.name) for layer in owners for key in (indices_key, values_key)}
    for key in sorted(names ^ set(loaded)):
        raise CorruptAdapterError(
            f"adapter {adapter!r}: {key}: expected the same parameters as before, found others; "
            "load this adapter under another name"
        )
    for layer in owners:
        name, own = layer.name, to_numpy(layer.indices[adapter])
        count = own.shape
        indices, values = (to_numpy(loaded[key(name)]) for key in (indices_key, values_key))
        if indices.shape != own.shape and (found := find_groups(own, layer.parameter.shape)):
            _, own = found
        if values.shape != count or not np.array_equal(indices, own):
            raise CorruptAdapterError(
                f"adapter {adapter!r}: {name}: expected the same indices as before, found "
                "others; load this adapter under another name"
            )
        check_finite(f"adapter {adapter!r}: {values_key(name)}", values)
