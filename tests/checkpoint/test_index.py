"""Which shard holds which tensor, and which names are never followed."""

import json
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import CheckpointError
from tests.tiny_files import save_checkpoint

TENSORS = {name: np.full((2, 3), number, np.float32) for number, name in enumerate("abcd")}


def save_index(path: Path, weight_map: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_a_single_file_is_its_own_index(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS))
    assert reader.weight_map == dict.fromkeys("abcd", "model.safetensors")
    assert reader.shards == ["model.safetensors"]


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS, shards=3))
    assert reader.weight_map.keys() == TENSORS.keys()
    assert reader.shards == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "C:\\model.safetensors",
        "model.safetensors:stream.safetensors",
        "model.bin",
        "..",
        ".",
        "",
        "a\0.safetensors",
        "a\n.safetensors",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_a_shard_name_with_a_trick_is_refused(tmp_path: Path, shard: object) -> None:
    save_checkpoint(tmp_path / "inner", TENSORS)
    save_index(tmp_path / "out", {"a": shard})
    with pytest.raises(CheckpointError, match=r"index.json: a: expected a file name ending in"):
        CheckpointReader(tmp_path / "out")


@pytest.mark.parametrize("weight_map", [{}, None, ["a"], 3])
def test_an_index_must_map_keys_to_shards(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(CheckpointError, match="weight_map: expected an object of shard names"):
        CheckpointReader(save_index(tmp_path, weight_map))


def test_a_broken_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "a": 2}}')
    with pytest.raises(CheckpointError, match="the key 'a' twice"):
        CheckpointReader(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_index(tmp_path, {"a": "model-1.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-1.safetensors: expected a shard"):
        CheckpointReader(tmp_path)


def test_two_checkpoints_in_one_directory_are_ambiguous(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, shards=2)
    save_checkpoint(tmp_path, TENSORS)
    with pytest.raises(CheckpointError, match="found both; remove the stale one"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"only pickled weights, .* convert them"):
        CheckpointReader(tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found neither; give the directory of a model"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="found neither"):
        CheckpointReader(tmp_path / "missing")
