"""Safety patches as PEFT's own methods, for people who don't have this package.

What each form keeps and loses stands in ``docs/export.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, SupertuningConfig
from safetensors.numpy import save_file
from torch import Tensor, nn

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, SparseDelta, add_rounded, bits_differ
from safeweights_peft.errors import MergeError, UnsupportedFeatureError
from safeweights_peft.fetching import BaseModel
from safeweights_peft.files import check_apart, check_target, publish, read_json, write_json
from safeweights_peft.jobs.load import find_base
from safeweights_peft.merging.gather import base_entries, gather_entries
from safeweights_peft.merging.sums import merged_entries
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import CONFIG_FILE, TENSORS_FILE, read_adapter


def export_supertuning(
    adapter_dir: Path, out: Path, base: str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write a safety patch as an adapter of PEFT's own sparse method, Super-Tuning.

    That method stores as many entries for each matrix as one density says, so the others are padded
    up to the densest one. It rounds values to the model's dtype before it adds them: in float32
    the merged bits are those of the patch, in narrower dtypes some may differ.
    """
    adapter, found = _open(adapter_dir, out, base, overwrite)
    reader, deltas = CheckpointReader(found.path), _linear_deltas(adapter, found, "Super-Tuning")
    merged = merged_entries(reader, [adapter])
    sparsity = find_sparsity([(delta.count, delta.numel) for delta in deltas.values()])
    tensors: dict[str, Array] = {}
    differing = 0
    for name, delta in deltas.items():
        stored = int(delta.numel * (1 - sparsity))  # as PEFT counts
        indices, values = np.zeros(stored, np.int32), np.full(stored, -0.0, np.float32)
        indices[: delta.count], values[: delta.count] = delta.indices, delta.values
        module = _module(name)
        tensors[f"base_model.model.{module}.supertuning_indices"] = indices
        tensors[f"base_model.model.{module}.supertuning_values"] = values
        record = adapter.metadata.tensors[name]
        entries = gather_entries(reader, name, record, delta.indices)
        with np.errstate(over="ignore"):
            rounded = delta.values.astype(DTYPES[record.dtype])
        differing += int(bits_differ(add_rounded(entries, rounded), merged[name][1]).sum())
    config = SupertuningConfig(sparsity=sparsity, **_common(found, deltas))
    _publish(out, config, tensors, overwrite)
    return {
        "out_dir": str(out),
        "parameters": len(deltas),
        "entries": sum(delta.count for delta in deltas.values()),
        "stored_entries": sum(each.size for each in tensors.values()) // 2,
        "differing_entries": differing,
        "size_bytes": (out / TENSORS_FILE).stat().st_size,
    }


def export_lora(
    adapter_dir: Path,
    out: Path,
    base: str | None = None,
    *,
    rank: int = 16,
    max_error: float = 0.1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a safety patch as a LoRA: the truncated singular value decomposition of each matrix.

    A sparse change is seldom of low rank, so this is an approximation, and often a bad one.
    """
    adapter, found = _open(adapter_dir, out, base, overwrite)
    deltas = _linear_deltas(adapter, found, "LoRA")
    merged_entries(CheckpointReader(found.path), [adapter])  # is it this base?
    tensors, lost, whole = {}, {}, {}
    for name, delta in deltas.items():
        dense = torch.from_numpy(delta.to_dense())
        up, down = _factorize(dense, rank)
        module = _module(name)
        tensors[f"base_model.model.{module}.lora_A.weight"] = to_numpy(down)
        tensors[f"base_model.model.{module}.lora_B.weight"] = to_numpy(up)
        whole[name] = float(torch.linalg.norm(dense))
        lost[name] = float(torch.linalg.norm(dense - up @ down))
    errors = {name: lost[name] / whole[name] if whole[name] else 0.0 for name in deltas}
    worst = max(errors, key=errors.__getitem__)
    if errors[worst] > max_error:
        raise MergeError(
            f"{worst}: expected a relative error of at most {max_error} at rank {rank}, found "
            f"{errors[worst]:.3g}; raise --rank or --max-error, or export to supertuning, which is "
            "sparse as the patch is"
        )
    config = LoraConfig(r=rank, lora_alpha=rank, **_common(found, deltas))
    _publish(out, config, tensors, overwrite)
    total = math.hypot(*whole.values())
    return {
        "out_dir": str(out),
        "parameters": len(deltas),
        "rank": rank,
        "relative_error": math.hypot(*lost.values()) / total if total else 0.0,
        "largest_error": errors[worst],
        "largest_error_parameter": worst,
        "size_bytes": (out / TENSORS_FILE).stat().st_size,
    }


def find_sparsity(needs: Sequence[tuple[int, int]]) -> float:
    """Find the highest sparsity at which Super-Tuning has room for the entries of each matrix."""
    sparsity = 1 - max(count / numel for count, numel in needs)
    while any(int(numel * (1 - sparsity)) < count for count, numel in needs):
        sparsity = math.nextafter(sparsity, 0)
    return sparsity


def _open(
    adapter_dir: Path, out: Path, base: str | None, overwrite: bool
) -> tuple[Adapter, BaseModel]:
    check_target(out, overwrite, MergeError)
    found = find_base(base, [adapter_dir])
    adapter = read_adapter(adapter_dir, base_entries(CheckpointReader(found.path)))
    check_apart(out, {"the base": found.path, "the patch": adapter_dir}, MergeError)
    return adapter, found


def _linear_deltas(adapter: Adapter, base: BaseModel, method: str) -> dict[str, SparseDelta]:
    """Give the scaled changes, all of them of linear layers: PEFT's methods adapt nothing else."""
    modules, deltas = dict(build_empty(base).named_modules()), {}
    for name, delta in adapter.deltas.items():
        module, own = modules.get(_module(name)), name.rpartition(".")[2]
        if not isinstance(module, nn.Linear) or own != "weight" or delta.numel >= 2**31:
            raise UnsupportedFeatureError(
                f"{name}: expected the weight of an nn.Linear of fewer than 2**31 entries, found "
                f"{own} of a {type(module).__name__}; {method} in PEFT changes nothing else: merge "
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


def _factorize(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a matrix [m, n] into [m, rank] and [rank, n], with zeros beyond its own rank."""
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = dense.new_zeros(dense.shape[0], rank), dense.new_zeros(rank, dense.shape[1])
    up[:, : root.numel()] = left[:, :rank] * root
    down[: root.numel()] = root[:, None] * right[:rank]
    return up, down


def _common(base: BaseModel, deltas: Iterable[str]) -> dict[str, Any]:
    """Give what PEFT's configs share."""
    return {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "target_modules": [_module(name) for name in deltas],
    }


def _publish(out: Path, config: PeftConfig, tensors: Mapping[str, Array], overwrite: bool) -> None:
    with publish(out, overwrite, MergeError) as draft:
        config.save_pretrained(str(draft))
        written = read_json(draft / CONFIG_FILE, MergeError)
        # PEFT keeps them as a set, whose order differs from run to run.
        written["target_modules"] = sorted(written["target_modules"])
        write_json(draft / CONFIG_FILE, written)
        save_file(dict(tensors), draft / TENSORS_FILE, metadata={"format": "pt"})
