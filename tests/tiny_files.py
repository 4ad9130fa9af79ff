"""Tiny checkpoints, safety patches and safety maps, made with numpy alone.

Each parameter of a `Layout` is described by its record; a checkpoint for it holds random entries of
the record's blocks, and a patch for it has the right digests of base and merged entries.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

from safeweights_peft.delta import (
    DTYPES,
    WEIGHT_DTYPES,
    SparseDelta,
    add_rounded,
    digest,
    index_dtype,
)
from safeweights_peft.files import STORED_DTYPES
from safeweights_peft.patch.artifacts import Adapter, SafetyMap
from safeweights_peft.patch.groups import Group, count_groups, spread_groups
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord

Tensors = dict[str, np.ndarray]

SIDE_FILES = {
    "config.json": "{}",
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "free",
}


def cache_model(cache: Path, model: Path, commit: str) -> Path:
    """Lays a model out in a Hub cache as the main branch of someone/tiny, as the Hub's client does.

    Args:
        cache: the cache's directory.
        model: the model's.
        commit: of the main branch.

    Returns:
        The snapshot's directory.
    """
    repo = cache / "models--someone--tiny"
    shutil.copytree(model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit


def dense(name: str, shape: tuple[int, ...], dtype: str, **fields: Any) -> TensorRecord:
    """Record a parameter that is one tensor of the same name on disk."""
    return TensorRecord(shape=shape, dtype=dtype, blocks=(Block.dense(name, shape),), **fields)


def fused_experts(prefix: str, experts: int, inner: int, outer: int, dtype: str) -> TensorRecord:
    """Record gate_up_proj [E, 2I, H], whose halves are two [I, H] matrices per expert on disk."""
    blocks = tuple(
        Block(
            key=f"{prefix}.{expert}.{part}.weight",
            shape=(inner, outer),
            offset=(2 * expert + half) * inner * outer,
            strides=(outer, 1),
        )
        for expert in range(experts)
        for half, part in enumerate(("w1", "w3"))
    )
    return TensorRecord(shape=(experts, 2 * inner, outer), dtype=dtype, blocks=blocks)


def save_checkpoint(path: Path, tensors: Tensors, shards: int = 1) -> Path:
    """Save tensors as one file or as shards with an index, with the files that go beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for name, text in SIDE_FILES.items():
        (path / name).write_text(text)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    weight_map = {
        key: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors"
        for number, key in enumerate(sorted(tensors))
    }
    for shard in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == shard}
        save_file(part, path / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def load_checkpoint(path: Path) -> Tensors:
    """Load every tensor of every shard."""
    tensors: Tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        for key, stored in deserialize(shard.read_bytes()):  # load_file knows no float8
            flat = np.frombuffer(bytes(stored["data"]), STORED_DTYPES[stored["dtype"]])
            tensors[key] = flat.reshape(stored["shape"])
    return tensors


def random_checkpoint(records: Mapping[str, TensorRecord], seed: int = 0) -> Tensors:
    """Make every block of some parameters, and a tensor that no record names."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {"untouched.weight": random.normal(size=(3, 5)).astype(np.float32)}
    for record in records.values():
        for block in record.blocks:
            entries = random.normal(scale=0.1, size=block.shape)
            tensors[block.key] = entries.astype(WEIGHT_DTYPES[record.dtype])
    return tensors


def memory_entries(record: TensorRecord, tensors: Tensors) -> np.ndarray:
    """Build the parameter in memory from its blocks, entry by entry: the slow, obvious way."""
    memory = np.zeros(record.numel, WEIGHT_DTYPES[record.dtype])
    for block in record.blocks:
        for index in np.ndindex(*block.shape):
            steps = zip(block.strides, index, strict=True)
            memory[block.offset + sum(a * b for a, b in steps)] = tensors[block.key][index]
    return memory


def random_patch(
    records: Mapping[str, TensorRecord],
    tensors: Tensors,
    density: float = 0.1,
    values_dtype: str = "float32",
    scale: float = 1.0,
    seed: int = 1,
) -> Adapter:
    """Make a patch for a checkpoint, with true digests of base and merged entries."""
    random = np.random.default_rng(seed)

    def choose(record: TensorRecord) -> np.ndarray:
        count = max(1, int(record.numel * density))
        return np.sort(random.choice(record.numel, count, replace=False))

    return _make_patch(records, tensors, choose, random, values_dtype, scale, density)


def grouped_patch(
    records: Mapping[str, TensorRecord],
    tensors: Tensors,
    group: Group,
    fraction: float = 0.3,
    values_dtype: str = "float32",
    scale: float = 1.0,
    seed: int = 1,
) -> Adapter:
    """Make a patch of whole rows or columns, with true digests."""
    random = np.random.default_rng(seed)

    def choose(record: TensorRecord) -> np.ndarray:
        number, _ = count_groups(record.shape, group)
        numbers = random.choice(number, max(1, int(number * fraction)), replace=False)
        return spread_groups(np.sort(numbers), group, record.shape)

    return _make_patch(records, tensors, choose, random, values_dtype, scale, fraction)


def _make_patch(
    records: Mapping[str, TensorRecord],
    tensors: Tensors,
    choose: Callable[[TensorRecord], np.ndarray],
    random: np.random.Generator,
    values_dtype: str,
    scale: float,
    density: float,
) -> Adapter:
    deltas, filled = {}, {}
    for name, record in records.items():
        indices = choose(record).astype(index_dtype(record.numel))
        count = indices.size
        values = random.normal(scale=0.05, size=count).astype(DTYPES[values_dtype])
        deltas[name] = SparseDelta(record.shape, indices, values)
        base = memory_entries(record, tensors)[indices]
        merged = add_rounded(base, values, scale)
        filled[name] = replace(record, base_digest=digest(base), merged_digest=digest(merged))
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path="someone/tiny",
        revision="0123abc",
        values_dtype=values_dtype,
        scale=scale,
        transformers_version="5.23.0",
        selection={"method": "esi", "density": density},
        tensors=filled,
    )
    return Adapter(metadata, deltas)


def as_map(adapter: Adapter) -> SafetyMap:
    """Make a safety map of the same entries."""
    tensors = {
        name: replace(record, merged_digest=None)
        for name, record in adapter.metadata.tensors.items()
    }
    metadata = replace(
        adapter.metadata, mode=Mode.SPA, values_dtype="float32", scale=1.0, tensors=tensors
    )
    deltas = adapter.deltas
    return SafetyMap(
        metadata,
        indices={name: delta.indices for name, delta in deltas.items()},
        scores={name: np.abs(delta.values.astype(np.float32)) for name, delta in deltas.items()},
    )


def edit_config(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change an adapter's config in place."""
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def edit_tensors(path: Path, edit: Callable[[Tensors], object]) -> None:
    """Change an adapter's tensors in place, and nothing else."""
    file = path / "adapter_model.safetensors"
    tensors = {key: np.array(value) for key, value in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def copy_checkpoint(source: Path, out: Path, edit: Callable[[Tensors], object]) -> Path:
    """Copy a model's directory with its tensors changed; shards become one file."""
    tensors = {key: np.array(value) for key, value in load_checkpoint(source).items()}
    edit(tensors)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
