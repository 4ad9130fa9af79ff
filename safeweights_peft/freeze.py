"""Hooks that keep chosen entries of parameters, bit for bit, while all others train."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from safeweights_peft.errors import UnsupportedFeatureError

Model = TypeVar("Model", bound=nn.Module)

_attached: weakref.WeakSet[FreezeGuard] = weakref.WeakSet()


class FrozenEntries:
    """Entries of one parameter, and their values; at most 12 bytes each, nothing dense."""

    def __init__(self, name: str, parameter: nn.Parameter, indices: Tensor) -> None:
        """Copy the entries' values; flat indices, ``(count,)``."""
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
        write_entries(tensor, self.indices, values)


def write_entries(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values, or one value, at flat indices of a tensor."""
    if tensor.is_contiguous():
        tensor.view(-1)[indices] = values
    else:
        tensor[torch.unravel_index(indices, tensor.shape)] = values


def make_switch(
    model: Model, replacements: Sequence[tuple[FrozenEntries, Tensor]]
) -> Callable[[], AbstractContextManager[Model]]:
    """Make a context of a model with other entries, which restores the original ones at its end."""

    @contextmanager
    def switch_on() -> Iterator[Model]:
        try:
            for entries, values in replacements:
                entries.write(values)
            yield model
        finally:
            for entries, _ in replacements:
                entries.restore()

    return switch_on


class FreezeGuard:
    """The hooks that keep frozen entries as they are, from ``attach`` to ``detach``."""

    # A gradient hook alone does not freeze an entry: decoupled weight decay moves it, and so does
    # momentum from an earlier run. So entries are written back after each step as well. Clearing
    # the gradient where it arrives keeps them out of clipping norms and optimizer states.

    def __init__(self, entries: Sequence[FrozenEntries]) -> None:
        self._entries = entries
        self._handles: list[RemovableHandle] = []
        # A guard that nobody holds any more takes its hooks along.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    def attach(self) -> None:
        """Start to guard; parameters that don't require gradients get no gradient hook."""
        for frozen in self._entries:
            if frozen.parameter.requires_grad:
                hook = frozen.parameter.register_post_accumulate_grad_hook(frozen.clear_gradient)
                self._handles.append(hook)
        restore_weakly = weakref.WeakMethod(self._restore_after_step)

        def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            if restore := restore_weakly():
                restore(optimizer)

        # Of every optimizer there is: so the one that holds the parameters need not be named.
        self._handles.append(register_optimizer_step_post_hook(after_step))
        _attached.add(self)

    def detach(self) -> None:
        """Remove every hook, and write the original entries back once more."""
        _attached.discard(self)
        _remove_all(self._handles)
        for frozen in self._entries:
            frozen.restore()

    def clear_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Zero the gradients of the entries of some parameters."""
        chosen = {id(parameter) for parameter in parameters}
        for frozen in self._entries:
            if id(frozen.parameter) in chosen:
                frozen.clear_gradient(frozen.parameter)

    def _restore_after_step(self, optimizer: Optimizer) -> None:
        stepped = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        for frozen in self._entries:
            if id(frozen.parameter) in stepped:
                frozen.restore()


def clear_frozen(parameters: Sequence[nn.Parameter]) -> None:
    """Zero what was added to gradients at frozen entries of any guard after the backward pass."""
    for guard in _attached:
        guard.clear_gradients(parameters)


def _remove_all(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
