"""The selected entries of one parameter: what the parameter holds, and who sees what of it.

The entries of the active adapters stand in the base's own parameter, so that whoever reads it, by
calling its module or not, sees them. The base's own entries are set aside as ``originals`` and put
back, bit by bit, wherever the base must be seen: disabled, saved, unloaded.

* While values are trained, the parameter's class is :class:`Patched`, which hands out aliases.
* A graph that waits for its backward keeps what it saw: until then nothing is written, and whoever
  is to see other entries gets a copy.
* *Functional*: an operation gets a changed copy. Needed under ``torch.compile``, where the base is
  trained as well, and where the parameter is replaced around each forward (FSDP2).
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from safeweights_peft.errors import MergeError
from safeweights_peft.modeling.tensors import add_rounded
from safeweights_peft.tuner.entries import gather, move, raw, same_bits, untraced, whole, write
from safeweights_peft.tuner.patched import Patched, Reading, in_transform
from safeweights_peft.tuner.sampled import Lines, find_lines

_writing = threading.RLock()  # two threads must not both set the originals aside


class Term(NamedTuple):
    """What one adapter adds to a parameter."""

    adapter: str
    indices: Tensor  # (count,), flat, ascending
    values: Tensor  # (count,), float32
    originals: Tensor  # (count,), the base's entries, in the checkpoint's dtype
    scale: float


class Union(NamedTuple):
    """The entries that terms change together, and where each term's own are among them."""

    parts: tuple[Tensor, ...]  # the terms' originals: new ones make a new union
    indices: Tensor  # (count,), ascending
    originals: Tensor  # (count,)
    positions: tuple[Tensor, ...]  # a term's (count of the term,)


class Owner(Protocol):
    """The layer of a parameter: it says which entries are to be seen there."""

    name: str

    @property
    def module(self) -> nn.Module:
        """The module that owns the parameter."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stands in the module now."""

    def terms(self) -> list[Term]:
        """List what the adapters that are to be seen add."""

    def check_active(self) -> None:
        """Check active adapters that were loaded but not checked yet."""

    def take_originals(self) -> None:
        """Set the base's entries aside anew."""


def _nothing() -> None:
    """Stand in for a reference to no parameter."""


