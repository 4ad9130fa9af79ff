"""Take an adapter into a model: does it fit, is its content right, and what does that decode to?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safeweights_peft.delta import DTYPES, Array, check_finite
from safeweights_peft.errors import (
    BaseMismatchError,
    CorruptAdapterError,
    UnsupportedFeatureError,
)
from safeweights_peft.modeling.layout import check_shape
from safeweights_peft.modeling.tensors import check_entries, to_numpy, to_torch
from safeweights_peft.patch.artifacts import Layout, check_layout, decode_entries, stored_arrays
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import TensorRecord, indices_key, values_key
from safeweights_peft.tuner.layer import (
    CodedValues,
    SafeWeightsLayer,
    is_coded,
    layers,
    selected_parameters,
)
from safeweights_peft.tuner.parameter import SelectedParameter

_BASE_DTYPES = frozenset(getattr(torch, name) for name in DTYPES)
_UNLOADED = {torch.uint8: 255, torch.int32: -1, torch.int64: -1}
"""What fills indices that were never loaded: no index, and no stream either."""


def check_fit(model: nn.Module, metadata: AdapterMetadata, paths: Iterable[str]) -> None:
    """Check that a model has the parameters that an adapter selects from, fit for use."""
    if getattr(model, "is_quantized", False):
        raise UnsupportedFeatureError(
            "base: expected float weights, found a quantized model; load it unquantized"
        )
    _check_nesting({layer.path for layer in layers(model)}.union(paths))
    names: dict[int, str] = {}
    for name, record in metadata.tensors.items():
        first = names.setdefault(id(find_parameter(model, name, record)), name)
        if first != name:
            raise BaseMismatchError(
                f"{name}: expected a parameter of its own, found the one of {first}; "
                "load the base with untied weights, as the adapter was made for"
            )


def find_parameter(model: nn.Module, name: str, record: TensorRecord) -> nn.Parameter:
    """Find a base parameter, and check that it can carry an adapter."""
    path, _, own = name.rpartition(".")
    try:
        module = _unwrap(model.get_submodule(path), own, name)
    except AttributeError:  # get_submodule's, where there is none
        module = nn.Module()
    parameter = module._parameters.get(own)
    hint = "load the base that the adapter was made for, with the transformers version it records"
    check_shape(name, parameter, record, hint)
    assert parameter is not None
    if parameter.dtype not in _BASE_DTYPES or isinstance(parameter, DTensor):
        raise UnsupportedFeatureError(
            f"{name}: expected a whole tensor of {', '.join(DTYPES)}, found {parameter.dtype} in a "
            f"{type(parameter).__name__}; load the base unquantized and unsharded"
        )
    if getattr(module, "max_norm", None) is not None:
        raise UnsupportedFeatureError(
            f"{name}: expected an embedding that leaves its weights alone, found max_norm"
        )
    return parameter


def _unwrap(module: nn.Module, own: str, name: str) -> nn.Module:
    """Look under a wrapper of this method; refuse those of others."""
    if not isinstance(module, SafeWeightsLayer):
        if isinstance(module, BaseTunerLayer):
            raise UnsupportedFeatureError(
                f"{name}: expected a module without adapters of other methods, found "
                f"{type(module).__name__}; merge or unload that adapter first"
            )
        return module
    if own in module.tied:
        raise UnsupportedFeatureError(
            f"{name}: expected the name that other adapters use for this tied parameter, "
            f"{module.tied[own][1].name}, found another; load the base with untied weights"
        )
    return module.base_layer


def _check_nesting(paths: set[str]) -> None:
    """Refuse a wrapped module inside another: the names of its parameters would change."""
    for path in paths:
        parts = path.split(".")
        outer = {".".join(parts[:depth]) for depth in range(1, len(parts))} & paths
        if outer:
            raise UnsupportedFeatureError(
                f"{path}: expected no selected parameters in {min(outer)}, which contains it, "
                "found some; select parameters of only one of the two"
            )


def make_rooms(
    layer: SafeWeightsLayer, metadata: AdapterMetadata, own_names: Iterable[str]
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Make values and indices of the recorded sizes for a module's parameters, to be loaded."""
    rooms = {}
    for own in own_names:
        name, device = f"{layer.path}.{own}", getattr(layer.base_layer, own).device
        layouts = stored_arrays(metadata, name)
        values = _make_values(layouts[values_key(name)], device)
        rooms[own] = values, _make_indices(layouts[indices_key(name)], device)
    return rooms


def _make_values(layout: Layout, device: torch.device) -> nn.Parameter:
    # transformers loads a tensor by name where it finds one of its shape: so coded values begin as
    # bytes of the recorded size, under the name that decoded ones keep.
    dtype, shape = layout
    if dtype == np.uint8:
        return CodedValues(torch.zeros(shape, dtype=torch.uint8, device=device))
    return nn.Parameter(torch.zeros(shape, device=device))


def _make_indices(layout: Layout, device: torch.device) -> Tensor:
    dtype = to_torch(np.empty(0, layout[0])).dtype
    return torch.full(layout[1], _UNLOADED[dtype], dtype=dtype, device=device)


