"""Whether an adapter fits a model, decided before anything is wrapped; and tied parameters.

Here live the checks on names, shapes and kinds of parameters. The checks on an adapter's content,
and on the base's entries, stand in ``content``.
"""

from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import BaseMismatchError, UnsupportedFeatureError
from safeweights_peft.modeling.layout import check_shape
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import TensorRecord
from safeweights_peft.tuner.layer import SafeWeightsLayer, layers

_BASE_DTYPES = frozenset(getattr(torch, name) for name in DTYPES)


def check_fit(model: nn.Module, metadata: AdapterMetadata, paths: Iterable[str]) -> None:
    """Check that a model has the parameters that an adapter selects from, fit for use."""
    if getattr(model, "is_quantized", False):
        raise UnsupportedFeatureError(
            "base: expected float weights, found a quantized model; load it unquantized"
        )
    _check_nesting(model, paths)
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
    module = _unwrap(_module(model, path), own, name)
    parameter: nn.Parameter | None = getattr(module, "_parameters", {}).get(own)
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


def share_tied(model: nn.Module) -> None:
    """Wrap the modules whose parameter is tied to a selected one, such as lm_head."""
    wrappers = {id(layer.base_layer): layer for layer in layers(model)}
    owners = {id(each.parameter): each for layer in wrappers.values() for each in layer.owned}
    for path, module in list(model.named_modules()):
        for own, parameter in module._parameters.items():
            owner = owners.get(id(parameter))
            if owner is None or owner.layer.base_layer is module:
                continue
            layer = wrappers.get(id(module))
            if layer is None:
                layer = wrappers[id(module)] = SafeWeightsLayer(module, path)
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, layer)
            layer.share(own, owner)


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _unwrap(module: nn.Module | None, own: str, name: str) -> nn.Module | None:
    """Look under a wrapper of this method; refuse those of others."""
    if not isinstance(module, SafeWeightsLayer):
        if isinstance(module, BaseTunerLayer):
            raise UnsupportedFeatureError(
                f"{name}: expected a module without adapters of other methods, found "
                f"{type(module).__name__}; merge or unload that adapter first"
            )
        return module
    tied = module.selected.get(own)
    if tied is not None and tied.layer is not module:
        raise UnsupportedFeatureError(
            f"{name}: expected the name that other adapters use for this tied parameter, "
            f"{tied.name}, found another; load the base with untied weights"
        )
    return module.base_layer


def _check_nesting(model: nn.Module, paths: Iterable[str]) -> None:
    """Refuse a wrapped module inside another: the names of its parameters would change."""
    wrapped = {layer.path for layer in layers(model)}.union(paths)
    for path in wrapped:
        parts = path.split(".")
        for depth in range(1, len(parts)):
            outer = ".".join(parts[:depth])
            if outer in wrapped:
                raise UnsupportedFeatureError(
                    f"{path}: expected no selected parameters in {outer}, which contains it, found "
                    "some; select parameters of only one of the two"
                )
