"""The hook on the model itself: before each forward, every parameter is what it is to be."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safeweights_peft.errors import ModelError, UnsupportedFeatureError
from safeweights_peft.tuner.entries import same_bits, untraced
from safeweights_peft.tuner.layer import SafeWeightsLayer
from safeweights_peft.tuner.patched import in_transform

NAME = "safeweights"
"""The name of the root among the model's children."""


class Root(nn.Module):
    """A child of the model that knows all layers; it has no tensors, and nobody calls it."""

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[SafeWeightsLayer] = []  # in a list: not as children
        self._handles: list[RemovableHandle] = []
        self._sums: list[int] = []  # of frozen values' bits, when they were last looked at
        self._is_paused = False
        self._modes: list[bool] = []  # of all modules, training or not, in the last forward
        self._seen: set[str] = set()  # layers that a forward in these modes left alone
        self._refusal = ""  # of a forward that changed weights, which have been others since
        # By thread, for a forward may call itself, and several threads a model.
        self._depths: dict[int, int] = {}
        self._watched: dict[int, list[tuple[SafeWeightsLayer, list[tuple[str, float]], Tensor]]]
        self._watched = {}

    @classmethod
    def of(cls, model: nn.Module) -> "Root":
        """Find the model's, or make it a part of the model."""
        root = model._modules.get(NAME)
        if not isinstance(root, cls):
            root = cls()
            model.add_module(NAME, root)
            root.__dict__["_model"] = model
            hook = root.before_forward
            root._handles = [
                model.register_forward_pre_hook(hook, with_kwargs=True),
                model.register_forward_hook(root.after_forward, always_call=True),
            ]
        return root

    def forward(self, input: Any = None) -> Any:
        """Return the input: a model may be a Sequential."""
        return input

    @property
    def model(self) -> Any:
        """The model that this is a part of."""
        return self.__dict__["_model"]

    @property
    def layers(self) -> Sequence[SafeWeightsLayer]:
        """All layers of the model."""
        return self._layers

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other tensors stand in the parameters' places."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def add(self, layer: SafeWeightsLayer) -> None:
        """Look after a layer."""
        self._layers.append(layer)

    def detach(self) -> None:
        """Leave the model, with all layers."""
        for layer in self._layers:
            layer.detach()
        for handle in self._handles:
            handle.remove()
        del self.model._modules[NAME]

    def before_forward(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Bring all parameters up to date, and refuse those that were replaced."""
        if self._is_paused:
            return
        if torch.compiler.is_compiling():
            for layer in self._layers:
                layer.selection.sync_compiled()
            return
        thread = threading.get_ident()
        self._depths[thread] = self._depths.get(thread, 0) + 1
        with untraced():
            self._refresh(model, args, kwargs)

    @torch.compiler.disable  # where a graph ends in these hooks, the rest of them is not compiled
    def _refresh(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if model is not self.model and torch.is_grad_enabled():
            _refuse_replica(self._layers)
        if self._refusal:
            raise ModelError(self._refusal)
        is_on_meta = _are_on_meta([*args, *kwargs.values()])
        for layer in self._layers:
            if layer.sharded is not None:
                layer.sharded.was_used = False
            else:
                _check_parameter(layer, is_on_meta)
            layer.check_active()
        if in_transform():
            for layer in self._layers:
                layer.selection.watch()
            return
        is_first = not _continues(kwargs)
        if is_first:
            self._compare_values()
        for layer in self._layers:
            layer.selection.begin_forward()
        if is_first:
            self._watch()

    def _watch(self) -> None:
        """Note what parameters hold before the first forward in the modes that modules are in."""
        modes = [module.training for module in self.model.modules()]
        if modes != self._modes:
            self._modes, self._seen = modes, set()
        if len(self._seen) == len(self._layers):
            return
        watched = self._watched.setdefault(threading.get_ident(), [])
        if watched:  # by the forward that calls this one
            return
        watched.extend(
            (layer, _list_shown(layer), layer.sample())
            for layer in self._layers
            if layer.name not in self._seen
            and layer.sharded is None
            and not layer.lacks_data()
            # Else entries may be written as soon as the graph is freed, in this forward.
            and not layer.selection.is_waited_for()
        )

    def after_forward(self, model: nn.Module, args: Sequence[Any], output: Any) -> None:
        """Refuse what a forward did that leaves the patch unseen, or weights that are others."""
        if torch.compiler.is_compiling() or self._is_paused:
            return
        thread = threading.get_ident()
        self._depths[thread] = self._depths.get(thread, 1) - 1
        watched: list[Any] = []
        if self._depths[thread] <= 0:
            del self._depths[thread]
            watched = self._watched.pop(thread, [])
            for layer in self._layers:
                layer.selection.end_forward()
        if output is None:  # it failed
            return
        for layer in self._layers:
            # Its module was not called, though the parameter may have been read.
            if layer.sharded is not None and not layer.sharded.was_used:
                raise UnsupportedFeatureError(
                    f"{layer.name}: expected a sharded parameter whose module is called, found one "
                    "that something else may read; train on one device or by DDP, or select no "
                    "entries there"
                )
        if not in_transform():
            with untraced():
                self._refuse_writing(watched)

    @torch.compiler.disable
    def _refuse_writing(self, watched: Sequence[Any]) -> None:
        """Refuse a forward that changes weights, as RWKV's does when it is first evaluated."""
        for layer, shown, before in watched:
            # A hook, or another thread, may have chosen other adapters meanwhile.
            if _list_shown(layer) != shown:
                continue
            if not same_bits(layer.sample(), before):
                self._refusal = (
                    f"{layer.name}: expected a forward that leaves weights alone, found one that "
                    "changes them; load the base anew, of RWKV with rescale_every=0, or merge the "
                    "adapter into the checkpoint"
                )
                raise ModelError(self._refusal)
            self._seen.add(layer.name)

    def _compare_values(self) -> None:
        """Note frozen values that changed behind autograd's back, as through ``.data``."""
        sums = _sums_of_bits(self._layers)
        if len(sums) == len(self._sums):
            for layer, now, before in zip(self._layers, sums, self._sums, strict=True):
                if now != before:
                    layer.selection.forget()
        else:
            for layer in self._layers:
                layer.selection.forget()
        self._sums = sums


def _list_shown(layer: SafeWeightsLayer) -> list[tuple[str, float]]:
    return [(term.adapter, term.scale) for term in layer.terms()]


def _sums_of_bits(layers: Sequence[SafeWeightsLayer]) -> list[int]:
    """Sum the bits of the values that each layer shows, all with one wait for the device."""
    sums = []
    for layer in layers:
        # Trained ones are compared in any case, and nothing is written where it is sharded.
        terms = [] if layer.sharded is not None else layer.terms()
        total = torch.zeros((), dtype=torch.int64)
        for term in terms:
            if not term.values.requires_grad:
                # By place: else as many signs that turn up as down would leave the sum as it was.
                bits = term.values.view(torch.int32).long() * ~term.indices
                total = total.to(bits.device) + bits.sum()
        sums.append(total)
    if not sums:
        return []
    device = sums[0].device
    return torch.stack([total.to(device) for total in sums]).tolist()


def _continues(kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call goes on with a sequence, whose first call has compared all values."""
    past = kwargs.get("past_key_values")
    length = getattr(past, "get_seq_length", None)
    return length is not None and bool(length() > 0)


def _are_on_meta(inputs: Sequence[Any]) -> bool:
    return all(tensor.is_meta for tensor in inputs if isinstance(tensor, Tensor))


def _check_parameter(layer: SafeWeightsLayer, is_on_meta: bool) -> None:
    known = layer.selection.known
    found = [getattr(module, own, None) for module, own in layer.holders]
    parameter = found[0]
    # Engines that offload replace the parameter when its module runs, which is too late for us.
    if isinstance(parameter, Tensor) and parameter.is_meta and not is_on_meta:
        raise UnsupportedFeatureError(
            f"{layer.name}: expected a parameter in memory, found one that is offloaded; "
            "load the model without offloading, or merge the adapter into the checkpoint"
        )
    # FSDP1 trains views of another tensor, DeepSpeed has parameters without a shape.
    if known is not None and all(parameter is known for parameter in found):
        if not hasattr(known, "_fsdp_flattened") and known.numel() == layer.numel:
            return
    raise ModelError(
        f"{layer.name}: expected the parameter that the adapter was loaded for, found another; "
        "load the adapter after parameters are replaced or untied, and to train on several "
        "devices use DDP or FSDP2 (fsdp_version 2), not FSDP1, DataParallel or DeepSpeed ZeRO-3"
    )


def _refuse_replica(layers: Sequence[SafeWeightsLayer]) -> None:
    for layer in layers:
        if layer.is_trained:
            raise ModelError(
                f"{layer.name}: expected the model that the adapter was loaded into, found a "
                "replica of it, which trains nothing; use DDP rather than DataParallel"
            )
