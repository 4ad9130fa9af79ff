"""A check at an adapter's first use: does the model see its entries, and do they get a gradient?

One short row tells. Its logits must be those of copies of the parameters that hold the same
entries: then whatever computes with a parameter asks the model for it, and keeps none of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from safeweights_peft.data import Batching, Example, Layout, collate
from safeweights_peft.errors import ModelError
from safeweights_peft.freeze import FrozenEntries, make_switch
from safeweights_peft.modeling.answers import (
    NOISE_FACTOR,
    answer_logits,
    make_probe,
    measure_gaps,
    measure_noise,
    without_dropout,
)
from safeweights_peft.tuner.beside import Indices
from safeweights_peft.tuner.entries import same_bits
from safeweights_peft.tuner.layer import SafeWeightsLayer
from safeweights_peft.tuner.root import Root

GROUP_BYTES = 1 << 30  # of copies that are in memory at once
# The gap of gradients that is still rounding, in roots of the dtype's precision: 2e-4, 0.02 or 0.04
# where the logits are the same bits. Tiny models of 14 kinds show at most 5e-7, 4e-4 and 5e-3; a
# bfloat16 SmolLM2 whose tied embedding loses one of its two uses, 0.2.
GRADIENT_NOISE = 0.5
_ELSEWHERE = "select no entries there, or merge the adapter into the checkpoint"


def check_adapter(model: nn.Module) -> None:
    """Check that a model computes with its active adapters what it computes with them merged.

    Where values are trained, each that the logits depend on must get the gradient of a merged
    weight. The row is short and costs three forward and two backward passes. The model, its
    gradients, buffers and random states stay as they were.

    Args:
        model: A causal language model of transformers with safety patches, wrapped or not.

    Raises:
        ModelError: The model computes with something else than a parameter's patched entries, or
            gives them no gradient or a wrong one; the message names the parameter.

    Example:
        >>> from safeweights_peft import check_adapter, load_model
        >>> check_adapter(load_model("demo/base", "demo/run/patch", merge=False))
    """
    root = next((module for module in model.modules() if isinstance(module, Root)), None)
    if root is None:
        raise ModelError("model: expected one with a safety patch, found none; load one into it")
    for layer in root.layers:
        layer.check_active()
    # Modules of sharded parameters run on such copies anyway, and the root refuses others; FSDP2
    # gathers them for a call of what it wraps alone, not for one of the model inside.
    if any(layer.sharded is not None for layer in root.layers):
        return
    shown = {layer.name: layer for layer in root.layers if layer.terms()}
    makers, trained = {}, {}
    for name, layer in shown.items():
        makers[name] = partial(layer.selection.changed, layer.parameter)
        trained[name] = [term.values for term in layer.terms() if term.values.requires_grad]
    _refuse_shared_memory(root.model, [name for name, values in trained.items() if values])
    with _undisturbed(root.model):
        row = _Row(root.model, root.paused, any(trained.values()))
        _Check(row, makers, partial(_moved, shown.values()), trained).run()


def _refuse_shared_memory(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to train a parameter that another one reads past autograd."""
    # No run shows it: copies that stand for one leave the entries in the other's memory.
    owners = {model.get_parameter(name).data_ptr(): name for name in names}
    for other, parameter in model.named_parameters():
        name = owners.get(parameter.data_ptr()) if parameter.numel() else None
        if name is not None and parameter is not model.get_parameter(name):
            raise ModelError(
                f"{name}: expected a parameter with memory of its own, found that of {other}, "
                "which would train nothing; make them one parameter, as model.tie_weights() does, "
                "before the adapter is loaded"
            )


def check_in_place(model: PreTrainedModel, places: Sequence[FrozenEntries]) -> None:
    """Check that a model without an adapter sees entries that are written into its parameters."""
    moved = [(entries, entries.originals + _moves(entries.originals)) for entries in places]

    makers = {entries.name: partial(_copy, entries, values) for entries, values in moved}
    with _undisturbed(model):
        _Check(_Row(model), makers, make_switch(model, moved), {}).run()


def _copy(entries: FrozenEntries, values: Tensor) -> Tensor:
    parameter, indices = entries.parameter.detach(), entries.indices.long()
    return parameter.flatten().index_copy(0, indices, values).view(parameter.shape)


Makers = Mapping[str, Callable[[], Any]]
"""Functions that make a copy of a parameter with its patched entries, by the parameter's name."""

Gradients = dict[str, list[Tensor | None]]
"""Of the values that are trained in a parameter, by its name."""


