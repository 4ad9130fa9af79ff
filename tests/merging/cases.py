"""Layouts of a base, and the obvious twin of merging into it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import digest
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import write_adapter
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import TensorRecord
from tests.tiny_files import (
    Tensors,
    dense,
    fused_experts,
    random_checkpoint,
    random_patch,
    save_checkpoint,
)

EMBEDDINGS, UP, EXPERTS = "model.embed_tokens.weight", "model.up.weight", "model.experts.gate_up"


def plain_layout(dtype: str) -> dict[str, TensorRecord]:
    return {UP: dense(UP, (8, 9), dtype), "model.norm.weight": dense("norm", (9,), dtype)}


def tied_layout(dtype: str) -> dict[str, TensorRecord]:
    tied = dense(EMBEDDINGS, (11, 8), dtype, tied_keys=("lm_head.weight",))
    return {EMBEDDINGS: tied} | plain_layout(dtype)


def experts_on_disk(dtype: str) -> dict[str, TensorRecord]:
    return {EXPERTS: fused_experts("block_sparse_moe.experts", 3, 4, 5, dtype)}


def fused_on_disk(dtype: str) -> dict[str, TensorRecord]:
    return {EXPERTS: dense(EXPERTS, (3, 8, 5), dtype)}


def transposed_on_disk(dtype: str) -> dict[str, TensorRecord]:
    block = Block(key="up.t", shape=(9, 8), offset=0, strides=(1, 9))
    return {UP: TensorRecord(shape=(8, 9), dtype=dtype, blocks=(block,))}


LAYOUTS = [plain_layout, tied_layout, experts_on_disk, fused_on_disk, transposed_on_disk]


def slow_merge(tensors: Tensors, *patches: tuple[Adapter, float]) -> Tensors:
    """The obvious twin: every block entry by entry, float32 products and sums, one rounding."""
    totals: Tensors = {}
    for adapter, factor in patches:
        for name, record in adapter.metadata.tensors.items():
            delta = adapter.deltas[name]
            values = dict(zip(delta.indices.tolist(), delta.values, strict=True))
            blocks = list(record.blocks)
            blocks += [replace(blocks[0], key=key) for key in record.tied_keys if key in tensors]
            for block in blocks:
                total = totals.setdefault(block.key, tensors[block.key].astype(np.float32))
                for index in np.ndindex(*block.shape):
                    steps = zip(block.strides, index, strict=True)
                    flat = block.offset + sum(stride * at for stride, at in steps)
                    if flat in values:
                        total[index] += np.float32(factor) * np.float32(values[flat])
    return tensors | {key: total.astype(tensors[key].dtype) for key, total in totals.items()}


def assert_same_tensors(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert found[key].tobytes() == tensor.tobytes(), key


def count_work(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], Counter[str]]:
    """Count from now on how often each checkpoint's tensors are gathered from, and each hash."""
    reads: Counter[str] = Counter()
    hashes: Counter[str] = Counter()
    gather = CheckpointReader.gather

    def counted_gather(reader: CheckpointReader, key: str, indices: np.ndarray) -> np.ndarray:
        reads[f"{reader.directory.name}: {key}"] += 1
        return gather(reader, key, indices)

    def counted_digest(*arrays: np.ndarray) -> str:
        hashes[digest(*arrays)] += 1
        return digest(*arrays)

    monkeypatch.setattr(CheckpointReader, "gather", counted_gather)
    for room in ("patch.records", "merging.gather", "merging.sums"):
        monkeypatch.setattr(f"safeweights_peft.{room}.digest", counted_digest)
    return reads, hashes


class Case:
    """A base, a patch for it, and where the merged model goes."""

    def __init__(self, root: Path, records: dict[str, TensorRecord], **options: object) -> None:
        shards = options.pop("shards", 1)
        head = options.pop("head", False)
        self.tensors = random_checkpoint(records)
        if head:
            self.tensors["lm_head.weight"] = self.tensors[EMBEDDINGS].copy()
        self.adapter = random_patch(records, self.tensors, **options)  # type: ignore[arg-type]
        self.base = save_checkpoint(root / "base", self.tensors, shards)  # type: ignore[arg-type]
        self.patch, self.out = root / "patch", root / "out"
        self.records = records
        write_adapter(self.patch, self.adapter)

    def add_patch(self, name: str = "second", seed: int = 2, **options: object) -> Adapter:
        """Write another patch of the same base, beside the first."""
        adapter = random_patch(self.records, self.tensors, seed=seed, **options)  # type: ignore[arg-type]
        write_adapter(self.patch.with_name(name), adapter)
        return adapter

    def files(self) -> dict[str, bytes]:
        """Everything in the base's directory."""
        paths = (path for path in self.base.rglob("*") if path.is_file())
        return {path.relative_to(self.base).as_posix(): path.read_bytes() for path in paths}

    def change_base(self, edit: Callable[[Tensors], object]) -> None:
        edit(self.tensors)
        save_checkpoint(self.base, self.tensors)
