"""The differing job: from two checkpoints of one architecture to a safety patch on disk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import Array
from safeweights_peft.errors import MergeError
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.files import check_apart, check_target, publish
from safeweights_peft.jobs.progress import Progress, Quiet
from safeweights_peft.merging.diff import (
    Change,
    Kept,
    changed_keys,
    check_exact,
    check_patch,
    find_change,
    keep,
)
from safeweights_peft.merging.gather import find_state
from safeweights_peft.modeling.layout import describe, total_parameters
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import inspect, read_adapter, read_map, write_adapter
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode, TensorRecord
from safeweights_peft.selection.topk import select


@dataclass(frozen=True)
class DiffReport:
    """What a patch holds of the change between two checkpoints.

    Attributes:
        out_dir: the patch.
        parameters: number of parameters that it changes.
        entries: number of entries that it changes.
        changed_entries: number of entries that differ between the checkpoints.
        lost_entries: how many of these don't get the tuned model's bits.
        lost_share: their share of the squared change, in [0, 1].
        size_bytes: size of the patch's tensors.
        seconds: wall time.
    """

    out_dir: str
    parameters: int
    entries: int
    changed_entries: int
    lost_entries: int
    lost_share: float
    size_bytes: int
    seconds: float


def diff(
    base: str,
    tuned: str,
    out: Path,
    *,
    density: float | None = None,
    map_dir: Path | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> DiffReport:
    """Write the change between two checkpoints as a safety patch, one tensor in memory at a time.

    Every kept entry gets the tuned model's bits when the patch is merged; without a density and a
    map, merging gives the tuned checkpoint. With a density, an entry that no value leads to exactly
    gets the nearest one, and counts as lost.
    """
    started = time.perf_counter()
    check_target(out, overwrite, MergeError)
    found, other = resolve_base(base), resolve_base(tuned)
    inputs = {"the base": found.path, "the tuned model": other.path}
    check_apart(out, inputs | ({"the map": map_dir} if map_dir else {}), MergeError)
    pair = _open_pair(found, other, map_dir, progress or Quiet())
    chosen = None if density is None else pair.largest(density)
    parts = dict(pair.keep(chosen))
    kept = {name: part for name, part in parts.items() if part.delta.count}
    if not kept:
        raise MergeError(
            f"{tuned}: expected entries that differ from {base} and may be kept, found none; give "
            "two models, of which one was tuned from the other, and a map that fits what changed"
        )
    selection = {
        "method": "diff",
        "tuned": other.name,
        "tuned_revision": other.revision,
        "density": density,
        "map": None if map_dir is None else str(map_dir),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    with publish(out, overwrite, MergeError) as draft:
        write_adapter(draft, _build_adapter(found, kept, selection))
        inexact = sum(part.inexact for part in kept.values())
        check_patch(pair.base, pair.tuned, read_adapter(draft), inexact)
    square = sum(part.square for part in parts.values())
    return DiffReport(
        out_dir=str(out),
        parameters=len(kept),
        entries=sum(part.delta.count for part in kept.values()),
        changed_entries=sum(part.changed for part in parts.values()),
        lost_entries=sum(part.lost for part in parts.values()),
        lost_share=sum(p.lost_square for p in parts.values()) / square if square else 0.0,
        size_bytes=inspect(out)["size_bytes"],
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Pair:
    """Two checkpoints that are compared parameter by parameter.

    Attributes:
        base: the checkpoint before.
        tuned: the checkpoint after.
        records: where each parameter that has changed lies in both.
        eligible: by parameter, the flat indices that may be kept; all if None.
        total: number of weights of the model, which densities refer to.
        progress: shown while comparing.
    """

    base: CheckpointReader
    tuned: CheckpointReader
    records: Mapping[str, TensorRecord]
    eligible: Mapping[str, Array] | None
    total: int
    progress: Progress

    def largest(self, density: float) -> dict[str, Array]:
        """Find the flat indices of the entries that have changed most, by parameter."""
        offered = sum(record.numel for record in self.records.values())
        if not offered:
            return {}
        selected = select(self._scores(), min(round(density * self.total), offered))
        return {name: each.indices[each.scores > 0] for name, each in selected.items()}

    def keep(self, chosen: Mapping[str, Array] | None) -> Iterator[tuple[str, Kept]]:
        """Make each parameter's part of the patch: of all that changed, or of what is chosen."""
        for name, change, kept in self._changes("Writing down changes"):
            if chosen is None:
                check_exact(name, change, kept)
            yield name, keep(self.records[name], change, kept & _among(change, name, chosen))

    def _scores(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for name, change, kept in self._changes("Ranking changes"):
            scores = np.zeros(self.records[name].numel, np.float32)
            scores[change.indices[kept]] = np.abs(change.values[kept])
            yield name, scores

    def _changes(self, description: str) -> Iterator[tuple[str, Change, Array]]:
        """Go through the changed parameters; tells which changed entries may be kept."""
        with self.progress.task(description, len(self.records)) as advance:
            for name, record in self.records.items():
                change = find_change(self.base, self.tuned, name, record)
                yield name, change, _among(change, name, self.eligible)
                advance(1)


def _among(change: Change, name: str, indices: Mapping[str, Array] | None) -> Array:
    """Tell which changed entries of a parameter are among some; all are if there is no choice."""
    if indices is None:
        return np.ones(change.indices.size, bool)
    return np.isin(change.indices, indices.get(name, ()), assume_unique=True)


def _open_pair(base: BaseModel, tuned: BaseModel, map_dir: Path | None, show: Progress) -> _Pair:
    """Find the tensors that have changed, and the parameters that they hold."""
    before, after = CheckpointReader(base.path), CheckpointReader(tuned.path)
    eligible = None
    if map_dir is not None:
        safety_map = read_map(map_dir)
        find_state(before, safety_map)
        eligible = safety_map.indices
    changed, model = set(changed_keys(before, after)), build_empty(base)
    # A parameter that goes by its own name on disk is looked up only if it has changed.
    names = [n for n, _ in model.named_parameters() if n in changed or n not in before]
    records = {
        name: record
        for name, record in describe(model, names, base.path).items()
        if changed.intersection(block.key for block in record.blocks)
    }
    for key in sorted(changed.difference(*(record.keys for record in records.values()))):
        raise MergeError(
            f"{key}: expected a parameter where the checkpoints differ, found a tensor of another "
            "kind, such as a buffer, which no patch can hold; give models that agree in it"
        )
    return _Pair(before, after, records, eligible, total_parameters(model), show)


def _build_adapter(base: BaseModel, kept: Mapping[str, Kept], selection: dict[str, Any]) -> Adapter:
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path=base.name,
        revision=base.revision,
        transformers_version=transformers.__version__,
        selection=selection,
        tensors={name: part.record for name, part in kept.items()},
    )
    return Adapter(metadata, {name: part.delta for name, part in kept.items()})
