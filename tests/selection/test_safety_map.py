"""Safety maps made from selections: where the entries are, and on which base."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, digest
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.io import read_map, write_map
from safeweights_peft.patch.records import Mode, TensorRecord
from safeweights_peft.selection.scores import SCORES, build_map, score_entries
from safeweights_peft.selection.topk import select
from safeweights_peft.settings import Method
from tests.tiny_models import save_tiny_llama

SELECTION = {"method": "random", "seed": 3, "density": 0.05}


def random_map(path: Path, dtype: torch.dtype | str = "auto", k: int = 500) -> SafetyMap:
    base = resolve_base(str(path))
    model = load_model(base, dtype)
    selected = select(score_entries(SCORES[Method.RANDOM], eligible_parameters(model), {}, 3), k)
    return build_map(model, base, selected, SELECTION)


def entries_on_disk(path: Path, record: TensorRecord, indices: np.ndarray) -> np.ndarray:
    """The slow twin: lay every block out in memory, entry by entry, then pick the indices."""
    reader = CheckpointReader(path)
    memory = np.zeros(record.shape, DTYPES[record.dtype]).reshape(-1)
    for block in record.blocks:
        tensor = reader.read(block.key)
        for at in np.ndindex(*block.shape):
            steps = zip(block.strides, at, strict=True)
            memory[block.offset + sum(stride * i for stride, i in steps)] = tensor[at]
    return memory[indices]


@pytest.mark.parametrize(
    "model", ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
)
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16])
def test_base_digests_are_those_of_the_checkpoints_own_entries(
    model: str, dtype: torch.dtype | str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    safety_map = random_map(path, dtype)
    for name, record in safety_map.metadata.tensors.items():
        entries = entries_on_disk(path, record, safety_map.indices[name])
        assert record.base_digest == digest(entries), name
        assert record.count == entries.size


def test_a_map_is_the_same_whatever_dtype_the_base_was_loaded_in(tiny_llama_bf16: Path) -> None:
    wide, own = random_map(tiny_llama_bf16, torch.float32), random_map(tiny_llama_bf16)
    assert wide.metadata == own.metadata


def test_a_map_of_a_sharded_checkpoint_is_that_of_the_whole_one(
    tmp_path: Path, tiny_llama: Path
) -> None:
    sharded = save_tiny_llama(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert random_map(sharded).metadata.tensors == random_map(tiny_llama).metadata.tensors


def test_a_map_says_what_it_is_and_how_it_was_chosen(tiny_llama_bf16: Path) -> None:
    metadata = random_map(tiny_llama_bf16).metadata
    assert metadata.mode is Mode.SPA
    assert metadata.base_model_name_or_path == str(tiny_llama_bf16)
    assert metadata.revision is None
    assert metadata.transformers_version == transformers.__version__
    assert metadata.selection == SELECTION
    assert {record.dtype for record in metadata.tensors.values()} == {"bfloat16"}
    assert {record.merged_digest for record in metadata.tensors.values()} == {None}


@pytest.mark.parametrize("model", ["tiny_llama_bf16", "tiny_mixtral"])
def test_a_map_that_was_written_is_read_again(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    safety_map = random_map(request.getfixturevalue(model))
    written = write_map(tmp_path / "map", safety_map)
    actual = read_map(tmp_path / "map")
    assert actual.metadata == written
    assert actual.metadata.selection == SELECTION
    assert sum(indices.size for indices in actual.indices.values()) == 500
    for name, indices in safety_map.indices.items():
        assert np.array_equal(actual.indices[name], indices)
        assert np.array_equal(actual.scores[name], safety_map.scores[name])
        assert actual.metadata.tensors[name].base_digest == (
            safety_map.metadata.tensors[name].base_digest
        )
