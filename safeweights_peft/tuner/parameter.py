"""The selected entries of one parameter, and how a forward pass sees the adapters' values there.

Here live the two forward modes. The rule that they follow stands in ``entries``, the module around
the parameter in ``layer``, and what PEFT asks of a method as a whole in ``model``.

A forward pass sees the base's entries plus the active adapters' values, in one of two ways:

* *In place*: the entries are written into the base's own parameter and the originals set aside.
  No weight is copied. The module runs on an alias of the parameter, whose backward gathers the
  selected gradient and drops the dense one at once, so memory is that of LoRA.
* *Functional*: the module runs on a changed copy of the parameter. Needed where the parameter may
  not be written: under ``torch.compile``, or where it is replaced around each forward (FSDP2).

An overwritten parameter stays so until something needs the base: another adapter, none, merging,
``state_dict``, copying or moving the model. A graph that still waits for its backward holds on to
what it saw: until then, whatever wants other entries runs on a copy. Only reading a parameter
directly between two forwards shows the overwritten entries.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from safeweights_peft.errors import MergeError, ModelError, UnsupportedFeatureError
from safeweights_peft.modeling.tensors import add_rounded
from safeweights_peft.tuner.sampled import SampledWeight, can_sample

if TYPE_CHECKING:
    from safeweights_peft.tuner.layer import SafeWeightsLayer

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by item size, to compare floats bit by bit
_writing = threading.Lock()  # two threads must not both set the originals aside


class ForwardMode(StrEnum):
    """How a forward pass gets its weights; ``auto`` is in place wherever that is possible."""

    AUTO = "auto"
    IN_PLACE = "in_place"
    FUNCTIONAL = "functional"


class _Graph:
    """Lives as long as an autograd graph waits for its backward."""

    __slots__ = ("__weakref__",)


class _Overwritten(torch.autograd.Function):
    """An alias of an overwritten parameter; its gradient goes to the entries."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, parameter: Tensor, indices: Tensor, graph: _Graph):
        # Plain attributes, not saved tensors: DDP writes the (same) buffers before each forward.
        ctx.indices, ctx.graph = indices, graph
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        ctx.graph = None
        return gradient.flatten().index_select(0, ctx.indices), None, None, None


@dataclass
class _Patch:
    """What was overwritten: where, by which adapters, and what stood there."""

    parameter: Tensor
    adapters: tuple[str, ...]
    indices: Tensor  # (count,), ascending
    originals: Tensor  # (count,), in the parameter's dtype
    state: tuple[Any, ...] | None = None  # of frozen values, when they were last written
    graphs: "weakref.WeakSet[_Graph]" = field(default_factory=weakref.WeakSet)


@dataclass(frozen=True)
class _Plan:
    """Which entries some adapters change together, and where each one's values belong in them."""

    adapters: tuple[str, ...]
    indices: Tensor  # (count,), ascending
    positions: tuple[Tensor, ...]  # each (count of the adapter,); empty for a single adapter


