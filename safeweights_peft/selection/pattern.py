"""Where in a model selected entries lie, counted by layer, component and expert."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile, zip_longest
from typing import Any

import numpy as np

from safeweights_peft.delta import Array
from safeweights_peft.modeling.layout import is_router

SHORT_NAMES = {f"{name}_proj": name for name in ("q", "k", "v", "o", "gate", "up", "down")}
EMBEDDING_NAMES = frozenset({"wte", "wpe"})
# Components of many modules each.
GROUPS = frozenset({"norms", "embeddings", "router"})
# The module that owns fused parameters of all experts, [E, ...], or one module per expert.
EXPERTS = "experts"


@dataclass(frozen=True)
class Place:
    """Where a parameter, or an expert's part of one, is in its model."""

    layer: int | None  # None outside the numbered layers
    component: str  # such as "q", "experts down" or "norms"
    expert: int | None = None  # None where there is none, or where one parameter holds all


@dataclass(frozen=True)
class Part:
    """The entries at one place, counted: all, those that may be selected, and those that are."""

    place: Place
    parameters: int
    eligible: int
    selected: int


def find_place(name: str) -> Place:
    """Read a parameter's place off its name, of whatever architecture."""
    *modules, leaf = name.split(".")
    layer = next((int(module) for module in modules if module.isdecimal()), None)
    after = modules[modules.index(EXPERTS) + 1 :] if EXPERTS in modules else []
    expert = int(after[0]) if after and after[0].isdecimal() else None
    return Place(layer, _component(modules, leaf), expert)


def _component(modules: list[str], leaf: str) -> str:
    is_own = not modules or modules[-1] == EXPERTS or leaf not in ("weight", "bias")
    owner = leaf if is_own else modules[-1]
    if is_router(modules):
        return "router"
    if "norm" in owner or owner.startswith("ln_"):
        return "norms"
    if "embed" in owner or owner in EMBEDDING_NAMES:
        return "embeddings"
    experts = next((module for module in modules if "expert" in module), "")
    # An unknown component goes by the name of the module that owns it.
    return f"{experts} {SHORT_NAMES.get(owner, owner)}".lstrip()


def count_parts(
    shapes: Mapping[str, tuple[int, ...]],
    eligible: Collection[str],
    indices: Mapping[str, Array],
) -> list[Part]:
    """Count selected entries at every place of a model."""
    nothing, places = np.empty(0, np.int64), find_places(shapes, eligible)
    return [
        Part(place, size, size if name in eligible else 0, count)
        for name, shape in shapes.items()
        for place, size, count in _split(name, places[name], shape, indices.get(name, nothing))
    ]


def find_places(names: Collection[str], eligible: Collection[str]) -> dict[str, Place]:
    """Find the places of all parameters of a model, and tell apart those that names mix up."""
    places = {name: find_place(name) for name in names}
    # GPT-2 calls the outputs of attention and MLP alike.
    parents: dict[str, set[str]] = {}
    for name in eligible:
        if places[name].component not in GROUPS:
            parents.setdefault(places[name].component, set()).add(_parent(name))
    # A vision tower numbers its layers too: those that count are where most may be selected.
    stems = Counter(_stem(name) for name in eligible if places[name].layer is not None)
    main = stems.most_common(1)[0][0] if stems else None
    for name, place in places.items():
        if main and place.layer is not None and _stem(name) != main:
            pairs = zip_longest(_stem(name), main)
            tower = next((own for own, other in pairs if own != other), None) or "other"
            place = Place(None, f"{tower} {place.component}", place.expert)
        elif len(parents.get(place.component, ())) > 1:
            place = replace(place, component=f"{_parent(name)} {place.component}")
        places[name] = place
    return places


def _parent(name: str) -> str:
    """Return the module around the one that owns a parameter."""
    modules = [module for module in name.split(".")[:-2] if not module.isdecimal()]
    return modules[-1] if modules else ""


def _stem(name: str) -> tuple[str, ...]:
    """Return the path of a list of layers: all before the first number."""
    return tuple(takewhile(lambda module: not module.isdecimal(), name.split(".")))


def _split(
    name: str, place: Place, shape: tuple[int, ...], indices: Array
) -> Iterator[tuple[Place, int, int]]:
    """Yield place, entries and selected entries of a parameter, or of each expert's part of it."""
    numel = math.prod(shape)
    if name.split(".")[-2:-1] != [EXPERTS] or len(shape) < 2:
        yield place, numel, indices.size
        return
    size = numel // shape[0]
    for expert, count in enumerate(np.bincount(indices // size, minlength=shape[0])):
        yield replace(place, expert=expert), size, int(count)


def tabulate(parts: Collection[Part], *keys: str) -> list[dict[str, Any]]:
    """Add parts up by keys of their place, with their shares of model and selection."""
    groups: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        groups.setdefault(tuple(getattr(part.place, key) for key in keys), []).append(part)
    whole = _count(parts)
    return [
        dict(zip(keys, values, strict=True)) | _shares(_count(members), whole)
        for values, members in groups.items()
    ]


def _count(parts: Collection[Part]) -> dict[str, int]:
    return {
        "parameters": sum(part.parameters for part in parts),
        "eligible": sum(part.eligible for part in parts),
        "selected": sum(part.selected for part in parts),
    }


def _shares(counts: dict[str, int], whole: dict[str, int]) -> dict[str, Any]:
    parameter_share = counts["parameters"] / whole["parameters"]
    selected_share = counts["selected"] / max(whole["selected"], 1)
    return counts | {
        "parameter_share": parameter_share,
        "selected_share": selected_share,
        "enrichment": selected_share / parameter_share,
    }