class Selection:
    """What a parameter holds, and what whoever reads it is to see."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self._held: Union | None = None  # whose entries stand in the parameter; None: the base's
        self._union: Union | None = None  # of the terms that were asked for last
        self._lines: tuple[Union, Lines | None] | None = None  # that a union's entries fill
        self._state: tuple | None = None  # of frozen values, when they were last written
        self._marks: list[weakref.ref[Tensor]] = []
        self._trained_base = False  # the base's entries may have changed since they were set aside
        self._terms: list[Term] | None = None  # that were asked for last
        self._is_training = False  # in a forward of the model that autograd records
        self._known: Callable[[], nn.Parameter | None] = weakref.ref(owner.parameter)

    def __getstate__(self) -> dict[str, Any]:
        reset: dict[str, Any] = {"_marks": [], "_lines": None, "_state": None, "_terms": None}
        return {**self.__dict__, **reset, "_known": self.known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameter = state["_known"]
        self.__dict__.update(state, _known=_nothing)
        if parameter is None:
            return
        self._known = weakref.ref(parameter)
        # The owner may not be whole yet: ask it nothing here, and let the next reader do so.
        parameter.__class__ = Patched
        parameter.__dict__["selection"] = self

    def give_up(self, write: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Write the parameter no more, but for the base's entries by other means."""
        if self._held is not None and write is not None:
            write(self._held.indices, self._held.originals)
        self._held = self._state = None
        self._known = _nothing

    def changed(self, parameter: Tensor, needs_copy: bool = False) -> Tensor | None:
        """Return a changed copy of a parameter; None if there is nothing to change."""
        self.owner.check_active()
        terms = self._list_terms(parameter)
        if not terms and not needs_copy:
            return None
        if parameter.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                return self._change_trained_base(parameter, terms)
        return self._copy(parameter, *self._wanted(parameter, terms, self._is_recorded()))

    @property
    def known(self) -> nn.Parameter | None:
        """The parameter that may be written: the one that stood there outside of any forward."""
        return self._known()

    def settle(self) -> None:
        """Know the parameter that stands there now, and that it holds the base's own entries."""
        self._known = weakref.ref(self.owner.parameter)
        self._held, self._marks, self._state = None, [], None

    def forget(self) -> None:
        """Compare entries at the next chance, though nothing seems to have changed."""
        self._state = None

    def gather(self, indices: Tensor) -> Tensor:
        """Gather the base's entries, in the parameter's dtype, whatever stands there now."""
        held = self._held
        entries = gather(whole(self.owner.parameter), indices)
        if held is None or not held.indices.numel():
            return entries
        at = torch.searchsorted(held.indices, indices).clamp_(max=held.indices.numel() - 1)
        covered = held.indices[at] == indices
        return torch.where(covered, held.originals[at].to(entries.dtype), entries)

    def check_finite(self, terms: Sequence[Term]) -> None:
        """Refuse terms that don't merge to finite entries."""
        _, entries = self._wanted(self.owner.parameter, terms, is_recorded=False)
        assert entries is not None
        bad = int(entries.numel() - entries.isfinite().sum())
        if bad:
            hint = "use a smaller scale or a base in float32"
            if not all(bool(term.values.isfinite().all()) for term in terms):
                hint = "correct the adapter's values, some of which are not finite"
            raise MergeError(
                f"{self.owner.name}: expected finite merged entries, found {bad} that are not; "
                f"{hint}; nothing was merged"
            )

    # Writing.

    @torch.compiler.disable
    def sync(self, force: bool = False) -> None:
        """Make the parameter hold what is to be seen; under a waiting graph only by ``force``."""
        parameter, is_recorded = self.known, self._is_recorded()
        if parameter is None or parameter is not self.owner.parameter or parameter.is_meta:
            return
        with _writing, raw():
            terms = self._terms = self._list_terms(parameter)
            state = _describe(parameter, terms)
            if state is None or state != self._state or self._held is not self._unite(terms):
                self._update(parameter, terms, force, is_recorded)
                self._state = state
            self._dress_as_needed(parameter, terms)

    def begin_forward(self) -> None:
        """Note whether autograd records the forward of the model that begins, and sync."""
        self._is_training = torch.is_grad_enabled()
        self.sync()

    def end_forward(self) -> None:
        """Let whoever reads the parameter outside of a forward see what its own mode asks for."""
        self._is_training = False

    def sync_compiled(self) -> None:
        """Let a base that is to be trained hold its own entries, and else leave all to copies."""
        # Rarely: this ends a graph that is being compiled.
        if self._held is not None and self.owner.parameter.requires_grad:
            self.sync()
        elif torch.compiler.is_exporting():
            self._sync_exported()

    @torch._dynamo.assume_constant_result
    def _sync_exported(self) -> None:
        """Write entries that an exporter will read from memory, though it traces other tensors."""
        # The layers' own values and indices may be such tensors too.
        parameter, terms = self.known, self._terms
        if parameter is None or parameter.is_meta or parameter.requires_grad or terms is None:
            return
        with _disable_current_modes(), torch._C.DisableTorchFunction(), _writing, raw():
            self._update(parameter, terms, force=False, is_recorded=False)
            self._dress_as_needed(parameter, terms)

    @torch.compiler.disable
    def show_base(self, force: bool = False) -> None:
        """Put the base's own entries back; under a waiting graph only by ``force``."""
        parameter = self.known
        if parameter is not None and self._held is not None:
            with _writing, raw():
                if force or not self.is_waited_for():
                    self._restore(parameter)
                self._terms = self.owner.terms()
                self._dress_as_needed(parameter, self._terms)

    def hidden_base(self) -> Tensor | None:
        """Copy the base's weight where entries of adapters had to stay in its place."""
        parameter = self.known
        if parameter is None or self._held is None:
            return None
        with raw():
            return self._copy(parameter)

    def watch(self) -> None:
        """Be asked by whoever reads the parameter, until the next :meth:`sync`."""
        if self.known is not None and self.owner.terms():
            _dress(self, self.known)

    def let_go(self) -> None:
        """Make the parameter a plain one, with what it holds."""
        if self.known is not None:
            _undress(self.owner.module, self.known)

    def prepare_to_move(self) -> None:
        """Hold what is to be seen, in memory of its own if a graph needs what is held."""
        parameter = self.known
        if parameter is not None and not parameter.is_meta and self.is_waited_for():
            with _writing, raw():
                terms = self.owner.terms()
                union, entries = self._wanted(parameter, terms, is_recorded=True)
                if not self._holds(parameter, union, entries):
                    parameter.data = self._copy(parameter, union, entries)
                    self._held, self._state, self._marks = union, None, []

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow ``model.to(...)`` and the like to another device."""
        self._state = self._terms = None
        if self._held is not None:
            parts, indices, originals, positions = self._held
            self._held = Union(
                tuple(move(part, fn) for part in parts),
                move(indices, fn),
                move(originals, fn),
                tuple(move(position, fn) for position in positions),
            )
            self._union = self._held

    def is_waited_for(self) -> bool:
        """Tell whether an autograd graph still needs what the parameter holds."""
        self._marks = [mark for mark in self._marks if mark() is not None]
        return bool(self._marks)

    def _update(
        self, parameter: nn.Parameter, terms: Sequence[Term], force: bool, is_recorded: bool
    ) -> None:
        if parameter.requires_grad:
            terms = ()  # the base is trained: an optimizer must find its own entries
        union, entries = self._wanted(parameter, terms, is_recorded)
        if not self._holds(parameter, union, entries) and (force or not self.is_waited_for()):
            self._put(parameter, union, entries)

    def _list_terms(self, parameter: Tensor) -> list[Term]:
        """List what is to be seen, on top of what a base is once its training is over."""
        if self._trained_base and not parameter.requires_grad:
            self._take_originals()
        return self.owner.terms()

    @torch.compiler.disable
    def _take_originals(self) -> None:
        self._trained_base = False
        self.owner.take_originals()

    def _put(self, parameter: Tensor, union: Union | None, entries: Tensor | None) -> None:
        if self._held is not None and self._held is not union:
            self._restore(parameter)
        if union is not None and entries is not None:
            write(parameter, union.indices, entries)
            self._held = union

    def _restore(self, parameter: Tensor) -> None:
        assert self._held is not None
        write(parameter, self._held.indices, self._held.originals)
        self._held = self._state = None

    def _holds(self, parameter: Tensor, union: Union | None, entries: Tensor | None) -> bool:
        if self._held is not union:
            return False
        if union is None or entries is None:
            return True
        return same_bits(gather(parameter, union.indices), entries)

    def _dress_as_needed(self, parameter: nn.Parameter, terms: Sequence[Term]) -> None:
        is_other = (self._held is None) != (not terms) or self.is_waited_for()
        if is_other or any(term.values.requires_grad for term in terms):
            _dress(self, parameter)
        else:
            _undress(self.owner.module, parameter)

    # Reading.

    @torch.compiler.disable
    def read(self, parameter: nn.Parameter) -> Reading:
        """Return what an operation is to use in place of the parameter."""
        self.owner.check_active()
        if parameter is not self.known:  # while it is being sharded
            return Reading(parameter)
        with _writing, untraced():
            terms = self._list_terms(parameter)
            if parameter.requires_grad and terms:
                return Reading(self._read_trained_base(parameter, terms))
            union, entries = self._wanted(parameter, terms, self._is_recorded())
            if in_transform():
                return Reading(self._copy(parameter, union, entries))
            if not self._holds(parameter, union, entries):
                if self.is_waited_for():
                    return Reading(self._copy(parameter, union, entries))
                with raw():
                    self._put(parameter, union, entries)
            if union is None or entries is None or not entries.requires_grad:
                return Reading(parameter)
            mark = torch.empty(0)
            self._marks.append(weakref.ref(mark))
            if self._lines is None or self._lines[0] is not union:  # once: on a GPU it waits
                self._lines = union, find_lines(union.indices, parameter.shape)
            return Reading(parameter, entries, union.indices, mark, self._lines[1])

    def _read_trained_base(self, parameter: nn.Parameter, terms: Sequence[Term]) -> Tensor:
        """Change a copy of a base that is trained beside its adapters; both get their gradient."""
        if self._held is not None:
            with raw():
                self._restore(parameter)
        return self._change_trained_base(parameter, terms)

    def _change_trained_base(self, parameter: Tensor, terms: Sequence[Term]) -> Tensor:
        self._trained_base = True
        flat = parameter.flatten()
        for term in terms:
            entries = add_rounded(flat.index_select(0, term.indices), term.values, term.scale)
            flat = flat.index_copy(0, term.indices.long(), entries)
        return flat.view(parameter.shape)

    def _is_recorded(self) -> bool:
        # What a forward notes says nothing where it is compiled, which may leave out a hook.
        if torch.compiler.is_compiling():
            return torch.is_grad_enabled()
        # Reentrant checkpointing runs layers without gradients, within a forward that has them.
        return self._is_training or torch.is_grad_enabled() or in_transform()

    def _wanted(
        self, parameter: Tensor, terms: Sequence[Term], is_recorded: bool
    ) -> tuple[Union | None, Tensor | None]:
        union = self._unite(terms)
        return union, None if union is None else self._add(parameter, union, terms, is_recorded)

    def _copy(
        self, parameter: Tensor, union: Union | None = None, entries: Tensor | None = None
    ) -> Tensor:
        """Copy the base's weight, and put entries into the copy."""
        flat, held = parameter.detach().flatten(), self._held
        if held is not None and held is not union:
            flat = flat.index_copy(0, held.indices.long(), held.originals.to(flat.dtype))
        if union is not None and entries is not None:
            flat = flat.index_copy(0, union.indices.long(), entries)
        return flat.view(parameter.shape)

    def _unite(self, terms: Sequence[Term]) -> Union | None:
        parts, union = tuple(term.originals for term in terms), self._union
        if not parts:
            return None
        # By identity: an adapter may have been replaced by another of its name.
        if union is not None and _are_same(union.parts, parts):
            return union
        if len(terms) == 1:
            self._union = Union(parts, terms[0].indices, parts[0], ())
            return self._union
        with torch.inference_mode(False), torch.no_grad():
            indices = torch.cat([term.indices for term in terms]).unique()
            positions = tuple(torch.searchsorted(indices, term.indices) for term in terms)
            originals = torch.empty(indices.shape, dtype=parts[0].dtype, device=indices.device)
            for position, part in zip(positions, parts, strict=True):
                originals[position] = part.to(originals.dtype)
        self._union = Union(parts, indices, originals, positions)
        return self._union

    def _add(
        self, parameter: Tensor, union: Union, terms: Sequence[Term], is_recorded: bool
    ) -> Tensor:
        """Add the terms' values one after the other in float32, and round once."""
        total = union.originals.float()
        if len(terms) == 1:
            total = total + terms[0].values.float() * terms[0].scale
        else:
            for term, positions in zip(terms, union.positions, strict=True):
                total = total.index_add(0, positions, term.values.float() * term.scale)
        # Entries are those of the merged checkpoint, whatever dtype the base is loaded in. Steps of
        # training don't round to it: updates below half a unit would be lost.
        if not (is_recorded and any(term.values.requires_grad for term in terms)):
            total = total.to(union.originals.dtype)
        return total.to(parameter.dtype)