class _Row(nn.Module):
    """The logits of a short row, as a module, so that copies can stand in parameters' places."""

    def __init__(
        self,
        model: PreTrainedModel,
        pause: Callable[[], AbstractContextManager[None]] = nullcontext,
        is_trained: bool = False,
    ) -> None:
        super().__init__()
        self.model, self._pause, self._is_trained = model, pause, is_trained
        _, longest = make_probe(model.config.get_text_config().vocab_size)
        tokens = longest.prompt_ids + longest.answer_ids
        example = Example(tokens[:1], tokens[1:])
        self._batch = collate([example], tokens[0], Layout(Batching.ALONE)).to(model.device)

    def forward(self) -> Tensor:
        return answer_logits(self.model, self._batch)

    def run(
        self,
        makers: Makers | None = None,
        trained: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    ) -> tuple[Tensor, Gradients]:
        """Compute the logits, with copies if given, and the gradients of what is trained."""
        values = [value for own in trained.values() for value in own]
        # In all runs alike: entries are rounded otherwise where autograd doesn't record.
        with self._fork_rng(), torch.set_grad_enabled(self._is_trained):
            if makers is None:
                logits = self()
            else:
                copies = {f"model.{name}": make() for name, make in makers.items()}
                with self._pause():
                    logits = functional_call(self, copies, ())
            gradients: Sequence[Tensor | None] = [None] * len(values)
            if values and logits.requires_grad:
                loss = F.cross_entropy(logits[0], self._batch.answer_ids[0])
                # Not `backward`, which would leave gradients behind, and call DDP's hooks.
                gradients = torch.autograd.grad(loss, values, allow_unused=True)
        rest = iter(gradients)
        return logits.detach(), {name: [next(rest) for _ in trained[name]] for name in trained}

    def _fork_rng(self) -> AbstractContextManager[None]:
        """Let each run draw the same, if a model draws at all, and leave no trace."""
        device = self.model.device
        if device.type == "cpu":
            return torch.random.fork_rng([])
        return torch.random.fork_rng([device], device_type=device.type)

    @cached_property
    def noise(self) -> float:
        """The gap of logits that is still rounding."""
        with self._fork_rng():
            return measure_noise(self.model)

    def differs(self, found: Tensor, expected: Tensor) -> bool:
        """Tell whether logits are others, and not by rounding alone."""
        # Usually the same bits; but some kernels round by where in memory a weight stands.
        return not same_bits(found, expected) and not _measure_gap(found, expected) <= self.noise


class _Check:
    """A comparison of a patched model with one that has copies in place of its parameters."""

    def __init__(
        self,
        row: _Row,
        makers: Makers,
        moved: Callable[[], AbstractContextManager[object]],
        trained: Mapping[str, Sequence[Tensor]],
    ) -> None:
        self.row, self.makers, self.trained = row, makers, trained
        self.moved = moved  # a context in which entries are others, seen by model and makers

    def run(self) -> None:
        """Raise an error that names a parameter, unless all is right."""
        self.row.run()  # what a model makes of its weights once, it makes now, of the true ones
        ignored: Sequence[str] = ()
        with self.moved():
            active, gradients = self.row.run(None, self.trained)
            for names in _group(self.row.model, list(self.makers)):
                logits, expected = self.row.run(
                    {name: self.makers[name] for name in names},
                    {name: self.trained[name] for name in names if name in self.trained},
                )
                if self.row.differs(logits, active):
                    ignored = names
                    break
                limit = GRADIENT_NOISE * torch.finfo(self.row.model.dtype).eps ** 0.5
                if not same_bits(logits, active):  # then gradients differ by rounding as well
                    limit = max(limit, NOISE_FACTOR * _measure_gap(logits, active))
                for name in expected:
                    for pair in zip(gradients[name], expected[name], strict=True):
                        _check_gradient(name, *pair, limit)
            else:
                self._check_the_rest(active, gradients)
        if ignored:
            raise ModelError(
                f"{_find(ignored, self._is_ignored)}: expected the logits of the merged weight, "
                "found others: the model computes with a copy or a view of the parameter, or "
                f"changes it; {_ELSEWHERE}"
            )

    def _is_ignored(self, names: Sequence[str]) -> bool:
        makers = {name: self.makers[name] for name in names}
        # From the start: a model may keep what it made in the last run, for each tensor.
        self.row.run(makers)
        self.row.run()
        with self.moved():
            active, _ = self.row.run()
            found, _ = self.row.run(makers)
        return self.row.differs(found, active)

    def _check_the_rest(self, active: Tensor, gradients: Gradients) -> None:
        """Check parameters without a gradient, and those of which there is a copy."""

        def is_read(names: Sequence[str]) -> bool:
            others = {name: lambda make=self.makers[name]: 1 - make() for name in names}
            return self.row.differs(self.row.run(others)[0], active)

        def is_used(tensor: Tensor) -> bool:
            with torch.inference_mode(tensor.is_inference()):
                before, tensor.data = tensor.data, tensor.data + 1
            try:
                return self.row.differs(self.row.run()[0], active)
            finally:
                with torch.inference_mode(tensor.is_inference()):
                    tensor.data = before

        # An expert that the row isn't sent to has none either, but then the logits don't change.
        silent = [name for name, own in gradients.items() if any(one is None for one in own)]
        for names in _group(self.row.model, silent):
            if is_read(names):
                raise _no_gradient(_find(names, is_read))
        kept = list(_list_kept(self.row.model))
        for name in self.makers:
            parameter = self.row.model.get_parameter(name).detach()
            alike = [(place, tensor) for place, tensor in kept if _is_copy(tensor, parameter)]
            if not alike or is_read([name]):
                continue
            # A bias of zeros is like any buffer of zeros, also where the row reads neither.
            if used := next((place for place, tensor in alike if is_used(tensor)), None):
                raise ModelError(
                    f"{name}: expected a model that computes with it, found one that computes with "
                    f"{used}, a copy that doesn't follow; {_ELSEWHERE}"
                )


