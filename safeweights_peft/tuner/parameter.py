"""The selected entries of one parameter, and how a forward pass sees adapters' values there.

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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safeweights_peft.errors import MergeError, ModelError, UnsupportedFeatureError
from safeweights_peft.modeling.tensors import add_rounded
from safeweights_peft.tuner.sampled import SampledWeight, can_sample

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by item size, to compare floats bit by bit
_writing = threading.Lock()  # two threads must not both set the originals aside


class Term(NamedTuple):
    """What one adapter adds to a parameter."""

    adapter: str
    indices: Tensor  # (count,), flat, ascending
    values: Tensor  # (count,), float32
    scale: float


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
    """What was overwritten: where, and what stood there."""

    parameter: Tensor
    indices: Tensor  # (count,), ascending
    originals: Tensor  # (count,), in the parameter's dtype
    state: tuple[Any, ...] | None = None  # of frozen values, when they were last written
    graphs: "weakref.WeakSet[_Graph]" = field(default_factory=weakref.WeakSet)


class _Union(NamedTuple):
    """The entries that several terms change together, and where each term's own are among them."""

    parts: tuple[Tensor, ...]
    indices: Tensor  # (count,), ascending
    positions: tuple[Tensor, ...]  # a term's (count of the term,)


class SelectedParameter:
    """The selected entries of one parameter: indices and values by adapter, and the base's own."""

    def __init__(
        self, module: nn.Module, own: str, name: str, values: nn.ParameterDict, indices: Any
    ) -> None:
        # The module, because whoever moves or shards a model replaces the parameter in it.
        self.module = module
        self.own = own
        self.name = name
        self.values = values
        self.indices = indices
        self._patch: _Patch | None = None
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_union": None, "_home": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.settle()

    @property
    def parameter(self) -> Tensor:
        """The base's parameter."""
        return getattr(self.module, self.own)

    def settle(self) -> None:
        """Note which tensor may be overwritten: the one that is here outside of any forward."""
        self._home = weakref.ref(self.parameter)
        self._union: _Union | None = None  # indices may have changed, too

    def weight(self, terms: Sequence[Term], may_write: bool) -> Tensor | None:
        """Return what the module is to use in place of its parameter; None if that is right."""
        if not terms:
            return self._base_weight()
        if may_write and self._is_writable():
            return self._overwrite_for_forward(terms)
        return self._copy(terms)

    def originals(self, indices: Tensor) -> Tensor:
        """Gather the base's entries, whether they are overwritten or not."""
        entries, patch = self._gather(indices), self._patch
        if patch is None or not patch.indices.numel():
            return entries
        at = torch.searchsorted(patch.indices, indices).clamp_(max=patch.indices.numel() - 1)
        covered = patch.indices[at] == indices
        return torch.where(covered, patch.originals[at], entries)

    def check_finite(self, terms: Sequence[Term]) -> None:
        """Refuse terms that don't merge to finite entries."""
        entries = self._add(terms, self.originals(self._indices(terms)))
        bad = int(entries.numel() - entries.isfinite().sum())
        if bad:
            raise MergeError(
                f"{self.name}: expected finite merged entries, found {bad} that are not; "
                "use a smaller scale or a base in float32; nothing was merged"
            )

    def overwrite(self, terms: Sequence[Term]) -> None:
        """Write the terms' entries, to stay until :meth:`restore`."""
        self.restore()
        indices = self._indices(terms)
        originals = self._gather(indices)
        entries = self._add(terms, originals)
        self._patch = _Patch(self.parameter, indices, originals)
        self._write(indices, entries)

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

    def _is_writable(self) -> bool:
        parameter = self.parameter
        return (
            not torch.compiler.is_compiling()
            and parameter is self._home()
            and parameter.is_contiguous()
            and not parameter.requires_grad
            and not parameter.is_meta
            and not parameter.is_inference()
        )

    def _base_weight(self) -> Tensor | None:
        """Return the base's own weight; None if the parameter holds it."""
        self.release()
        if self._patch is None:
            return None
        flat = self.parameter.detach().flatten()
        base = flat.index_copy(0, self._patch.indices.long(), self._patch.originals)
        return base.view_as(self.parameter)

    def _copy(self, terms: Sequence[Term]) -> Tensor:
        """Copy the base's weight and put the terms' entries into it (functional mode)."""
        if self.parameter.is_meta and hasattr(self.module, "_hf_hook"):
            raise UnsupportedFeatureError(
                f"{self.name}: expected a parameter in memory, found one that is offloaded; "
                "load the model without offloading, or merge the adapter into the checkpoint"
            )
        base = self._base_weight()
        flat = (self.parameter if base is None else base).flatten()
        indices = self._indices(terms)
        entries = self._add(terms, flat.index_select(0, indices))
        return flat.index_copy(0, indices.long(), entries).view_as(self.parameter)

    def _overwrite_for_forward(self, terms: Sequence[Term]) -> Tensor | None:
        """Write the terms' entries in place; None if no gradient is needed."""
        state, patch = _frozen_state(terms), self._patch
        if patch is not None and patch.indices is self._indices(terms):
            if state is not None and patch.state == state:
                return None
        with _writing:
            return self._bring_up_to_date(terms, state)

    def _bring_up_to_date(self, terms: Sequence[Term], state: tuple | None) -> Tensor | None:
        indices = self._indices(terms)
        # By identity: an adapter may have been replaced by another of its name.
        if self._patch is not None and self._patch.indices is not indices:
            self.release()
            if self._patch is not None:
                return self._copy(terms)
        patch = self._patch or _Patch(self.parameter, indices, self._gather(indices))
        entries = self._add(terms, patch.originals)
        if self._patch is None or not _same_bits(self._gather(indices), entries):
            if patch.graphs:
                return self._copy(terms)
            self._patch = patch
            self._write(indices, entries)
        patch.state = state
        if not entries.requires_grad:
            return None
        graph = _Graph()
        patch.graphs.add(graph)
        weight = _Overwritten.apply(entries, self.parameter, indices, graph)
        if can_sample(weight, len(entries)):
            return SampledWeight.of(weight, entries, indices, graph)
        return weight

    def _indices(self, terms: Sequence[Term]) -> Tensor:
        """Return the indices of all terms together."""
        return terms[0].indices if len(terms) == 1 else self._unite(terms).indices

    def _unite(self, terms: Sequence[Term]) -> _Union:
        parts, union = tuple(term.indices for term in terms), self._union
        if union is None or not _are_same(union.parts, parts):
            indices = torch.cat(parts).unique()
            positions = tuple(torch.searchsorted(indices, part) for part in parts)
            union = self._union = _Union(parts, indices, positions)
        return union

    def _add(self, terms: Sequence[Term], originals: Tensor) -> Tensor:
        """Add the terms' values one after the other in float32, and round once."""
        if len(terms) == 1:
            (term,) = terms
            return add_rounded(originals, term.values, term.scale)
        total = originals.float()
        for term, positions in zip(terms, self._unite(terms).positions, strict=True):
            total = total.index_add(0, positions, term.values.float() * term.scale)
        return total.to(originals.dtype)

    def _gather(self, indices: Tensor) -> Tensor:
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            return self.parameter.detach().flatten().index_select(0, indices)

    def _write(self, indices: Tensor, entries: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.parameter.detach().view(-1).index_copy_(0, indices.long(), entries.detach())


def _frozen_state(terms: Sequence[Term]) -> tuple | None:
    """Describe frozen values; None where only comparing entries tells if they changed."""
    # Optimizers may write values behind autograd's back (fused kernels, ``.data``), so of values
    # that are being trained the version counters say too little.
    values = [term.values for term in terms]
    if any(value.requires_grad or value.is_inference() for value in values):
        return None
    return tuple((term.scale, term.values.data_ptr(), term.values._version) for term in terms)


def _are_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _same_bits(left: Tensor, right: Tensor) -> bool:
    integers = _INTEGERS[left.element_size()]
    return torch.equal(left.view(integers), right.detach().view(integers))
