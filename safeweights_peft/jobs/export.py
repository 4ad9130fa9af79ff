"""Safety patches as adapters of PEFT's own methods, for people who don't have this package."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, PeftConfig, SupertuningConfig
from safetensors.numpy import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, add_rounded, bits_differ
from safeweights_peft.errors import MergeError, UnsupportedFeatureError
from safeweights_peft.fetching import BaseModel, find_base
from safeweights_peft.files import check_apart, check_target, publish, read_json, write_json
from safeweights_peft.merging.sums import PatchSet, add_up, gather_base, read_patches
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.groups import Group, find_groups
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
    base_model, patches = _open(adapter_dir, out, base, scale, overwrite)
    (patch,) = patches.patches
    records = patch.adapter.metadata.tensors
    _check_linear(base_model, records)
    counts = _count(patches)
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
    _write(out, config, tensors, overwrite)
    return {
        "out_dir": str(out),
        "parameters": len(counts),
        "entries": sum(counts.values()),
        "stored_entries": sum(tensor.size for tensor in tensors.values()) // 2,
        "differing_entries": differing,
        "size_bytes": (out / TENSORS_FILE).stat().st_size,
    }


def export_lora(
    adapter_dir: Path,
    out: Path,
    base: str | None = None,
    *,
    scale: float = 1.0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a patch of whole rows or columns as the LoRA that it is; see ``docs/export.md``."""
    base_model, patches = _open(adapter_dir, out, base, scale, overwrite)
    (patch,) = patches.patches
    records, counts = patch.adapter.metadata.tensors, _count(patches)
    groups = {name: _find_lines(name, patches.indices[name], records[name]) for name in counts}
    transposed = _find_transposed(base_model, groups)
    tensors: dict[str, Array] = {}
    for entries, _ in add_up(gather_base(CheckpointReader(base_model.path), patches)):
        if (name := entries.name) in groups:
            group, numbers = groups[name]
            shape, values = records[name].shape, patch.adapter.values(name, entries.base)
            factors = _factorize(values, group, numbers, shape)
            # The two of Conv1D, whose weight is the transpose, change places.
            first, second = (f.T for f in factors[::-1]) if transposed[name] else factors
            prefix = f"base_model.model.{_module(name)}.lora"
            tensors[f"{prefix}_A.weight"] = np.ascontiguousarray(second)
            tensors[f"{prefix}_B.weight"] = np.ascontiguousarray(first)
    ranks = {_module(name): numbers.size for name, (_, numbers) in groups.items()}
    # vLLM compares r alone with its max_lora_rank, and makes room for that many: the largest fits.
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    factor = float(np.float32(patch.summary.scale))  # so that its neighbours round to it
    config = LoraConfig(
        r=rank,
        rank_pattern=others,
        # PEFT multiplies by alpha / r. Engines that read neither pattern find the same factor.
        lora_alpha=_find_alpha(factor, rank),
        alpha_pattern={module: _find_alpha(factor, own) for module, own in others.items()},
        fan_in_fan_out=all(transposed.values()),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model.name,
        revision=base_model.revision,
        target_modules=[*ranks],
    )
    _write(out, config, tensors, overwrite)
    return {
        "out_dir": str(out),
        "parameters": len(counts),
        "entries": sum(counts.values()),
        "largest_rank": rank,
        "stored_entries": sum(tensor.size for tensor in tensors.values()),
        "size_bytes": (out / TENSORS_FILE).stat().st_size,
    }


def _find_lines(name: str, indices: Array, record: TensorRecord) -> tuple[Group, Array]:
    """Find the rows or columns that a parameter's entries fill; refuse any other entries."""
    found = find_groups(indices, record.shape) if len(record.shape) == 2 else None
    if found is None:
        what = f"{indices.size} entries of the shape {list(record.shape)}"
        raise UnsupportedFeatureError(
            f"{name}: expected whole rows or columns of a matrix, found {what}; a LoRA of few "
            "ranks holds nothing else: export it to supertuning, or merge the patch"
        )
    return found


def _find_transposed(base: BaseModel, names: Iterable[str]) -> dict[str, bool]:
    """Tell which parameters are transposed, as Conv1D's; refuse any of no linear layer."""
    modules, found = dict(build_empty(base).named_modules()), {}
    for name in names:
        module, own = modules.get(_module(name)), name.rpartition(".")[2]
        if not isinstance(module, nn.Linear | Conv1D) or own != "weight":
            raise UnsupportedFeatureError(
                f"{name}: expected the weight of an nn.Linear or a Conv1D, found {own} of a "
                f"{type(module).__name__}; a LoRA changes nothing else: merge the patch"
            )
        found[name] = isinstance(module, Conv1D)
    return found


def _factorize(
    values: Array, group: Group, numbers: Array, shape: Sequence[int]
) -> tuple[Array, Array]:
    """Factorize a matrix of few rows or columns as ``(rows, rank)`` times ``(rank, columns)``."""
    rows, columns = shape
    rank = np.arange(numbers.size)
    if group == "row":
        chosen = np.zeros((rows, rank.size), values.dtype)
        chosen[numbers, rank] = 1
        return chosen, values.reshape(rank.size, columns)
    chosen = np.zeros((rank.size, columns), values.dtype)
    chosen[rank, numbers] = 1
    return values.reshape(rows, rank.size), chosen


def _find_alpha(scale: float, rank: int) -> float:
    """Find the number that, divided by the rank, is the scale, or next to it."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return min(near, key=lambda number: abs(number / rank - scale))


def _open(
    adapter_dir: Path, out: Path, base: str | None, scale: float, overwrite: bool
) -> tuple[BaseModel, PatchSet]:
    """Find the base and read the patch, before anything is written."""
    check_target(out, overwrite, MergeError)
    base_model = find_base(base, [adapter_dir])
    patches = read_patches([(adapter_dir, scale)])
    check_apart(out, {"the base": base_model.path, "the patch": adapter_dir}, MergeError)
    return base_model, patches


def _count(patches: PatchSet) -> dict[str, int]:
    """Count the entries of each parameter that has some; refuse a patch of none."""
    counts = {name: indices.size for name, indices in patches.indices.items() if indices.size}
    if not counts:
        raise MergeError("adapter: expected a patch that changes entries, found none; give another")
    return counts


def _write(out: Path, config: PeftConfig, tensors: Mapping[str, Array], overwrite: bool) -> None:
    """Write an adapter of PEFT's own as a directory that appears whole or not at all."""
    with publish(out, overwrite, MergeError) as draft:
        config.save_pretrained(str(draft))
        written = read_json(draft / CONFIG_FILE, MergeError)
        # PEFT keeps them as a set, whose order differs from run to run.
        written["target_modules"] = sorted(written["target_modules"])
        write_json(draft / CONFIG_FILE, written)
        save_file(dict(tensors), draft / TENSORS_FILE, metadata={"format": "pt"})


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
