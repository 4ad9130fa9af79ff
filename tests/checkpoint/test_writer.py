"""Patched copies of a checkpoint, made by whatever the file system can do."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import (
    CheckpointDraft,
    copy_file,
    draft_copy,
    files_that_load,
)
from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import CheckpointError
from tests.tiny_files import SIDE_FILES, load_checkpoint, save_checkpoint

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(10).astype(DTYPES["bfloat16"]),
    "c": np.arange(6, dtype=np.float16).reshape(1, 6),
}


def names_in(path: Path) -> set[str]:
    return {child.relative_to(path).as_posix() for child in path.rglob("*") if child.is_file()}


@pytest.mark.parametrize("shards", [1, 2])
def test_only_the_patched_entries_change(tmp_path: Path, shards: int) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS, shards)
    before = {name: (base / name).read_bytes() for name in names_in(base)}
    indices = np.array([0, 5], np.int32)
    with draft_copy(CheckpointReader(base), tmp_path / "out") as draft:
        for key, tensor in TENSORS.items():
            draft.patch(key, indices, np.array([-1, -2]).astype(tensor.dtype))
            np.testing.assert_array_equal(draft.reader.gather(key, indices), [-1, -2])
    expected = {key: tensor.copy() for key, tensor in TENSORS.items()}
    for key, found in load_checkpoint(tmp_path / "out").items():
        expected[key].reshape(-1)[indices] = [-1, -2]
        assert found.tobytes() == expected[key].tobytes()
    assert before == {name: (base / name).read_bytes() for name in names_in(base)}
    for name in names_in(base):
        size = (tmp_path / "out" / name).stat().st_size
        assert size == len(before[name])


@pytest.mark.parametrize("window_bytes", [4, 12, 2**20])
@pytest.mark.parametrize("order", [[0, 1, 7, 11], [11, 0, 7, 1]])
def test_entries_are_written_in_any_order_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int, order: list[int]
) -> None:
    monkeypatch.setattr("safeweights_peft.checkpoint.reader.WINDOW_BYTES", window_bytes)
    reader = CheckpointReader(save_checkpoint(tmp_path / "base", TENSORS))
    new = np.array([-1, -2, -3, -4], np.float32)
    with draft_copy(reader, tmp_path / "out") as draft:
        draft.patch("a", np.array(order), new)
    expected = TENSORS["a"].copy()
    expected.reshape(-1)[order] = new
    assert CheckpointReader(tmp_path / "out").read("a").tobytes() == expected.tobytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_each_shard_can_be_changed_as_soon_as_it_is_copied(tmp_path: Path, shards: int) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path / "base", TENSORS, shards))

    def change(draft: CheckpointDraft, shard: str) -> None:
        for key, tensor in TENSORS.items():
            if draft.reader.info(key).shard == shard:
                draft.patch(key, np.array([1]), np.array([-1]).astype(tensor.dtype))

    with draft_copy(reader, tmp_path / "out", change=change):
        pass
    for key, found in load_checkpoint(tmp_path / "out").items():
        assert found.reshape(-1)[1] == -1
        assert reader.read(key).reshape(-1)[1] == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_a_shard_that_changed_since_it_was_read_is_not_copied(tmp_path: Path, shards: int) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path / "base", TENSORS, shards))
    for key in TENSORS:
        reader.read(key)
    save_checkpoint(tmp_path / "base", TENSORS, shards)
    with (
        pytest.raises(CheckpointError, match="found it changed meanwhile"),
        draft_copy(reader, tmp_path / "out"),
    ):
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", TENSORS)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_tensor_written_whole_changes_and_no_other(tmp_path: Path, shards: int, key: str) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS, shards)
    new = (TENSORS[key].astype(np.float32) - 7).astype(TENSORS[key].dtype)
    with draft_copy(CheckpointReader(base), tmp_path / "out") as draft:
        draft.write(key, new.T.copy().T)  # its rows need not be contiguous
    for name, found in load_checkpoint(tmp_path / "out").items():
        assert found.tobytes() == (new if name == key else TENSORS[name]).tobytes()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            np.zeros((3, 4), np.float16),
            r"a: expected float16 \[3, 4\] in .*, found float32",
        ),
        (
            np.zeros((4, 3), np.float32),
            r"a: expected float32 \[4, 3\] in .*, found float32 \[3, 4\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_not_written(
    tmp_path: Path, tensor: np.ndarray, message: str
) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path / "base", TENSORS))
    with (
        pytest.raises(CheckpointError, match=message),
        draft_copy(reader, tmp_path / "out") as draft,
    ):
        draft.write("a", tensor)
    assert not (tmp_path / "out").exists()


def test_what_loading_needs_comes_along_and_nothing_else(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS, shards=2)
    needed = ["tokenizer.model.v3", "vocab.txt", "modeling_tiny.py", "preprocessor_config.json"]
    needed += ["additional_chat_templates/tool.jinja"]
    stays = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "model.gguf",
        "trainer_state.json",
        "optimizer.pt",
        ".gitattributes",
        "checkpoint-10/config.json",
        "onnx/model.onnx",
    ]
    for name in needed + stays:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    with draft_copy(CheckpointReader(base), tmp_path / "out"):
        pass
    shards = set(CheckpointReader(base).shards)
    index = {"model.safetensors.index.json"}
    assert names_in(tmp_path / "out") == {*SIDE_FILES, *needed} | shards | index


def test_links_are_copied_as_files(tmp_path: Path) -> None:
    blobs = save_checkpoint(tmp_path / "blobs", TENSORS)
    base = tmp_path / "base"
    base.mkdir()
    for name in names_in(blobs):
        (base / name).symlink_to(blobs / name)
    with draft_copy(CheckpointReader(base), tmp_path / "out") as draft:
        draft.patch("a", np.array([0]), np.array([9], np.float32))
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert CheckpointReader(blobs).read("a")[0, 0] == 0


def test_a_read_only_base_can_be_copied_and_patched(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS)
    for name in names_in(base):
        (base / name).chmod(0o444)
    with draft_copy(CheckpointReader(base), tmp_path / "out") as draft:
        draft.patch("a", np.array([0]), np.array([9], np.float32))
    assert CheckpointReader(tmp_path / "out").read("a")[0, 0] == 9


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS, shards=3)
    calls: list[tuple[int, int]] = []
    with draft_copy(
        CheckpointReader(base), tmp_path / "out", progress=lambda *sizes: calls.append(sizes)
    ):
        pass
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == sum((base / n).stat().st_size for n in names_in(base))


def test_an_abort_leaves_nothing(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS)
    with (
        pytest.raises(CheckpointError, match=r"^a: expected float16 in .*, found float32"),
        draft_copy(CheckpointReader(base), tmp_path / "out") as draft,
    ):
        draft.patch("a", np.array([0]), np.array([9], np.float16))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("index", [-1, 12])
def test_a_patch_outside_its_tensor_is_refused(tmp_path: Path, index: int) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS)
    with (
        pytest.raises(CheckpointError, match=r"^a: expected indices from 0 to 11"),
        draft_copy(CheckpointReader(base), tmp_path / "out") as draft,
    ):
        draft.patch("a", np.array([index]), np.array([9], np.float32))


def test_an_existing_directory_is_kept_unless_asked(tmp_path: Path) -> None:
    reader = CheckpointReader(save_checkpoint(tmp_path / "base", TENSORS))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with (
        pytest.raises(CheckpointError, match="give --overwrite"),
        draft_copy(reader, tmp_path / "out"),
    ):
        pass
    with draft_copy(reader, tmp_path / "out", overwrite=True):
        pass
    assert names_in(tmp_path / "out") == {*SIDE_FILES, "model.safetensors"}


def test_the_files_that_load_are_the_copied_ones_but_for_index_and_licence(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, 2)
    others = ["README.md", "NOTICE.txt", "pytorch_model.bin", "training.log", ".hidden.json"]
    for name in ("license.py", "adapter_config.json", *others):
        (tmp_path / name).write_text("{}")
    expected = {*SIDE_FILES, "license.py", "adapter_config.json"} - {"LICENSE"}
    assert files_that_load(tmp_path) == sorted(expected)


CONTENT = bytes(range(256)) * 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def fail_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", fail, raising=False)


def test_a_copy_has_the_bytes_and_is_a_file_of_its_own(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"an old one, longer" * 1000)
    copy_file(source, target)
    assert target.read_bytes() == CONTENT
    assert target.stat().st_nlink == 1
    target.write_bytes(b"changed")
    assert source.read_bytes() == CONTENT


def test_a_link_is_copied_as_what_it_points_to(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    copy_file(tmp_path / "link", tmp_path / "target")
    assert not (tmp_path / "target").is_symlink()
    assert (tmp_path / "target").read_bytes() == CONTENT


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_is_given_a_plain_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_with(number, monkeypatch)
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_system_without_the_call_is_given_a_plain_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_copy_that_comes_in_parts_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(reader: int, writer: int, left: int) -> int:
        return os.write(writer, os.read(reader, min(left, 1000)))

    monkeypatch.setattr(os, "copy_file_range", some, raising=False)
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_file_system_that_copies_nothing_is_given_a_plain_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0, raising=False)
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_full_disk_is_not_tried_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(errno.ENOSPC, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        copy_file(source, tmp_path / "target")
