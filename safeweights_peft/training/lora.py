"""SPA under PEFT: a model's parameters by plain names, and LoRA that leaves frozen entries alone.

LoRA turns a weight W into W + s·BA. At the frozen entries each adapter's part is taken out again:
B(Ax) becomes B(Ax) − Cx, with C equal to BA there and zero elsewhere, so the effective weight stays
W. That is exact at any scale, with any number of adapters, and with dropout, since x is its output.
Where LoRA is on a parameter (fused experts), PEFT computes W + s·BA in full: W's entries are put
back into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from safeweights_peft.errors import UnsupportedFeatureError
from safeweights_peft.freeze import FrozenEntries, write_entries
from safeweights_peft.modeling.answers import find_plain
from safeweights_peft.tuner.sampled import (
    columns_of_tokens,
    csr_pattern,
    sampled_product,
    transposed,
)

# What PEFT puts into the name of a parameter that it wraps or copies.
_ADDED = re.compile(r"\.(?:base_layer|original_module|token_adapter|modules_to_save\.[^.]+)(?=\.)")
_NOTE = "_safeweights_input"


def has_adapters(model: nn.Module) -> bool:
    """Return whether PEFT has changed a model."""
    is_wrapped = isinstance(model, PeftModel | PeftMixedModel)
    return is_wrapped or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def plain_name(name: str) -> str:
    """Return a parameter's name in the plain model."""
    return _ADDED.sub("", name)


def is_copy(name: str) -> bool:
    """Return whether a parameter is a copy that PEFT trains in place of the original."""
    return ".modules_to_save." in name


def find_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Find by plain name all parameters that stand for it, each under a name of its own."""
    is_adapted = has_adapters(model)
    by_name: dict[str, dict[str, nn.Parameter]] = {}
    names: dict[nn.Parameter, list[str]] = {}
    for full_name, parameter in find_plain(model).named_parameters(remove_duplicate=False):
        full_name = full_name.replace("_orig_mod.", "")  # of a compiled module
        name = plain_name(full_name) if is_adapted else full_name
        label = full_name if is_adapted and is_copy(full_name) else name
        by_name.setdefault(name, {})[label] = parameter
        names.setdefault(parameter, []).append(name)
    return {name: _add_tied(name, by_name, names) for name in by_name}


def _add_tied(
    name: str, by_name: dict[str, dict[str, nn.Parameter]], names: dict[nn.Parameter, list[str]]
) -> dict[str, nn.Parameter]:
    """Add to a name's parameters those of every name that one of them is tied to."""
    own = by_name[name].values()
    # Dicts, not sets: the order decides under which name a tied parameter is reported.
    tied = {name: None} | {other: None for parameter in own for other in names[parameter]}
    labels: dict[nn.Parameter, str] = {}
    for other in tied:
        for label, parameter in by_name[other].items():
            labels.setdefault(parameter, label)
    return {label: parameter for parameter, label in labels.items()}


def check_adapters(model: nn.Module) -> None:
    """Check that a model's adapters are LoRA, and not merged."""
    configs = getattr(model, "peft_config", {}).values()
    kinds = {str(config.peft_type.value) for config in configs} - {"LORA"}
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


@dataclass(frozen=True, eq=False)
class FrozenPattern:
    """Frozen entries of a weight: 8 bytes each, and 4 per row and column."""

    by_row: Tensor  # the weight's pattern; see `csr_pattern`
    by_column: Tensor  # the pattern of its transpose

    @classmethod
    def build(cls, indices: Tensor, shape: tuple[int, int]) -> FrozenPattern:
        """Build both patterns from flat, sorted indices."""
        rows, columns = shape
        turned = indices.long() % columns * rows + indices.long() // columns
        by_column = csr_pattern(turned.sort().values.to(indices.dtype), (columns, rows))
        return cls(csr_pattern(indices, shape), by_column)

    def to(self, device: torch.device) -> FrozenPattern:
        """Copy the pattern to another device."""
        return FrozenPattern(self.by_row.to(device), self.by_column.to(device))


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """A LoRA layer that would move frozen entries of its weight."""

    name: str
    layer: LoraLinear
    pattern: FrozenPattern  # of the product BA; shared by layers that share a weight
    is_turned: bool = False  # whether the weight is stored as (inputs, outputs)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight of the base."""
        return self.layer.get_base_layer().weight

    def part_of(self, adapter: str) -> Tensor:
        """Compute what an adapter adds to the frozen entries, (n,) float32."""
        first, second = self.layer.lora_A[adapter], self.layer.lora_B[adapter]
        a, b = first.weight.detach().float(), second.weight.detach().float()
        if self.is_turned:
            product = sampled_product(self.pattern.by_column.to(a.device), a.T, b)
        else:
            product = sampled_product(self.pattern.by_row.to(a.device), b, a.T)
        return product.values() * self.layer.scaling[adapter]

    def make_correction(self) -> LoraCorrection:
        """Make the hooks that keep the layer's effective weight at its frozen entries."""
        return LoraCorrection(self)


