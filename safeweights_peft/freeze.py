"""The frozen-index guard: chosen entries of parameters keep their bits while all others train.

A gradient hook alone does not freeze an entry: decoupled weight decay moves it, and so does
momentum from an earlier run. So the guard clears the gradient where it arrives, which keeps frozen
entries out of clipping norms and optimizer states, and writes the original entries back after each
optimizer step.

Here live the entries and the hooks. Which entries to freeze, and whether a model is fit for it, is
the matter of ``preserve``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from safeweights_peft.errors import UnsupportedFeatureError


class FrozenEntries:
    """Entries of one parameter, and what they hold: index and value, nothing of the dense size."""

    def __init__(self, name: str, parameter: nn.Parameter, indices: Tensor) -> None:
        """Note what the entries hold."""
        self.name = name
        self.parameter = parameter
        self.indices = indices.to(parameter.device)
        self.originals = torch.take(parameter.detach(), self.indices.long())

    @torch.no_grad()
    def restore(self) -> None:
        """Write the original entries back into the parameter."""
        self.originals = self.originals.to(self.parameter)  # the model may have been moved
        self.write(self.originals)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Write other entries into the parameter."""
        self._write(self.parameter, values)

    @torch.no_grad()
    def clear_gradient(self, parameter: Tensor) -> None:
        """Zero the gradient of the entries in place."""
        gradient = parameter.grad
        if gradient is None:  # an optimizer that steps during the backward pass has used it up
            return
        if gradient.layout is not torch.strided:
            raise UnsupportedFeatureError(
                f"{self.name}: expected a dense gradient, found a sparse one; make the embedding "
                "with sparse=False"
            )
        self._write(gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))

    def _write(self, tensor: Tensor, values: Tensor) -> None:
        self.indices = self.indices.to(tensor.device)
        if tensor.is_contiguous():
            tensor.view(-1)[self.indices] = values
        else:
            tensor[torch.unravel_index(self.indices, tensor.shape)] = values


class FreezeGuard:
    """The hooks that keep frozen entries as they are, from ``attach`` to ``detach``.

    Whatever optimizer holds the parameter need not be named: torch tells of the steps of all. The
    hooks don't keep the guard alive: they go when nothing else holds it.
    """

    def __init__(self, entries: Sequence[FrozenEntries]) -> None:
        self._entries = entries
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    def attach(self) -> None:
        """Start to guard; parameters that don't require gradients get no gradient hook."""
        for each in self._entries:
            if each.parameter.requires_grad:
                hook = each.parameter.register_post_accumulate_grad_hook(each.clear_gradient)
                self._handles.append(hook)
        after_step = weakref.WeakMethod(self._after_step)

        def tell(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            if restore := after_step():
                restore(optimizer)

        self._handles.append(register_optimizer_step_post_hook(tell))

    def detach(self) -> None:
        """Remove every hook, and write the original entries back once more."""
        _remove_all(self._handles)
        for each in self._entries:
            each.restore()

    def _after_step(self, optimizer: Optimizer) -> None:
        moved = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for each in self._entries:
            if id(each.parameter) in moved:
                each.restore()


def _remove_all(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