class SelectedParameter:
    """The selected entries of one parameter, by adapter."""

    def __init__(self, layer: "SafeWeightsLayer", own: str) -> None:
        self.layer = layer
        self.own = own
        self.name = f"{layer.path}.{own}"
        self._patch: _Patch | None = None
        self._plan: _Plan | None = None
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        # The layer has put the base back, and calls settle() on the copy.
        return {**self.__dict__, "_plan": None, "_home": None}

    @property
    def parameter(self) -> Tensor:
        """The base's parameter."""
        return getattr(self.layer.base_layer, self.own)

    @property
    def containers(self) -> tuple[str, str]:
        """The layer's names for ``values`` and ``indices``."""
        return f"safeweights_values__{self.own}", f"safeweights_indices__{self.own}"

    @property
    def values(self) -> nn.ParameterDict:
        """The float32 values by adapter; each ``(count,)``."""
        return getattr(self.layer, self.containers[0])

    @property
    def indices(self) -> BufferDict:
        """The flat indices by adapter; each ``(count,)``."""
        return getattr(self.layer, self.containers[1])

    def settle(self) -> None:
        """Note which tensor may be overwritten: the one that is here outside of any forward."""
        self._home = weakref.ref(self.parameter)
        self.forget_plan()

    def forget_plan(self) -> None:
        """Drop what was derived from the indices, because they may change."""
        self._plan = None

    def weight(self) -> Tensor | None:
        """Give what the module is to use in place of its parameter."""
        layer = self.layer
        if layer.merged:
            if not layer.disable_adapters:
                return None
            layer.unmerge()
        adapters = () if layer.disable_adapters else self.held(layer.active_adapters)
        if not adapters:
            return self._base_weight()
        layer.check(adapters)
        return self._overwritten(adapters) if self._may_overwrite() else self._copy(adapters)

    def held(self, adapters: Sequence[str]) -> tuple[str, ...]:
        """Pick the adapters that select entries of this parameter."""
        return tuple(name for name in adapters if name in self.values)

    def originals(self, indices: Tensor) -> Tensor:
        """Gather the base's entries, whether they are overwritten or not."""
        entries, patch = self._gather(indices), self._patch
        if patch is None or not patch.indices.numel():
            return entries
        at = torch.searchsorted(patch.indices, indices).clamp_(max=patch.indices.numel() - 1)
        covered = patch.indices[at] == indices
        return torch.where(covered, patch.originals[at], entries)

    def check_finite(self, adapters: Sequence[str]) -> None:
        """Check that merging gives finite entries."""
        plan = self._plan_for(tuple(adapters))
        entries = self._fold(plan, self.originals(plan.indices))
        bad = int(entries.numel() - entries.isfinite().sum())
        if bad:
            raise MergeError(
                f"{self.name}: expected finite merged entries, found {bad} that are not; "
                "use a smaller scale or a base in float32; nothing was merged"
            )

    def overwrite(self, adapters: Sequence[str]) -> None:
        """Write the adapters' entries, to stay until :meth:`restore`."""
        self.restore()
        plan = self._plan_for(tuple(adapters))
        originals = self._gather(plan.indices)
        entries = self._fold(plan, originals)
        self._patch = _Patch(self.parameter, plan.adapters, plan.indices, originals)
        self._write(plan.indices, entries)

    @torch.compiler.disable
    def restore(self) -> None:
        """Put the base's own entries back, bit by bit."""
        patch = self._patch
        if patch is None:
            return
        if patch.parameter is not self.parameter:
            raise ModelError(
                f"{self.name}: expected the parameter that a forward has changed, found another; "
                "disable adapters (disable_adapter) while replacing or sharding parameters"
            )
        self._write(patch.indices, patch.originals)
        self._patch = None

    def release(self) -> None:
        """Put the base's own entries back, unless a graph still needs the others."""
        if self._patch is not None and not self._patch.graphs:
            self.restore()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow ``model.to(...)`` and the like."""
        self.settle()
        if self._patch is not None:
            self._patch.parameter = self.parameter
            self._patch.indices = fn(self._patch.indices)
            self._patch.originals = fn(self._patch.originals)

    def _may_overwrite(self) -> bool:
        """Choose the mode: True for in place."""
        mode = self.layer.forward_mode
        if mode is ForwardMode.FUNCTIONAL or torch.compiler.is_compiling():
            return False
        parameter = self.parameter
        possible = (
            parameter is self._home()
            and parameter.is_contiguous()
            and not parameter.requires_grad
            and not parameter.is_meta
            and not parameter.is_inference()
        )
        if mode is ForwardMode.IN_PLACE and not possible:
            raise UnsupportedFeatureError(
                f"{self.name}: expected a plain, frozen, contiguous parameter for in-place mode, "
                "found another; use set_forward_mode(model, 'auto')"
            )
        return possible

    def _base_weight(self) -> Tensor | None:
        """Give the base's own weight; None if the parameter holds it."""
        self.release()
        if self._patch is None:
            return None
        flat = self.parameter.detach().flatten()
        base = flat.index_copy(0, self._patch.indices.long(), self._patch.originals)
        return base.view_as(self.parameter)

    def _copy(self, adapters: tuple[str, ...]) -> Tensor:
        """Copy the base's weight and put the adapters' entries into it (functional mode)."""
        if self.parameter.is_meta and hasattr(self.layer.base_layer, "_hf_hook"):
            raise UnsupportedFeatureError(
                f"{self.name}: expected a parameter in memory, found one that is offloaded; "
                "load the model without offloading, or merge the adapter into the checkpoint"
            )
        base = self._base_weight()
        flat = (self.parameter if base is None else base).flatten()
        plan = self._plan_for(adapters)
        entries = self._fold(plan, flat.index_select(0, plan.indices))
        return flat.index_copy(0, plan.indices.long(), entries).view_as(self.parameter)

    def _overwritten(self, adapters: tuple[str, ...]) -> Tensor | None:
        """Write the entries in place; None if no gradient is needed, as the parameter is right."""
        state, patch = self._frozen_state(adapters), self._patch
        if patch is not None and state is not None and patch.state == state:
            return None
        with _writing:
            return self._bring_up_to_date(adapters, state)

    def _bring_up_to_date(self, adapters: tuple[str, ...], state: tuple | None) -> Tensor | None:
        if self._patch is not None and self._patch.adapters != adapters:
            self.release()
            if self._patch is not None:
                return self._copy(adapters)
        plan, patch = self._plan_for(adapters), self._patch
        if patch is None:
            originals = self._gather(plan.indices)
            patch = _Patch(self.parameter, adapters, plan.indices, originals)
        entries = self._fold(plan, patch.originals)
        if self._patch is None or not _same_bits(self._gather(patch.indices), entries):
            if patch.graphs:
                return self._copy(adapters)
            self._patch = patch
            self._write(patch.indices, entries)
        patch.state = state
        if not entries.requires_grad:
            return None
        graph = _Graph()
        patch.graphs.add(graph)
        weight = _Overwritten.apply(entries, self.parameter, patch.indices, graph)
        if can_sample(weight, len(entries)):
            return SampledWeight.of(weight, entries, patch.indices, graph)
        return weight

    def _frozen_state(self, adapters: tuple[str, ...]) -> tuple | None:
        """Describe frozen values; None where only comparing entries tells if they changed.

        Optimizers may write values behind autograd's back (fused kernels, ``.data``), so of values
        that are being trained the version counters say too little.
        """
        values = [self.values[name] for name in adapters]
        if any(value.requires_grad or value.is_inference() for value in values):
            return None
        return tuple(
            (name, self.layer.scaling[name], value.data_ptr(), value._version)
            for name, value in zip(adapters, values, strict=True)
        )

    def _plan_for(self, adapters: tuple[str, ...]) -> _Plan:
        if len(adapters) == 1:
            return _Plan(adapters, self.indices[adapters[0]], ())
        if self._plan is None or self._plan.adapters != adapters:
            each = [self.indices[name] for name in adapters]
            union = torch.cat(each).unique()
            positions = tuple(torch.searchsorted(union, indices) for indices in each)
            self._plan = _Plan(adapters, union, positions)
        return self._plan

    def _fold(self, plan: _Plan, originals: Tensor) -> Tensor:
        """Add the adapters' values one after the other in float32, and round once."""
        scaling = self.layer.scaling
        if len(plan.adapters) == 1:
            (name,) = plan.adapters
            return add_rounded(originals, self.values[name], scaling[name])
        total = originals.float()
        for name, positions in zip(plan.adapters, plan.positions, strict=True):
            total = total.index_add(0, positions, self.values[name].float() * scaling[name])
        return total.to(originals.dtype)

    def _gather(self, indices: Tensor) -> Tensor:
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            return self.parameter.detach().flatten().index_select(0, indices)

    def _write(self, indices: Tensor, entries: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.parameter.detach().view(-1).index_copy_(0, indices.long(), entries.detach())


def _same_bits(left: Tensor, right: Tensor) -> bool:
    integers = _INTEGERS[left.element_size()]
    return torch.equal(left.view(integers), right.detach().view(integers))
