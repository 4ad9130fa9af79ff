"""SPA under LoRA: a layer's output without what LoRA adds to frozen entries of its weight.

LoRA makes W + s·BA of a weight W. Here each adapter's B(Ax) becomes B(Ax) − Cx, where C is BA at
the frozen entries and zero elsewhere, so that the effective weight is W there. That is exact at any
scale, with any number of adapters, and with dropout, because x is what has passed it. Neither BA
nor a mask is ever made: every product is taken at the frozen entries alone.

Which layers are corrected, and at which entries, is the matter of ``adapters``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from safeweights_peft.errors import UnsupportedFeatureError
from safeweights_peft.tuner.csr import columns_of_tokens, csr_pattern, sampled_product, transposed

_NOTE = "_safeweights_input"


@dataclass(frozen=True, eq=False)
class FrozenPattern:
    """Frozen entries of a weight by rows and by columns: 8 bytes each, 4 per row and column.

    Attributes:
        by_row: The pattern of the weight; see `csr_pattern`.
        by_column: The pattern of its transpose.
    """

    by_row: Tensor
    by_column: Tensor

    @classmethod
    def lay_out(cls, indices: Tensor, shape: tuple[int, int]) -> FrozenPattern:
        """Lay frozen entries out."""
        rows, columns = shape
        transposed = indices.long() % columns * rows + indices.long() // columns
        by_column = csr_pattern(transposed.sort().values.to(indices.dtype), (columns, rows))
        return cls(csr_pattern(indices, shape), by_column)

    def to(self, device: torch.device) -> FrozenPattern:
        """Copy the pattern to another device."""
        return FrozenPattern(self.by_row.to(device), self.by_column.to(device))


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """A LoRA layer that would move frozen entries of its weight.

    Attributes:
        name: The layer's name, for messages.
        layer: LoRA on a linear layer.
        pattern: The frozen entries; layers that share a weight share it.
    """

    name: str
    layer: LoraLinear
    pattern: FrozenPattern


class LoraCorrection:
    """The hooks that keep one layer's effective weight at its frozen entries."""

    def __init__(self, frozen: FrozenLayer) -> None:
        """Note what to correct, and change nothing yet."""
        self._layer = frozen.layer
        self._patterns = {frozen.pattern.by_row.device: frozen.pattern}
        self._handles: list[RemovableHandle] = []
        hooks = [h for each in self._layer.lora_B.values() for h in each._forward_hooks.values()]
        if any(isinstance(getattr(hook, "__self__", None), LoraCorrection) for hook in hooks):
            raise UnsupportedFeatureError(
                f"{frozen.name}: expected a LoRA layer that no other map or patch protects, found "
                "one; end that protection first, a callback's with detach()"
            )

    def attach(self) -> None:
        """Start to correct every adapter of the layer."""
        for adapter, first in self._layer.lora_A.items():
            second = self._layer.lora_B[adapter]
            self._handles.append(first.register_forward_hook(_note_input))
            self._handles.append(second.register_forward_hook(self._correct))

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()

    @torch.compiler.disable  # compiled code knows no sparse tensors
    def _correct(self, second: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        input, first = vars(args[0]).pop(_NOTE)
        pattern = self._patterns.get(output.device)
        if pattern is None:  # the model was moved, or this is one of `DataParallel`'s copies
            pattern = next(iter(self._patterns.values())).to(output.device)
            self._patterns[output.device] = pattern
        return _Corrected.apply(output, input, first.weight, second.weight, pattern)


@torch.compiler.disable
def _note_input(first: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Let lora_A's output say what it was made of, for lora_B's hook.

    The note is on the tensor, not on a module: `DataParallel` runs copies of a module at once, and
    what a broken forward pass leaves is freed with the tensor.
    """
    setattr(output, _NOTE, (args[0], first))


class _Corrected(torch.autograd.Function):
    """``output - input @ C.T`` with C = B @ A at the frozen entries, made anew when going back."""

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
            outer, inner, a32, b32 = (
                columns_of_tokens(gradient),
                columns_of_tokens(input),
                a.float(),
                b.float(),
            )
            if for_input:
                negative = sampled_product(by_column, -a32.T, b32)
                to_input = transposed(negative @ outer).view(input.shape).to(input.dtype)
            if for_a:
                to_a = -(sampled_product(by_column, inner, outer) @ b32).T.to(a.dtype)
            if for_b:
                to_b = -(sampled_product(by_row, outer, inner) @ a32.T.contiguous()).to(b.dtype)
        return gradient, to_input, to_a, to_b, None


def frozen_part(frozen: FrozenLayer, adapter: str) -> Tensor:
    """Compute what an adapter adds to a weight's frozen entries."""
    first, second = frozen.layer.lora_A[adapter], frozen.layer.lora_B[adapter]
    a, b = first.weight.detach().float(), second.weight.detach().float()
    product = sampled_product(frozen.pattern.by_row.to(a.device), b, a.T)
    return product.values() * frozen.layer.scaling[adapter]