def check_loaded(layer: SafeWeightsLayer, adapter: str) -> None:
    """Check and decode what was loaded into a module by name and shape alone."""
    parameters, source = layer.parameters_of(adapter), f"adapter {adapter!r}"
    metadata = layer.metadata[adapter]
    records = {selected.name: metadata.tensors[selected.name] for selected in parameters}
    metadata = replace(metadata, tensors=records)
    stored: dict[str, Array] = {}
    for selected in parameters:
        name, indices, values = selected.name, selected.indices[adapter], selected.values[adapter]
        if indices.numel() and bool((indices == _UNLOADED[indices.dtype]).all()):
            raise CorruptAdapterError(
                f"{source}: {name}: expected loaded indices, found none; "
                "load a complete adapter, or use create_adapter"
            )
        dtype = None if is_coded(values) else metadata.values_dtype
        stored |= {indices_key(name): to_numpy(indices), values_key(name): to_numpy(values, dtype)}
    content = _decode(parameters, metadata, stored, source)
    layer.accept(adapter)
    for selected in parameters:
        if is_coded(selected.indices[adapter]) or is_coded(selected.values[adapter]):
            _put(selected, adapter, *content[selected.name])


def take_in(model: nn.Module, adapter: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check an adapter's tensors and put them into a model; return them for PEFT to load."""
    owners = [layer for layer in layers(model) if adapter in layer.metadata]
    # What selects from parameters without data is decoded and checked at its first use.
    ready = [layer for layer in owners if not layer.lacks_data(adapter)]
    is_in_use = all(layer.is_accepted(adapter) for layer in owners)
    loaded = dict(stored)
    if not is_in_use or any(map(is_coded, stored.values())):
        arrays = {key: to_numpy(tensor) for key, tensor in stored.items()}
        parameters = [selected for layer in ready for selected in layer.parameters_of(adapter)]
        content = _decode(parameters, owners[0].metadata[adapter], arrays, f"adapter {adapter!r}")
        for name, (indices, values) in content.items():
            loaded |= {indices_key(name): indices, values_key(name): values}
    if is_in_use:
        _check_again(selected_parameters(model, adapter), adapter, loaded)
    for layer in ready:
        layer.accept(adapter)
        for selected in layer.parameters_of(adapter):
            first, second = indices_key(selected.name), values_key(selected.name)
            _put(selected, adapter, loaded[first], loaded[second])
            # PEFT copies these into the model's own: the same tensors, so nothing is copied.
            loaded[first], loaded[second] = selected.indices[adapter], selected.values[adapter]
    return {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in loaded.items()
    }


def _decode(
    parameters: Sequence[SelectedParameter],
    metadata: AdapterMetadata,
    stored: Mapping[str, Array],
    source: str,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Check stored tensors, and that the base is theirs; decode indices and values."""
    layout = {key: (array.dtype, array.shape) for key, array in stored.items()}
    check_layout(metadata, layout, source)
    content = {}
    for selected in parameters:
        entries = decode_entries(metadata, selected.name, stored, source)
        indices = to_torch(entries.indices).to(selected.parameter.device)
        base = check_entries(selected.name, selected.originals(indices), entries.record)
        content[selected.name] = indices, to_torch(entries.values_at(base))
    return content


def _put(selected: SelectedParameter, adapter: str, indices: Tensor, values: Tensor) -> None:
    """Copy content into the room that was made for it, or new room where it was coded or meta."""
    old_indices, old_values = selected.indices[adapter], selected.values[adapter]
    device = selected.parameter.device
    # Whatever was made in inference mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        if is_coded(old_values) or old_values.is_meta:
            is_trained = getattr(old_values, "is_trained", old_values.requires_grad)
            new = values.to(device, torch.float32, copy=True)
            selected.values[adapter] = nn.Parameter(new, is_trained)
        else:
            old_values.copy_(values)
        if is_coded(old_indices) or old_indices.is_meta:
            selected.indices[adapter] = indices.to(device, copy=True)
        else:
            old_indices.copy_(indices)


def _check_again(
    parameters: Sequence[SelectedParameter], adapter: str, loaded: Mapping[str, Tensor]
) -> None:
    """Check tensors that are loaded into an adapter in use, as when training resumes."""
    names = {key(selected.name) for selected in parameters for key in (indices_key, values_key)}
    for key in sorted(names ^ set(loaded)):
        raise CorruptAdapterError(
            f"adapter {adapter!r}: {key}: expected the same parameters as before, found others; "
            "load this adapter under another name"
        )
    for selected in parameters:
        name, own = selected.name, to_numpy(selected.indices[adapter])
        indices, values = (to_numpy(loaded[key(name)]) for key in (indices_key, values_key))
        if values.shape != indices.shape or not np.array_equal(indices, own):
            raise CorruptAdapterError(
                f"adapter {adapter!r}: {name}: expected the same indices as before, found "
                "others; load this adapter under another name"
            )
        check_finite(f"adapter {adapter!r}: {values_key(name)}", values)
