"""Safety patches as adapters of PEFT's own Super-Tuning, for people who don't have this package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import SupertuningConfig
from safetensors.numpy import save_file
from torch import nn

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, add_rounded, bits_differ
from safeweights_peft.errors import MergeError, UnsupportedFeatureError
from safeweights_peft.fetching import BaseModel, find_base
from safeweights_peft.files import check_apart, check_target, publish, read_json, write_json
from safeweights_peft.merging.sums import add_up, gather_base, read_patches
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.io import CONFIG_FILE, TENSORS_FILE
from safeweights_peft.patch.records import TensorRecord


def export_supertuning(
    adapter_dir: Path,
    out: Path,
    base: str | None = None,
    *,
    scale: float = 1.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a safety patch as an adapter of PEFT's own sparse method; see ``docs/export.md``."""
    check_target(out, overwrite, MergeError)
    base_model = find_base(base, [adapter_dir])
    patches = read_patches([(adapter_dir, scale)])
    check_apart(out, {"the base": base_model.path, "the patch": adapter_dir}, MergeError)
    (patch,) = patches.patches
    records = patch.adapter.metadata.tensors
    _check_linear(base_model, records)
    counts = {name: indices.size for name, indices in patches.indices.items() if indices.size}
    if not counts:
        raise MergeError("adapter: expected a patch that changes entries, found none; give another")
    # The method stores one fraction of every matrix, so all but the densest one are padded.
    numels = {name: records[name].numel for name in counts}
    sparsity = find_sparsity([(counts[name], numels[name]) for name in counts])
    tensors: dict[str, Array] = {}
    differing = 0
    factor = np.float32(patch.summary.scale)
    for entries, merged in add_up(gather_base(CheckpointReader(base_model.path), patches)):
        if (name := entries.name) not in counts:
            continue
        change = factor * patch.adapter.values(name, entries.base).astype(np.float32)
        stored = int(numels[name] * (1 - sparsity))  # as PEFT counts
        # The padding adds -0.0 to entry 0: the only number that changes nothing, not even -0.0.
        indices, values = np.zeros(stored, np.int32), np.full(stored, -0.0, np.float32)
        indices[: counts[name]], values[: counts[name]] = entries.indices, change
        tensors[f"base_model.model.{_module(name)}.supertuning_indices"] = indices
        tensors[f"base_model.model.{_module(name)}.supertuning_values"] = values
        # PEFT rounds values to the model's dtype before it adds them: in float32 the merged bits
        # are those of the patch, in narrower dtypes some differ.
        with np.errstate(over="ignore"):
            rounded = change.astype(DTYPES[records[name].dtype])
        differing += int(bits_differ(add_rounded(entries.base, rounded), merged).sum())
    config = SupertuningConfig(
        sparsity=sparsity,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model.name,
        revision=base_model.revision,
        target_modules=[_module(name) for name in counts],
    )
    with publish(out, overwrite, MergeError) as draft:
        config.save_pretrained(str(draft))
        written = read_json(draft / CONFIG_FILE, MergeError)
        # PEFT keeps them as a set, whose order differs from run to run.
        written["target_modules"] = sorted(written["target_modules"])
        write_json(draft / CONFIG_FILE, written)
        save_file(tensors, draft / TENSORS_FILE, metadata={"format": "pt"})
    return {
        "out_dir": str(out),
        "parameters": len(counts),
        "entries": sum(counts.values()),
        "stored_entries": sum(tensor.size for tensor in tensors.values()) // 2,
        "differing_entries": differing,
        "size_bytes": (out / TENSORS_FILE).stat().st_size,
    }


def find_sparsity(needs: Sequence[tuple[int, int]]) -> float:
    """Find the highest sparsity with room for each matrix's entries, given as (count, numel)."""
    sparsity = 1 - max(count / numel for count, numel in needs)
    while any(int(numel * (1 - sparsity)) < count for count, numel in needs):
        sparsity = math.nextafter(sparsity, 0)
    return sparsity


def _check_linear(base: BaseModel, records: Mapping[str, TensorRecord]) -> None:
    """Refuse a patch of anything but linear layers: Super-Tuning in PEFT changes nothing else."""
    modules = dict(build_empty(base).named_modules())
    for name, record in records.items():
        module, own = modules.get(_module(name)), name.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or own != "weight" or record.numel >= 2**31:
            raise UnsupportedFeatureError(
                f"{name}: expected the weight of an nn.Linear of fewer than 2**31 entries, found "
                f"{own} of a {type(module).__name__}; Super-Tuning changes nothing else: merge "
                "the patch"
            )


def _module(name: str) -> str:
    return name.rpartition(".")[0]
