"""SPA under LoRA: a linear layer's output without what LoRA adds to frozen entries of its weight.

LoRA makes W + s·BA of the weight W. Each adapter's output B(Ax) is corrected by M(BA)x, where M
keeps a matrix at the frozen entries alone, so that the effective weight is W there: exactly, at any
scale, with any number of adapters, and with dropout, since x is what has passed it. Neither BA nor
a mask is made: each product is computed at the frozen entries alone, or with them.

Which layers to correct, and at which entries, is the matter of ``adapters``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from safeweights_peft.errors import UnsupportedFeatureError
from safeweights_peft.tuner.sampled import csr_pattern

_SOURCE = "_safeweights_source"


class LoraCorrection:
    """The hooks that take LoRA's part at the frozen entries out of one layer's output."""

    def __init__(self, name: str, layer: LoraLinear, indices: Tensor) -> None:
        """Lay the frozen entries out.

        Args:
            name: The layer's name, for messages.
            layer: LoRA on a linear layer.
            indices: Flat indices of frozen entries of its weight, ascending; ``(count,)``.
        """
        self._name = name
        self._layer = layer
        frozen = _Frozen.lay_out(indices, (layer.out_features, layer.in_features))
        self._frozen = {indices.device: frozen}
        self._adapters = list(layer.lora_A)
        self._handles: list[RemovableHandle] = []

    @staticmethod
    def corrects(layer: LoraLinear) -> bool:
        """Tell whether a layer is corrected already.

        Args:
            layer: LoRA on a linear layer.

        Returns:
            True while a correction is attached.
        """
        hooks = layer._forward_pre_hooks.values()
        return any(isinstance(getattr(hook, "__self__", None), LoraCorrection) for hook in hooks)

    def attach(self) -> None:
        """Start to correct every adapter of the layer."""
        torch.compiler.reset()  # compiled code doesn't notice hooks that come or go
        self._handles.append(self._layer.register_forward_pre_hook(self._check))
        for adapter in self._adapters:
            first, second = self._layer.lora_A[adapter], self._layer.lora_B[adapter]
            self._handles.append(first.register_forward_hook(_remember_source))
            self._handles.append(second.register_forward_hook(self._correct))

    def detach(self) -> None:
        """Remove every hook."""
        torch.compiler.reset()
        while self._handles:
            self._handles.pop().remove()

    def _check(self, layer: LoraLinear, _args: Any) -> None:
        """Refuse what goes past the hooks."""
        if layer.merged:
            raise UnsupportedFeatureError(
                f"{self._name}: expected adapters that are not merged while frozen entries are "
                "preserved, found merged ones; unmerge them, or merge with merge_preserved"
            )
        if list(layer.lora_A) != self._adapters:
            raise UnsupportedFeatureError(
                f"{self._name}: expected the adapters {self._adapters} that are preserved, found "
                f"{list(layer.lora_A)}; add and delete adapters before"
            )

    @torch.compiler.disable  # there are no sparse tensors in compiled code
    def _correct(self, second: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        input, first = vars(args[0]).pop(_SOURCE)
        if not output.numel():  # an expert that no token was sent to
            return output
        if output.device not in self._frozen:  # moved since, or a copy of `DataParallel`'s
            self._frozen[output.device] = next(iter(self._frozen.values())).to(output.device)
        frozen = self._frozen[output.device]
        return _Corrected.apply(output, input, first.weight, second.weight, frozen)


@torch.compiler.disable
def _remember_source(first: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Let lora_A's output say what it was made of, for lora_B's hook.

    A note on the tensor, not on a module: `DataParallel` runs copies of a module at once.
    """
    setattr(output, _SOURCE, (args[0], first))


@dataclass(frozen=True, eq=False)
class _Frozen:
    """Frozen entries of a weight in CSR order, by rows and by columns: 12 bytes each.

    Attributes:
        by_row: The pattern of the weight.
        by_column: The pattern of its transpose.
        order: Where the entries of `by_column` stand in `by_row`; ``(count,)``.
    """

    by_row: Tensor
    by_column: Tensor
    order: Tensor

    @classmethod
    def lay_out(cls, indices: Tensor, shape: tuple[int, int]) -> _Frozen:
        rows, columns = shape
        transposed = indices.long() % columns * rows + indices.long() // columns
        order = transposed.argsort()
        by_column = csr_pattern(transposed[order].to(indices.dtype), (columns, rows))
        return cls(csr_pattern(indices, shape), by_column, order.int())

    def to(self, device: torch.device) -> _Frozen:
        return _Frozen(self.by_row.to(device), self.by_column.to(device), self.order.to(device))

    def transpose(self, values: Tensor) -> Tensor:
        """Make the matrix of these values, transposed; they stand in the order of rows."""
        return torch.sparse_csr_tensor(
            self.by_column.crow_indices(),
            self.by_column.col_indices(),
            values[self.order],
            size=self.by_column.shape,
            check_invariants=False,
        )


class _Corrected(torch.autograd.Function):
    """``output - input @ M(B @ A).T``, in place; M is computed anew in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, input: Tensor, a: Tensor, b: Tensor, frozen: _Frozen
    ) -> Tensor:
        ctx.save_for_backward(input, a, b)
        ctx.frozen = frozen
        ctx.mark_dirty(output)
        with _in_float32(output.device):
            removed = _sampled(frozen.by_row, b.float(), a.float())
            return output.add_(_transposed(removed @ _columns(input)).view(output.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        input, a, b = ctx.saved_tensors
        frozen, (_, for_input, for_a, for_b, _) = ctx.frozen, ctx.needs_input_grad
        to_input = to_a = to_b = None
        with _in_float32(gradient.device):
            columns = _columns(gradient)
            if for_input:
                removed = _sampled(frozen.by_column, a.T.float(), b.T.float())
                to_input = _transposed(removed @ columns).view(input.shape).to(input.dtype)
            if for_a or for_b:
                to_removed = _sampled(frozen.by_row, columns, _columns(input).T)
                to_a = (frozen.transpose(to_removed.values()) @ b.float()).T.to(a.dtype)
                to_b = (to_removed @ a.T.float()).to(b.dtype)
        return gradient, to_input, to_a, to_b, None


def _in_float32(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast from narrowing products: there are no sparse ones of 16 bits on a CPU."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _sampled(pattern: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute ``-left @ right`` at the entries of a pattern, as a sparse matrix."""
    return torch.sparse.sampled_addmm(pattern, left, right, beta=0.0, alpha=-1.0)


def _columns(tensor: Tensor) -> Tensor:
    """Copy rows of tokens into columns of float32."""
    return _transposed(tensor.reshape(-1, tensor.shape[-1]).float().contiguous())


def _transposed(matrix: Tensor) -> Tensor:
    """Copy a contiguous matrix into its transpose: sparse products want tokens side by side.

    Shuffling as many groups of channels as there are rows is the same, and on a CPU three times as
    fast as ``matrix.T.contiguous()``, which takes as long as the product. The strides are those of
    the channels-last layout, for which torch has that kernel.
    """
    rows, columns = matrix.shape
    numel = matrix.numel()
    channels = matrix.as_strided((1, numel, 1, 1), (numel, 1, numel, numel))
    return F.channel_shuffle(channels, rows).view(columns, rows)
