"""Tiny models with LoRA, and their slow twins, which make W + s·(M⊙BA) in full."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from safeweights_peft import SafetyMap
from tests.training.maps import BATCHES, load

LINEAR = r".*\.(?:q|k|v|o|up|down|gate)_proj"
Masks = dict[str, Tensor]


def config(**options: Any) -> LoraConfig:
    """Adapters that move every linear layer from the start."""
    defaults = {"r": 4, "target_modules": LINEAR, "init_lora_weights": False}
    return LoraConfig(**defaults | options)


def adapted(base: Path, dtype: torch.dtype | str = "auto", **options: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(load(base, dtype=dtype), config(**options))


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Find the LoRA layers, by the plain model's names of their weights."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return {
        f"{name.removeprefix(prefix)}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }


def masks(model: nn.Module, safety_map: SafetyMap) -> Masks:
    """Make dense masks of the map's entries in LoRA layers, and empty ones of other layers."""
    dense = {}
    for name, layer in layers(model).items():
        dense[name] = torch.zeros_like(layer.base_layer.weight, dtype=torch.bool)
        indices = safety_map.indices.get(name, np.empty(0, np.int32))
        dense[name].view(-1)[torch.from_numpy(indices)] = True
    return dense


def masked_delta(layer: LoraLinear, adapter: str, mask: Tensor) -> Tensor:
    delta = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    return torch.where(mask, 0, delta) * layer.scaling[adapter]


def twin(model: nn.Module, safety_map: SafetyMap) -> nn.Module:
    """Let LoRA layers do the same with dense masks, in the slow, obvious way."""
    dense = masks(model, safety_map)
    for name, layer in layers(model).items():

        def forward(x: Tensor, layer: LoraLinear = layer, mask: Tensor = dense[name]) -> Tensor:
            output = layer.base_layer(x)
            for adapter in [name for name in layer.active_adapters if name in layer.lora_A]:
                source = layer.lora_dropout[adapter](x.to(layer.lora_A[adapter].weight.dtype))
                output = output + F.linear(source, masked_delta(layer, adapter, mask))
                if layer.lora_bias[adapter]:
                    output = output + layer.lora_B[adapter].bias * layer.scaling[adapter]
            return output.to(x.dtype)

        layer.forward = forward
    return model


def effective(model: PeftModel, base: Path, safety_map: SafetyMap) -> nn.Module:
    """Make the plain model of weights W + s·(M⊙BA)."""
    plain, dense = load(base), masks(model, safety_map)
    with torch.no_grad():
        for name, layer in layers(model).items():
            weight = plain.get_parameter(name)
            weight += masked_delta(layer, "default", dense[name]).to(weight.dtype)
    return plain


def logits(model: nn.Module) -> Tensor:
    mode = model.training
    with torch.no_grad():
        result = model.eval()(input_ids=BATCHES[-1]).logits
    model.train(mode)
    return result