@dataclass(frozen=True, eq=False)
class FrozenParameter:
    """A LoRA on a parameter itself that would move frozen entries."""

    name: str
    layer: ParamWrapper
    indices: Tensor  # flat and sorted

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, which may be any of its module's."""
        return self.layer.get_param()

    def part_of(self, adapter: str) -> Tensor:
        """Compute what an adapter adds to the frozen entries, (n,) float32."""
        with torch.no_grad():
            delta = self.layer.get_delta_weight(adapter)
        return delta.take(self.indices.to(delta.device).long()).float()

    def make_correction(self) -> ParameterCorrection:
        """Make the hooks that keep the effective parameter at its frozen entries."""
        return ParameterCorrection(self)


def find_frozen_layers(
    model: nn.Module, entries: Sequence[FrozenEntries]
) -> list[FrozenLayer | FrozenParameter]:
    """Find the LoRA layers that would move frozen entries."""
    indices: dict[nn.Parameter, list[Tensor]] = {}
    for frozen in entries:
        indices.setdefault(frozen.parameter, []).append(frozen.indices)
    patterns: dict[nn.Parameter, FrozenPattern] = {}
    layers: list[FrozenLayer | FrozenParameter] = []
    for name, layer in _tuner_layers(model):
        if type(layer) is ParamWrapper:  # it changes its own parameter alone
            if (parameter := layer.get_param()) in indices:
                flat = torch.cat(indices[parameter]).unique()
                layers.append(FrozenParameter(name, layer, flat))
            continue
        base = layer.get_base_layer()
        if indices.keys().isdisjoint(base.parameters()):
            continue
        _check_layer(name, layer, base, getattr(base, "bias", None) in indices)
        weight = base.weight
        if weight in indices:
            if weight not in patterns:
                flat = torch.cat(indices[weight]).unique()
                patterns[weight] = FrozenPattern.build(flat, tuple(weight.shape))
            pattern, is_turned = patterns[weight], isinstance(base, Conv1D)
            if is_turned:
                pattern = FrozenPattern(pattern.by_column, pattern.by_row)
            layers.append(FrozenLayer(name, layer, pattern, is_turned))
    return layers


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in find_plain(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _check_layer(name: str, layer: BaseTunerLayer, base: nn.Module, bias: bool) -> None:
    obstacle = _find_obstacle(layer, base, bias)
    if obstacle is not None:
        raise UnsupportedFeatureError(
            f"{name}: expected plain LoRA on a linear layer where entries are frozen, found "
            f"{obstacle}; leave this layer to the base, or take it out of the map"
        )


def _find_obstacle(layer: BaseTunerLayer, base: nn.Module, bias: bool) -> str | None:
    # Only what is known to add s·B(A(dropout(x))) and nothing else can be corrected.
    if type(layer) is not LoraLinear:
        return f"{type(layer).__name__} on {type(base).__name__}"
    if not isinstance(base, nn.Linear | Conv1D):
        return f"LoRA on {type(base).__name__}"
    for adapter, variant in layer.lora_variant.items():
        return f"{type(variant).__name__.removesuffix('LinearVariant')} in adapter {adapter}"
    if bias and any(layer.lora_bias.values()):
        return "lora_bias, with frozen entries in the bias"
    return None


class Correction:
    """The hooks that keep one layer's effective weight at its frozen entries."""

    def __init__(self, name: str, modules: Iterable[nn.Module]) -> None:
        # Under two corrections a part would be taken out twice.
        for module in modules:
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                if isinstance(getattr(hook, "__self__", None), Correction):
                    raise UnsupportedFeatureError(
                        f"{name}: expected a LoRA layer that no other map or patch protects, found "
                        "one; end that protection first, a callback's with detach()"
                    )
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Correct every adapter of the layer from now on."""
        raise NotImplementedError

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()


class LoraCorrection(Correction):
    """The hooks on a linear layer's adapters."""

    def __init__(self, frozen: FrozenLayer) -> None:
        super().__init__(frozen.name, frozen.layer.lora_B.values())
        self._layer = frozen.layer
        self._patterns = {frozen.pattern.by_row.device: frozen.pattern}

    def attach(self) -> None:
        """Correct every adapter from now on."""
        for adapter, first in self._layer.lora_A.items():
            second = self._layer.lora_B[adapter]
            self._handles.append(first.register_forward_hook(_note_input))
            self._handles.append(second.register_forward_hook(self._correct))

    @torch.compiler.disable  # compiled code knows no sparse tensors
    def _correct(self, second: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        input, first = vars(args[0]).pop(_NOTE)
        pattern = self._patterns.get(output.device)
        if pattern is None:  # the model was moved, or this is one of `DataParallel`'s copies
            pattern = next(iter(self._patterns.values())).to(output.device)
            self._patterns[output.device] = pattern
        return _Corrected.apply(output, input, first.weight, second.weight, pattern)


class ParameterCorrection(Correction):
    """The hooks on a parameter's parametrization, which PEFT makes for each forward pass anew."""

    def __init__(self, frozen: FrozenParameter) -> None:
        # What the wrapper calls: wrappers of one module's parameters are nested.
        self._inner = frozen.layer.base_layer
        super().__init__(frozen.name, [self._inner])
        self._own = frozen.layer.parameter_name
        self._indices = {frozen.indices.device: frozen.indices}

    def attach(self) -> None:
        """Correct whatever adapters are active from now on."""
        # Before all hooks that read the parameter: what it gives first is what it gives again.
        handle = self._inner.register_forward_pre_hook(self._follow, prepend=True)
        self._handles.append(handle)

    @torch.compiler.disable
    def _follow(self, inner: nn.Module, _inputs: Any) -> None:
        base: Any = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner
        if parametrize.is_parametrized(base, self._own):  # not where the adapter is disabled
            base.parametrizations[self._own][-1].register_forward_hook(self._restore)

    @torch.compiler.disable
    def _restore(self, _proxy: nn.Module, inputs: tuple[Tensor], effective: Tensor) -> None:
        """Put the base's entries into W + s·BA, which PEFT has just made; return no gradient."""
        indices = self._indices.get(effective.device)
        if indices is None:  # the model was moved, or this is one of `DataParallel`'s copies
            indices = next(iter(self._indices.values())).to(effective.device)
            self._indices[effective.device] = indices
        with torch.no_grad():
            write_entries(effective, indices, inputs[0].take(indices.long()))
        if effective.requires_grad:
            effective.register_hook(partial(_clear_entries, indices=indices))


def _clear_entries(gradient: Tensor, indices: Tensor) -> Tensor:
    """Copy a gradient, with zeros at frozen entries."""
    cleared = gradient.clone(memory_format=torch.contiguous_format)
    write_entries(cleared, indices, cleared.new_zeros(()))
    return cleared


@torch.compiler.disable
def _note_input(first: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Attach lora_A's input to its output, for lora_B's hook."""
    # On the tensor, not on a module: `DataParallel` runs copies of a module at once, and what a
    # broken forward pass leaves is freed with the tensor.
    setattr(output, _NOTE, (args[0], first))


class _Corrected(torch.autograd.Function):
    """``output - input @ C.T`` with C = B @ A at the frozen entries."""

    # C is computed again in the backward pass, and neither BA nor a mask ever exists: every
    # product is taken at the frozen entries alone.

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, a: Tensor, b: Tensor, pattern: FrozenPattern
    ) -> Tensor:
        ctx.save_for_backward(input, a, b)
        ctx.pattern = pattern
        with torch.autocast(output.device.type, enabled=False):
            negative = sampled_product(pattern.by_row, b.float(), -a.float().T)
            rows = transposed(negative @ columns_of_tokens(input)).view(output.shape)
            return rows.add_(output).to(output.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        input, a, b = ctx.saved_tensors
        by_row, by_column = ctx.pattern.by_row, ctx.pattern.by_column
        _, for_input, for_a, for_b, _ = ctx.needs_input_grad
        to_input = to_a = to_b = None
        with torch.autocast(gradient.device.type, enabled=False):
            outer, inner = columns_of_tokens(gradient), columns_of_tokens(input)
            a32, b32 = a.float(), b.float()
            if for_input:
                negative = sampled_product(by_column, -a32.T, b32)
                to_input = transposed(negative @ outer).view(input.shape).to(input.dtype)
            if for_a:
                to_a = -(sampled_product(by_column, inner, outer) @ b32).T.to(a.dtype)
            if for_b:
                to_b = -(sampled_product(by_row, outer, inner) @ a32.T.contiguous()).to(b.dtype)
        return gradient, to_input, to_a, to_b, None