def _measure_gap(found: Tensor, expected: Tensor) -> float:
    return float(measure_gaps(found, expected).max())


def _check_gradient(name: str, found: Tensor | None, expected: Tensor | None, limit: float) -> None:
    if expected is None or not expected.any() or not expected.isfinite().all():
        return  # such as that of an expert which the row isn't sent to
    if found is None:
        raise _no_gradient(name)
    gap = float((found - expected).norm() / expected.norm())
    if not gap <= limit:
        raise ModelError(
            f"{name}: expected the gradient of the merged weight, found one that is off by "
            f"{gap:.2g} of it: something reads the parameter past autograd; {_ELSEWHERE}"
        )


def _no_gradient(name: str) -> ModelError:
    return ModelError(
        f"{name}: expected a gradient, as the logits depend on it, found none: something, such as "
        "a fused kernel, reads the parameter past autograd; select no entries there, or switch "
        "that kernel off"
    )


def _group(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Group parameters whose copies are in memory at once."""
    group: list[str] = []
    size = 0
    for name in names:
        parameter = model.get_parameter(name)
        own = parameter.numel() * parameter.element_size()
        if group and size + own > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield group


def _find(names: Sequence[str], has: Callable[[Sequence[str]], bool]) -> str:
    """Find one of names, that together have a property, that has it by itself."""
    while len(names) > 1:
        half = names[: len(names) // 2]
        names = half if has(half) else names[len(half) :]
    return names[0]


def _list_kept(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List what modules keep beside parameters: buffers and attributes, and where they are."""
    for path, module in model.named_modules():
        if not isinstance(module, Indices | Root | SafeWeightsLayer):
            for name, kept in {**module._buffers, **vars(module)}.items():
                for leaf in tree_leaves(kept) if name != "_buffers" else ():
                    if type(leaf) is Tensor and leaf.is_floating_point() and not leaf.is_meta:
                        yield f"{path}.{name}", leaf


def _is_copy(tensor: Tensor, parameter: Tensor) -> bool:
    """Tell whether a tensor holds what a parameter does, transposed perhaps, but for entries."""
    if tensor.numel() != parameter.numel():
        return False
    if tensor.shape != parameter.shape:
        tensor = tensor.T if tensor.ndim == 2 else tensor
        tensor = tensor.reshape(parameter.shape)
    same = tensor.to(parameter) == parameter
    return bool(same.float().mean() > 0.5)


def _moves(originals: Tensor, scale: float = 1.0) -> Tensor:
    """Choose by how much values move entries for a check: by as much as these are, up and down."""
    size = float(originals.float().abs().mean()) or 0.01
    signs = 1 - 2 * (torch.arange(originals.numel(), device=originals.device) % 2)
    return signs.to(originals.dtype) * (size / (scale or 1.0))


@contextmanager
def _moved(layers: Iterable[SafeWeightsLayer]) -> Iterator[None]:
    """Move values for a while: those that are yet to be trained are zeros, which show nothing."""
    layers, before = list(layers), []
    try:
        for layer in layers:
            for term in layer.terms():
                values = term.values.detach()
                before.append((values, values.clone()))
                with torch.inference_mode(values.is_inference()):
                    values.add_(_moves(term.originals.float(), term.scale))
            layer.selection.sync()
        yield
    finally:
        for values, saved in before:
            with torch.inference_mode(values.is_inference()):
                values.copy_(saved)
        for layer in layers:
            layer.selection.sync()


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Run a model as in evaluation, and leave modes and buffers as they are."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if not isinstance(module, Indices | Root)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.inference_mode(False), torch.no_grad(), without_dropout(model):
            yield
    finally:
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)
