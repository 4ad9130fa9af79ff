"""The job that turns two checkpoints of one architecture into a safety patch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import Array
from safeweights_peft.errors import MergeError, ModelError
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.files import check_apart, check_target, publish
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.diff import (
    Change,
    PatchPart,
    changed_keys,
    check_patch,
    find_change,
    keep,
)
from safeweights_peft.merging.gather import find_copies, find_state
from safeweights_peft.modeling.layout import describe, total_parameters
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.artifacts import Adapter, SafetyMap
from safeweights_peft.patch.io import inspect, read_adapter, read_map, write_adapter
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode, TensorRecord
from safeweights_peft.selection.topk import select


def diff(
    job: Job,
    tuned: str,
    out: Path,
    *,
    density: float | None = None,
    map_dir: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the change from a base to a tuned model as a patch, tensor by tensor."""
    started = time.perf_counter()
    check_target(out, overwrite, MergeError)
    other = resolve_base(tuned)
    inputs = {"the base": job.base.path, "the tuned model": other.path}
    check_apart(out, inputs | ({"the map": map_dir} if map_dir else {}), MergeError)
    pair = _open_pair(job, other, read_map(map_dir) if map_dir else None)
    chosen = None if density is None else pair.find_largest(density)
    parts = dict(pair.keep(chosen))
    kept = {name: part for name, part in parts.items() if part.delta.count}
    if not kept:
        raise MergeError(
            f"{tuned}: expected entries that differ from {job.base.name} and may be kept, found "
            "none; give two models, of which one was tuned from the other, and a map that fits "
            "what changed"
        )
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path=job.base.name,
        revision=job.base.revision,
        transformers_version=transformers.__version__,
        selection={
            "method": "diff",
            "tuned": other.name,
            "tuned_revision": other.revision,
            "density": density,
            "map": None if map_dir is None else str(map_dir),
            "safeweights_peft_version": version("safeweights-peft"),
        },
        tensors={name: part.record for name, part in kept.items()},
    )
    with publish(out, overwrite, MergeError) as draft:
        write_adapter(draft, Adapter(metadata, {name: part.delta for name, part in kept.items()}))
        inexact = sum(part.inexact for part in kept.values())
        check_patch(job.reader, pair.tuned, read_adapter(draft), inexact)
    square = sum(part.square for part in parts.values())
    lost_square = sum(part.lost_square for part in parts.values())
    return {
        "out_dir": str(out),
        "parameters": len(kept),
        "entries": sum(part.delta.count for part in kept.values()),
        "changed_entries": sum(part.changed for part in parts.values()),
        "lost_entries": sum(part.lost for part in parts.values()),
        "lost_share": lost_square / square if square else 0.0,
        "only_in_base": pair.only_in_base,
        "size_bytes": inspect(out)["size_bytes"],
        "seconds": time.perf_counter() - started,
    }