def _dress(selection: Selection, parameter: nn.Parameter) -> None:
    """Have whatever reads a parameter ask its selection first."""
    if type(parameter) is not Patched:
        parameter.__class__ = Patched
        parameter.__dict__["selection"] = selection
        _renew(selection.owner.module)
    parameter.__dict__["selection"] = selection


def _undress(module: nn.Module, parameter: nn.Parameter) -> None:
    if type(parameter) is Patched:
        del parameter.__dict__["selection"]
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        _renew(module)


def _renew(module: nn.Module) -> None:
    # torch.compile looks at a module's parameters again only if their dictionary changes.
    names = module.__dict__.get("_parameters", {})  # none yet while unpickling
    places = list(names.items())
    names.clear()
    names.update(places)


def _describe(parameter: Tensor, terms: Sequence[Term]) -> tuple | None:
    """Describe frozen values; None where only comparing entries tells if they changed."""
    # Optimizers may write values behind autograd's back (fused kernels, ``.data``), so of values
    # that are being trained the version counters say too little.
    if any(term.values.requires_grad or term.values.is_inference() for term in terms):
        return None
    values = [(term.scale, term.values.data_ptr(), term.values._version) for term in terms]
    return parameter.dtype, parameter.data_ptr(), parameter.requires_grad, *values


def _are_same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
