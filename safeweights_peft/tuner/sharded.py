"""Adapters of sharded parameters (FSDP2): their modules run on changed copies of the whole ones."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.hooks import RemovableHandle

from safeweights_peft.tuner.parameter import Selection


class Sharded:
    """Hooks on the modules that hold a parameter which exists whole only around a forward."""

    def __init__(self, selection: Selection, holders: Sequence[tuple[nn.Module, str]]) -> None:
        self.was_used = True  # in the last forward of the model
        self._selection = selection
        self._whole: dict[nn.Module, Tensor | None] = {}  # parameters that stand aside
        self._handles: list[RemovableHandle] = []
        for module, own in holders:
            before, after = partial(self.swap_in, own), partial(self.swap_out, own)
            self._handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True),
            ]

    def detach(self) -> None:
        """Leave the modules alone."""
        while self._handles:
            self._handles.pop().remove()

    def swap_in(self, own: str, module: nn.Module, *_: Any) -> None:
        """Let a module see a changed copy."""
        self.was_used = True
        parameter = module._parameters[own]
        assert parameter is not None
        changed = self._selection.changed(parameter)
        if changed is not None:
            self._whole[module] = parameter
            module._parameters[own] = changed  # type: ignore[assignment]

    def swap_out(self, own: str, module: nn.Module, *_: Any) -> None:
        """Let a module see its parameter again."""
        if module in self._whole:
            module._parameters[own] = self._whole.pop(module)  # type: ignore[assignment]


@torch.no_grad()
def write_shard(parameter: DTensor, indices: Tensor, entries: Tensor) -> None:
    """Write the entries that this process holds; flat indices of the whole parameter."""
    local = parameter._local_tensor
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    places = torch.unravel_index(indices.long(), parameter.shape)
    inner = [place - start for place, start in zip(places, offset, strict=True)]
    is_here = torch.stack(
        [(place >= 0) & (place < size) for place, size in zip(inner, shape, strict=True)]
    ).all(0)
    local[tuple(place[is_here] for place in inner)] = entries[is_here].to(local.dtype)
