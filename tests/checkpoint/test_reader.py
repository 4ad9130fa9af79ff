"""Reading tensors and entries of a checkpoint, from shards whose names are safe."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from safeweights_peft.checkpoint.reader import CheckpointReader, TensorInfo
from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import CheckpointError, ModelError
from tests.tiny_files import save_checkpoint

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(10).astype(DTYPES["bfloat16"]),
    "c": np.arange(6, dtype=np.float16).reshape(1, 6),
    "d": np.array(7, np.int64),
    "e": np.zeros((0, 3), np.float32),
}
FOUR = {name: np.full((2, 3), number, np.float32) for number, name in enumerate("abcd")}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_it_was_saved(tmp_path: Path, shards: int) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS, shards))
    assert reader.keys() == sorted(TENSORS)
    assert "a" in reader
    assert "z" not in reader
    for key, tensor in TENSORS.items():
        found = reader.read(key)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert found.tobytes() == tensor.tobytes()
        assert found.flags.writeable  # a copy, which changes no file


@pytest.mark.parametrize("shards", [1, 3])
def test_entries_are_gathered_by_flat_index(tmp_path: Path, shards: int) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS, shards))
    for key, tensor in TENSORS.items():
        indices = np.arange(tensor.size)[::2]
        np.testing.assert_array_equal(reader.gather(key, indices), tensor.reshape(-1)[indices])


@pytest.mark.parametrize("window_bytes", [8, 24, 2**20])
def test_windows_are_a_tensors_bytes_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr("safeweights_peft.checkpoint.reader.WINDOW_BYTES", window_bytes)
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS, 2))
    for key, tensor in TENSORS.items():
        windows = list(reader.read_windows(key))
        assert all(window.size <= window_bytes for window in windows)
        assert b"".join(window.tobytes() for window in windows) == tensor.tobytes()


def test_a_tensor_that_the_index_leaves_out_is_listed(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS, 2))
    assert reader.unlisted() == []
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["c"]
    index.write_text(json.dumps(content))
    assert CheckpointReader(tmp_path).unlisted() == ["c"]


def test_info_tells_what_is_on_disk(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS))
    info = reader.info("b")
    assert info == TensorInfo((10,), "bfloat16", "model.safetensors", info.offset, 20)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert raw[info.offset : info.offset + 20] == TENSORS["b"].tobytes()


@pytest.mark.parametrize("index", [-1, 12])
def test_an_index_out_of_range_is_refused(tmp_path: Path, index: int) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS))
    with pytest.raises(CheckpointError, match=rf"^a: expected indices from 0 to 11, .*{index}"):
        reader.gather("a", np.array([3, index]))


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS))
    with pytest.raises(CheckpointError, match="expected a tensor z, found none"):
        reader.info("z")


def test_an_index_that_contradicts_its_shards_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["a"]
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected ghost, as the index says, found no such"):
        CheckpointReader(tmp_path).info("ghost")


def test_a_tensor_in_two_shards_is_ambiguous(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, shards=2)
    reader = CheckpointReader(tmp_path)
    shard = reader.weight_map["b"]
    save_file({"b": TENSORS["b"], "a": TENSORS["a"]}, tmp_path / shard)
    with pytest.raises(CheckpointError, match=r"a: expected it in model-00001-of-00002.safetens"):
        reader.read("b")


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="as its header says"):
        CheckpointReader(tmp_path)


def test_a_quantized_tensor_may_be_there_but_not_be_read(tmp_path: Path) -> None:
    header = {"q": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    content = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(content).to_bytes(8, "little") + content + b"1234"
    )
    reader = CheckpointReader(tmp_path)
    assert reader.info("q").dtype == "F8_E8M0"
    with pytest.raises(CheckpointError, match="found F8_E8M0; use an unquantized checkpoint"):
        reader.read("q")


@pytest.mark.parametrize("window_bytes", [4, 12, 2**20])
@pytest.mark.parametrize(
    "indices",
    [[], [0], [29], list(range(30)), [0, 1, 2, 13, 29], [29, 3, 14, 4, 0], [5, 5, 2]],
    ids=str,
)
def test_entries_are_read_in_the_order_asked_for_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int, indices: list[int]
) -> None:
    monkeypatch.setattr("safeweights_peft.checkpoint.reader.WINDOW_BYTES", window_bytes)
    tensor = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    reader = CheckpointReader(save_checkpoint(tmp_path, {"a": np.ones(7, np.float16), "b": tensor}))
    for dtype in (np.int32, np.int64):
        found = reader.gather("b", np.array(indices, dtype))
        assert found.tobytes() == tensor.reshape(-1)[indices].tobytes()


@pytest.mark.parametrize(
    ("key", "shape", "dtype", "message"),
    [
        ("a", (4, 3), None, r"a: expected \[4, 3\] in .*, found float32 \[3, 4\]; look$"),
        ("a", None, "float16", r"a: expected float16 in .*, found float32 \[3, 4\]; look$"),
        ("a", (3, 4), "int8", r"a: expected int8 \[3, 4\] in .*, found float32 \[3, 4\]; look$"),
        ("z", (), "int8", r"z: expected int8 \[\] in .*, found none; look$"),
    ],
)
def test_a_tensor_of_another_kind_is_refused_by_its_key_and_parameter(
    tmp_path: Path, key: str, shape: tuple[int, ...] | None, dtype: str | None, message: str
) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, TENSORS))
    assert reader.check_tensor("a", (3, 4), "float32", hint="look") == reader.info("a")
    assert reader.check_tensor("d", (), hint="look") == reader.info("d")
    for name, start in ((None, ""), (key, ""), ("model.a", "model.a: ")):
        with pytest.raises(ModelError, match=f"^{start}{message}"):
            reader.check_tensor(key, shape, dtype, name=name, error=ModelError, hint="look")


def save_index(path: Path, weight_map: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_a_single_file_is_its_own_index(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, FOUR))
    assert reader.weight_map == dict.fromkeys("abcd", "model.safetensors")
    assert reader.shards == ["model.safetensors"]


def test_shards_are_found_by_the_index(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path, FOUR, shards=3))
    assert reader.weight_map.keys() == FOUR.keys()
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
    save_checkpoint(tmp_path / "inner", FOUR)
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
    save_checkpoint(tmp_path, FOUR, shards=2)
    save_checkpoint(tmp_path, FOUR)
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
