"""Safety patches as adapters of PEFT's own Super-Tuning, for people who don't have this package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peft import SupertuningConfig
from safetensors.numpy import save_file
from torch import nn

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, SparseDelta, add_rounded, bits_differ
from safeweights_peft.errors import MergeError, UnsupportedFeatureError
from safeweights_peft.fetching import BaseModel, find_base
from safeweights_peft.files import check_apart, check_target, publish, read_json, write_json
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.merging.sums import merged_entries
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import CONFIG_FILE, TENSORS_FILE, read_adapter


def export_supertuning(
    adapter_dir: Path, out: Path, base: str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a safety patch as an adapter of PEFT's own sparse method; see ``docs/export.md``."""
    check_target(out, overwrite, MergeError)
    found = find_base(base, [adapter_dir])
    reader = CheckpointReader(found.path)
    adapter = read_adapter(adapter_dir, partial(gather_entries, reader))
    check_apart(out, {"the base": found.path, "the patch": adapter_dir}, MergeError)
    deltas = _linear_deltas(adapter, found)
    merged = merged_entries(reader, [adapter])
    # The method stores equally many entries of each matrix per size, so most matrices are padded.
    sparsity = find_sparsity([(delta.count, delta.numel) for delta in deltas.values()])
    tensors: dict[str, Array] = {}
    differing = 0
    for name, delta in deltas.items():
        stored = int(delta.numel * (1 - sparsity))  # as PEFT counts
        # The padding adds -0.0 to entry 0: the only number that changes nothing, not even -0.0.
        indices, values = np.zeros(stored, np.int32), np.full(stored, -0.0, np.float32)
        indices[: delta.count], values[: delta.count] = delta.indices, delta.values
        tensors[f"base_model.model.{_module(name)}.supertuning_indices"] = indices
        tensors[f"base_model.model.{_module(name)}.supertuning_values"] = values
        # PEFT rounds values to the model's dtype before it adds them: in float32 the merged bits
        # are those of the patch, in narrower dtypes some differ.
        record = adapter.metadata.tensors[name]
        with np.errstate(over="ignore"):
            rounded = delta.values.astype(DTYPES[record.dtype])
        entries = gather_entries(reader, name, record, delta.indices)
        differing += int(bits_differ(add_rounded(entries, rounded), merged[name][1]).sum())
    config = SupertuningConfig(
        sparsity=sparsity,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=found.name,
        revision=found.revision,
        target_modules=[_module(name) for name in deltas],
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
        "parameters": len(deltas),
        "entries": sum(delta.count for delta in deltas.values()),
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


def _linear_deltas(adapter: Adapter, base: BaseModel) -> dict[str, SparseDelta]:
    """Scale a patch's values, and refuse one that changes more than linear layers."""
    modules, deltas = dict(build_empty(base).named_modules()), {}
    for name, delta in adapter.deltas.items():
        module, own = modules.get(_module(name)), name.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or own != "weight" or delta.numel >= 2**31:
            raise UnsupportedFeatureError(
                f"{name}: expected the weight of an nn.Linear of fewer than 2**31 entries, found "
                f"{own} of a {type(module).__name__}; Super-Tuning changes nothing else: merge "
                "the patch"
            )
        if delta.count:
            change = np.float32(adapter.metadata.scale) * delta.values.astype(np.float32)
            deltas[name] = SparseDelta(delta.shape, delta.indices, change)
    if not deltas:
        raise MergeError("adapter: expected a patch that changes entries, found none; give another")
    return deltas


def _module(name: str) -> str:
    return name.rpartition(".")[0]
