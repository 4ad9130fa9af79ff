"""A model under PEFT's adapters as SPA sees it: by the names of the plain model.

Here is which parameters stand for one of the plain model's, which adapters SPA works under, and
which LoRA layers must be corrected. How they are corrected is the matter of ``lora``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safeweights_peft.errors import UnsupportedFeatureError
from safeweights_peft.freeze import FrozenEntries
from safeweights_peft.training.lora import FrozenLayer, FrozenPattern

_ADDED = re.compile(r"\.(?:base_layer|original_module|token_adapter|modules_to_save\.[^.]+)(?=\.)")
"""What PEFT puts into the name of a parameter that it wraps or copies."""


def has_adapters(model: nn.Module) -> bool:
    """Tell whether PEFT has been at work on a model."""
    wrapped = isinstance(model, PeftModel | PeftMixedModel)
    return wrapped or any(isinstance(each, BaseTunerLayer) for each in model.modules())


def plain_name(name: str) -> str:
    """Tell a parameter's name in the plain model."""
    return _ADDED.sub("", name)


def is_copy(name: str) -> bool:
    """Tell whether a parameter is a copy that PEFT trains in place of the original."""
    return ".modules_to_save." in name


def parameters_by_name(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Find all that stands for each parameter of the plain model."""
    adapted = has_adapters(model)
    owned: dict[str, dict[str, nn.Parameter]] = {}
    names: dict[nn.Parameter, list[str]] = {}
    for full_name, parameter in _plain(model).named_parameters(remove_duplicate=False):
        full_name = full_name.replace("_orig_mod.", "")
        name = plain_name(full_name) if adapted else full_name
        label = full_name if adapted and is_copy(full_name) else name
        owned.setdefault(name, {})[label] = parameter
        names.setdefault(parameter, []).append(name)
    return {name: _with_tied(name, owned, names) for name in owned}


def check_adapters(model: nn.Module) -> None:
    """Check that a model's adapters are LoRA, and not merged."""
    configs = getattr(model, "peft_config", {}).values()
    kinds = {str(each.peft_type.value) for each in configs} - {"LORA"}
    if isinstance(model, PeftMixedModel):
        kinds.add(PeftMixedModel.__name__)
    if kinds:
        raise UnsupportedFeatureError(
            f"model: expected LoRA or no adapter, found {', '.join(sorted(kinds))}, which can't be "
            "kept from moving effective weights; train the base itself, or merge the adapter first"
        )
    for name, layer in _tuner_layers(model):
        if layer.merged:
            raise UnsupportedFeatureError(
                f"{name}: expected adapters that are not merged, found "
                f"{', '.join(layer.merged_adapters)} merged; unmerge first"
            )


def lora_layers(model: nn.Module, entries: Sequence[FrozenEntries]) -> list[FrozenLayer]:
    """Find the LoRA layers that would move frozen entries."""
    frozen: dict[nn.Parameter, list[Tensor]] = {}
    for each in entries:
        frozen.setdefault(each.parameter, []).append(each.indices)
    patterns: dict[nn.Parameter, FrozenPattern] = {}
    found = []
    for name, layer in _tuner_layers(model):
        base = layer.get_base_layer()
        if frozen.keys().isdisjoint(base.parameters()):
            continue
        _check_layer(name, layer, base, getattr(base, "bias", None) in frozen)
        weight = base.weight
        if weight in frozen:
            if weight not in patterns:
                indices = torch.cat(frozen[weight]).unique()
                patterns[weight] = FrozenPattern.lay_out(indices, tuple(weight.shape))
            found.append(FrozenLayer(name, layer, patterns[weight]))
    return found


def _plain(model: nn.Module) -> nn.Module:
    """Look under PEFT's wrapper, which lengthens every name."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model


def _with_tied(
    name: str, owned: dict[str, dict[str, nn.Parameter]], names: dict[nn.Parameter, list[str]]
) -> dict[str, nn.Parameter]:
    """Add to a name's parameters those of every name that one of them is tied to."""
    tied = {name: None} | {other: None for each in owned[name].values() for other in names[each]}
    labels: dict[nn.Parameter, str] = {}
    for other in tied:
        for label, parameter in owned[other].items():
            labels.setdefault(parameter, label)
    return {label: parameter for parameter, label in labels.items()}


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in _plain(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _check_layer(name: str, layer: BaseTunerLayer, base: nn.Module, bias: bool) -> None:
    obstacle = _obstacle(layer, base, bias)
    if obstacle is not None:
        raise UnsupportedFeatureError(
            f"{name}: expected plain LoRA on a linear layer where entries are frozen, found "
            f"{obstacle}; leave this layer to the base, or take it out of the map"
        )


def _obstacle(layer: BaseTunerLayer, base: nn.Module, bias: bool) -> str | None:
    """Say why a layer can't be corrected, if it can't."""
    if type(layer) is not LoraLinear:
        return f"{type(layer).__name__} on {type(base).__name__}"
    if not isinstance(base, nn.Linear):
        return f"LoRA on {type(base).__name__}"
    for adapter, variant in layer.lora_variant.items():
        return f"{type(variant).__name__.removesuffix('LinearVariant')} in adapter {adapter}"
    if bias and any(layer.lora_bias.values()):
        return "lora_bias, with frozen entries in the bias"
    return None
