"""A model under PEFT's adapters, seen as SPA sees it: by the names of the plain model.

Here is which parameters stand for one of the plain model's, which adapters SPA can work under, and
which LoRA layers have to be corrected. How they are is the matter of ``correction``.
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
from safeweights_peft.training.correction import LoraCorrection
from safeweights_peft.training.freeze import FrozenEntries

_ADDED = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What PEFT puts into the name of a parameter that it wraps or copies."""


def has_adapters(model: nn.Module) -> bool:
    """Tells whether PEFT has been at work on a model.

    Args:
        model: any model.

    Returns:
        True if it has adapters, whatever their kind, merged ones included.
    """
    wrapped = isinstance(model, PeftModel | PeftMixedModel)
    return wrapped or any(isinstance(each, BaseTunerLayer) for each in model.modules())


def parameters_by_name(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Finds all that stands for each parameter of the plain model.

    Args:
        model: compiled in part or not, with adapters or without.

    Returns:
        For each name in the plain model, a tied parameter's every name, the parameter and the
        copies of it that PEFT trains as `modules_to_save`.
    """
    adapted = has_adapters(model)
    named: dict[str, list[nn.Parameter]] = {}
    names: dict[nn.Parameter, list[str]] = {}
    for full_name, parameter in plain_model(model).named_parameters(remove_duplicate=False):
        name = full_name.replace("_orig_mod.", "")
        name = _ADDED.sub("", name) if adapted else name
        named.setdefault(name, []).append(parameter)
        names.setdefault(parameter, []).append(name)
    found = {}
    for name, own in named.items():
        tied = (each for parameter in own for other in names[parameter] for each in named[other])
        found[name] = list(dict.fromkeys(tied))
    return found


def plain_model(model: nn.Module) -> nn.Module:
    """Looks under PEFT's wrapper, which lengthens every name.

    Args:
        model: with adapters or without.

    Returns:
        The model whose parameters have the plain model's names, but for what adapters add.
    """
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.base_model.model if isinstance(model, PeftMixedModel) else model


def check_adapters(model: nn.Module) -> None:
    """Checks that a model's adapters are LoRA, and not merged.

    Args:
        model: a model with adapters.

    Raises:
        UnsupportedFeatureError: there are others, or merged ones.
    """
    configs = getattr(model, "peft_config", {}).values()
    kinds = {str(each.peft_type.value) for each in configs} - {"LORA"}
    layers = dict(_tuner_layers(model))
    if kinds:
        first = next(iter(layers), "model")
        raise UnsupportedFeatureError(
            f"{first}: expected LoRA or no adapter, found {', '.join(sorted(kinds))}, under which "
            "effective weights move unseen; train the base itself, or merge the adapter first"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise UnsupportedFeatureError(
                f"{name}: expected adapters that are not merged, found {layer.merged_adapters} "
                "merged; call unmerge_adapter first"
            )


def correct_lora(model: nn.Module, entries: Sequence[FrozenEntries]) -> list[LoraCorrection]:
    """Makes a correction for each LoRA layer that would move frozen entries; attaches none.

    Args:
        model: a model with adapters that `check_adapters` has let pass.
        entries: frozen entries of the base.

    Returns:
        The corrections.

    Raises:
        UnsupportedFeatureError: a layer can't be corrected.
    """
    frozen: dict[int, list[Tensor]] = {}
    for each in entries:
        frozen.setdefault(id(each.parameter), []).append(each.indices)
    corrections = []
    for name, layer in _tuner_layers(model):
        base = layer.get_base_layer()
        if not any(id(each) in frozen for each in base.parameters()):
            continue
        obstacle = _obstacle(layer, base)
        if obstacle is not None:
            raise UnsupportedFeatureError(
                f"{name}: expected plain LoRA on a linear layer where entries are frozen, found "
                f"{obstacle}; leave this layer out of target_modules"
            )
        if id(base.weight) in frozen:
            indices = torch.cat(frozen[id(base.weight)]).unique()
            corrections.append(LoraCorrection(name, layer, indices))
    return corrections


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in plain_model(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _obstacle(layer: BaseTunerLayer, base: nn.Module) -> str | None:
    """Says why a layer can't be corrected, if it can't."""
    if type(layer) is not LoraLinear:
        return f"the class {type(layer).__module__}.{type(layer).__name__}"
    if not isinstance(base, nn.Linear):
        return f"LoRA on {type(base).__name__}"
    for adapter, variant in layer.lora_variant.items():
        return f"the variant {type(variant).__name__} in adapter {adapter}"
    if any(layer.lora_bias.values()):
        return "a bias of LoRA's own (lora_bias)"
    if LoraCorrection.corrects(layer):
        return "LoRA that another map or patch corrects already"
    return None
