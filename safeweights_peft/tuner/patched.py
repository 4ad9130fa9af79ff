"""A parameter's class while it is trained, or shows other entries than it holds.

Whoever reads the parameter gets an alias, whose backward gathers the selected gradient and drops
the dense one at once; so memory is that of LoRA. No module is wrapped: what reads a child's weight
without calling the child gets the same.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from safeweights_peft.tuner.sampled import Lines, can_sample, sampled_linear


class Reading(NamedTuple):
    """A weight for one operation; with entries, if these are to get its gradient."""

    weight: Tensor
    entries: Tensor | None = None
    indices: Tensor | None = None
    mark: Tensor | None = None  # lives as long as the graph of the operation
    lines: Lines | None = None  # that the entries fill

    @torch.compiler.disable
    def alias(self) -> Tensor:
        """Return the weight, with a gradient where there are entries to get it."""
        if self.entries is None:
            return self.weight
        return _Alias.apply(self.entries, self.weight, self.indices, self.mark)


class Source(Protocol):
    """Whom a parameter asks what an operation is to use in its place."""

    def read(self, parameter: nn.Parameter) -> Reading:
        """Return a weight for one operation."""

    def changed(self, parameter: Tensor, needs_copy: bool = False) -> Tensor | None:
        """Return a changed copy."""


class _Alias(torch.autograd.Function):
    """An alias of a parameter that holds entries; its gradient goes to the entries."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, parameter: Tensor, indices: Tensor, mark: Tensor):
        # Indices are a plain attribute: DDP writes the (same) buffers before each forward, which
        # autograd would take for a change. Saved tensors, and so the mark, die with the graph.
        ctx.indices = indices
        ctx.save_for_backward(mark)
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        # Asking for them refuses a second backward, where the first has freed the graph.
        _ = ctx.saved_tensors
        return gradient.reshape(-1).index_select(0, ctx.indices), None, None, None


_METHODS = (
    *("detach", "requires_grad_", "retain_grad", "register_hook", "share_memory_", "type"),
    *("register_post_accumulate_grad_hook", "__reduce_ex__", "__deepcopy__", "__setstate__"),
    *("size", "stride", "dim", "ndimension", "numel", "nelement", "element_size", "data_ptr"),
    *("get_device", "storage_offset", "untyped_storage", "storage", "__hash__", "__len__"),
)


def _find_raw() -> Iterator[Any]:
    """List what reads no entry of a tensor, or the tensor itself in place of its entries."""
    for name in dir(Tensor):
        member = inspect.getattr_static(Tensor, name)
        is_attribute = inspect.isdatadescriptor(member)
        if is_attribute and name not in ("T", "mT", "H", "mH", "real", "imag"):
            yield from (getattr(member, f"__{verb}__") for verb in ("get", "set", "delete"))
        elif name in _METHODS or name.startswith(("is_", "_is_")):
            yield getattr(Tensor, name)


_RAW = set(_find_raw())


class Patched(nn.Parameter):
    """A parameter whose entries come from :meth:`Source.read`, for whatever reads them."""

    # The class is set in place, as torch does for UninitializedParameter: whoever holds the
    # parameter, an optimizer or a tied module, goes on to hold it.

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Hand out what an operation is to use in place of the parameter."""
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_dynamo_compiling():  # first: the rest can't be compiled
                return func(*tree_map(_read, tuple(args)), **tree_map(_read, kwargs))
            if func in _RAW:
                return func(*args, **kwargs)
            if func is F.linear and (result := _sampled(*args, **kwargs)) is not None:
                return result
            # What an operation writes is the parameter itself, not a copy of it.
            name = getattr(func, "__name__", "")
            written = int(name.endswith("_") and not name.endswith("__"))
            out = {"out": kwargs.pop("out")} if "out" in kwargs else {}
            args = (*args[:written], *tree_map(_read, tuple(args[written:])))
            return func(*args, **tree_map(_read, kwargs), **out)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Copy what it holds; the copy's own selection, if copied along, makes it Patched."""
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                data = self.detach().clone(memory_format=torch.preserve_format)
            memo[id(self)] = nn.Parameter(data, self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle what it holds, as a plain parameter; see :meth:`__deepcopy__`."""
        with torch._C.DisableTorchFunctionSubclass():
            return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


def in_transform() -> bool:
    """Tell whether torch.func transforms what runs, or derivatives are carried forward."""
    # Both attach what they need to tensors, and don't see what is written into a parameter.
    stack = torch._C._functorch.peek_interpreter_stack()
    return stack is not None or forward_ad._current_level >= 0


def _read(item: Any) -> Any:
    selection = _selection_of(item)
    if selection is None:
        return item
    if torch.compiler.is_dynamo_compiling():
        return selection.changed(item, needs_copy=True)
    return selection.read(item).alias()


def _selection_of(item: Any) -> Source | None:
    """Find what a parameter asks; None for one that was made from it, as accelerate does."""
    return getattr(item, "selection", None) if type(item) is Patched else None


def _sampled(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Compute a linear layer whose gradient is sampled; None where a dense one is faster."""
    selection = _selection_of(weight)
    if selection is None:
        return None
    # Autocast computes in another dtype than it is given.
    if input.dtype is not weight.dtype or torch.is_autocast_enabled(input.device.type):
        return None
    reading = selection.read(weight)
    entries, indices, mark, lines = reading[1:]
    if entries is None or not (lines or can_sample(reading.weight, len(entries))):
        return F.linear(_read(input), reading.alias(), _read(bias))
    assert indices is not None
    assert mark is not None
    return sampled_linear(_read(input), entries, _read(bias), reading.weight, indices, mark, lines)