@dataclass(frozen=True)
class _Pair:
    """Two checkpoints to be compared parameter by parameter."""

    job: Job
    tuned: CheckpointReader
    records: Mapping[str, TensorRecord]  # of the parameters that have changed
    eligible: Mapping[str, Array] | None  # flat indices that may be kept; all if None
    total: int  # weights of the model, to which densities refer
    only_in_base: list[str]  # tensors that no parameter holds, and that stay as they are

    def find_largest(self, density: float) -> dict[str, Array]:
        """Find the flat indices of the entries that have changed most, by parameter."""
        offered = sum(record.numel for record in self.records.values())
        if not offered:
            return {}
        selected = select(self._scores(), min(round(density * self.total), offered))
        return {name: part.indices[part.scores > 0] for name, part in selected.items()}

    def keep(self, chosen: Mapping[str, Array] | None) -> Iterator[tuple[str, PatchPart]]:
        """Make each parameter's part of the patch: of all that changed, or of what is chosen."""
        for name, change, kept in self._changes("Writing down changes"):
            kept &= _among(change, name, chosen)
            # With a density, an entry that no value leads to gets the nearest one instead.
            yield name, keep(name, self.records[name], change, kept, exact=chosen is None)

    def _scores(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        for name, change, kept in self._changes("Ranking changes"):
            scores = np.zeros(self.records[name].numel, np.float32)
            scores[change.indices[kept]] = np.abs(change.values[kept])
            yield name, scores

    def _changes(self, description: str) -> Iterator[tuple[str, Change, Array]]:
        """Yield each parameter's change, and which of its entries may be kept."""
        with self.job.progress.task(description, len(self.records)) as advance:
            for name, record in self.records.items():
                change = find_change(self.job.reader, self.tuned, name, record)
                yield name, change, _among(change, name, self.eligible)
                advance(1)


def _among(change: Change, name: str, indices: Mapping[str, Array] | None) -> Array:
    """Tell which changed entries of a parameter are among some indices; all are if None."""
    if indices is None:
        return np.ones(change.indices.size, bool)
    return np.isin(change.indices, indices.get(name, ()), assume_unique=True)


def _open_pair(job: Job, other: BaseModel, safety_map: SafetyMap | None) -> _Pair:
    """Find the tensors that have changed, and the parameters that they hold."""
    if safety_map is not None:
        find_state(job.reader, safety_map)
    model = build_empty(job.base, job.reader.keys())
    tuned = CheckpointReader(other.path)
    if any(key not in job.reader for key in tuned.keys()):
        tuned = tuned.renamed(_find_keys(job, other, model, tuned.keys()))
    dropped, only_in_base = _find_dropped(job, tuned, model)
    changed = set(changed_keys(job.reader, tuned, dropped))
    # A parameter that goes by its own name on disk is looked up only if it has changed.
    names = [n for n, _ in model.named_parameters() if n in changed or n not in job.reader]
    records = {
        name: record
        for name, record in describe(model, names, job.base.path).items()
        if changed.intersection(block.key for block in record.blocks)
    }
    for key in sorted(changed.difference(*(record.keys for record in records.values()))):
        raise MergeError(
            f"{key}: expected a parameter where the checkpoints differ, found a tensor of another "
            "kind, such as a buffer or a part that transformers doesn't load, which no patch can "
            "hold; give models that agree in it"
        )
    eligible = None if safety_map is None else safety_map.indices
    return _Pair(job, tuned, records, eligible, total_parameters(model), only_in_base)


def _find_keys(
    job: Job, other: BaseModel, model: PreTrainedModel, keys: list[str]
) -> dict[str, str]:
    """Find the base's keys for those of its text tower that was saved by itself; or none."""
    # By the parameters that both are loaded into, not by what keys end in: a tower that sees may
    # hold layers of the same names.
    names = [name for name, _ in model.named_parameters()]
    try:
        tower = build_empty(other, keys)
        if [name for name, _ in tower.named_parameters()] != names:
            return {}
        theirs = describe(tower, names, other.path)
        ours = describe(model, names, job.base.path)
    except ModelError:  # what is missing is named when all keys are compared
        return {}
    return {
        block.key: own.key
        for name in names
        for block, own in zip(theirs[name].blocks, ours[name].blocks, strict=False)
        if replace(block, key=own.key) == own
    }


def _find_dropped(
    job: Job, tuned: CheckpointReader, model: PreTrainedModel
) -> tuple[set[str], list[str]]:
    """Find the base's tensors that the tuned model may lack, and those of them that stay."""
    # transformers doesn't save what it doesn't load, such as layers for multi-token prediction,
    # nor copies of a tied tensor.
    missing = {key for key in job.reader.keys() if key not in tuned}
    if not missing:
        return set(), []
    parameters = describe(model, [name for name, _ in model.named_parameters()], job.base.path)
    copies = [find_copies(job.reader, record) for record in parameters.values()]
    dropped = missing.difference(*(own.keys for own, *_ in copies))
    return dropped, sorted(dropped.difference(*(copy.keys for _, *tied in copies for copy in tied)))
