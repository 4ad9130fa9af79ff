"""Strict JSON, safetensors headers, and directories that appear whole or not at all."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import CheckpointError, FormatError
from safeweights_peft.files import (
    MAX_JSON_BYTES,
    check_target,
    count_data,
    parse_json,
    publish,
    read_header,
    read_json,
)


def safetensors_bytes(header: object, data: bytes, length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        (b'{"a": NaN}', "found NaN, which is not JSON"),
        (b'{"a": -Infinity}', "found -Infinity"),
        (b'{"a": 1', "expected JSON"),
        (b"", "expected JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"a": "\xff"}', "expected JSON, found 'utf-8' codec"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "expected JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON, found Exceeds the limit"),
    ],
)
def test_json_is_read_strictly(content: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_json(content, "here", FormatError)


def test_whole_characters_may_be_escaped() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "here", FormatError) == {"a": "\U0001f600"}


def test_a_json_file_must_be_a_file_of_sane_size(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected a file, found nothing"):
        read_json(tmp_path / "config.json", FormatError)
    with pytest.raises(FormatError, match="expected a file, found something else"):
        read_json(tmp_path, FormatError)
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="expected a file, found something else"):
        read_json(tmp_path / "zero", FormatError)
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(FormatError, match="expected at most 100000000 bytes, found 100000001"):
        read_json(tmp_path / "huge.json", FormatError)


names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
stored = st.tuples(
    st.sampled_from([np.dtype(np.int32), np.dtype(np.int64), np.dtype(bool), *DTYPES.values()]),
    st.lists(st.integers(0, 3), max_size=3),
)


@settings(deadline=None)
@given(st.dictionaries(names, stored, max_size=5))
def test_headers_of_the_safetensors_library_are_read(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, tuple[np.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    random = np.random.default_rng(0)
    tensors = {
        name: random.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in layout.items()
    }
    tensors = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path, FormatError)
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = header[name].open(path)
        assert found.dtype == tensor.dtype
        assert not found.flags.writeable or not found.size
        np.testing.assert_array_equal(found.reshape(header[name].shape), tensor)


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    data = b"\x07" + np.array([1.5, -2], np.float32).tobytes()
    content = json.dumps(header).encode()
    path.write_bytes(safetensors_bytes(content + b" " * (len(content) % 2), data))
    assert read_header(path, FormatError)["b"].open(path).tolist() == [1.5, -2]


def test_a_dtype_without_numpy_may_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry("F8_E8M0", [4], 0, 4)}, b"1234"))
    assert read_header(path, FormatError)["a"].dtype == "F8_E8M0"


I32 = entry("I32", [1], 0, 4)
HEADERS = [
    (b"", "expected a safetensors header"),
    (b"\x01\x02\x03", "expected a safetensors header"),
    (safetensors_bytes({"a": I32}, b"1234", length=2**63), "expected a safetensors header"),
    (safetensors_bytes({"a": I32}, b"", length=99), "found 99 bytes of it in"),
    (safetensors_bytes({"a": I32}, b"1234", length=20), "header: expected JSON"),
    (safetensors_bytes(b"not json at all", b""), "header: expected JSON"),
    (safetensors_bytes([1], b""), "header: expected a JSON object"),
    (
        safetensors_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(I32).encode(),) * 2), b"1234"),
        "the key 'a' twice",
    ),
    (safetensors_bytes({"a": I32}, b"123"), "expected 73 bytes, as its header says, found 72"),
    (safetensors_bytes({"a": I32}, b"12345"), "expected 73 bytes, as its header says, found 74"),
    (safetensors_bytes({"a": 3}, b""), "'a': expected dtype, shape and data_offsets, found 3"),
    (safetensors_bytes({"a": I32 | {"x": 1}}, b"1234"), "expected dtype, shape and data_offsets"),
    (safetensors_bytes({"a": {"dtype": "I32"}}, b""), "expected dtype, shape and data_offsets"),
    (safetensors_bytes({"a": I32 | {"dtype": 3}}, b"1234"), "expected a dtype and a shape"),
    (safetensors_bytes({"a": I32 | {"shape": 1}}, b"1234"), "expected a dtype and a shape"),
    (safetensors_bytes({"a": I32 | {"shape": [-1]}}, b"1234"), "expected a dtype and a shape"),
    (safetensors_bytes({"a": I32 | {"shape": [True]}}, b"1234"), "expected a dtype and a shape"),
    (safetensors_bytes({"a": I32 | {"shape": [1] * 65}}, b"1234"), "expected a dtype and a shape"),
    (safetensors_bytes({"a": entry("I32", [2**62, 2**62], 0, 4)}, b"1234"), "found 4"),
    (safetensors_bytes({"a": entry("I32", [2], 0, 4)}, b"1234"), "expected 8 bytes for I32"),
    (safetensors_bytes({"a": entry("I32", [1], 4, 0)}, b"1234"), "expected ascending"),
    (safetensors_bytes({"a": entry("I32", [1], -4, 0)}, b"1234"), "expected ascending"),
    (safetensors_bytes({"a": I32 | {"data_offsets": [0]}}, b"1234"), "expected ascending"),
    (safetensors_bytes({"a": entry("I32", [1], 2**70, 2**70 + 4)}, b""), "expected ascending"),
    (safetensors_bytes({"a": entry("I32", [1], 2, 6)}, b"123456"), "'a': expected bytes from 69"),
    (
        safetensors_bytes({"a": I32, "b": entry("I32", [1], 2, 6)}, b"123456"),
        "'b': expected bytes from",
    ),
    (
        safetensors_bytes({"a": I32, "b": entry("I32", [1], 8, 12)}, b"123456789012"),
        "'b': expected bytes from",
    ),
    (safetensors_bytes({"\x1b[2J": 3}, b""), r"'\\x1b\[2J': expected dtype"),
]


@pytest.mark.parametrize(("content", "message"), HEADERS, ids=range(len(HEADERS)))
def test_a_broken_header_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path, CheckpointError)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700


def fill(directory: Path, name: str = "new") -> None:
    (directory / "inner").mkdir()
    (directory / "inner" / name).write_text(name)


def fill_and_fail(directory: Path, failure: type[BaseException]) -> None:
    fill(directory)
    raise failure


def names_in(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    with publish(tmp_path / "deep" / "out", False, FormatError) as draft:
        fill(draft)
        assert not (tmp_path / "deep" / "out").exists()
        assert draft.parent == tmp_path / "deep"
    assert names_in(tmp_path) == ["deep", "deep/out", "deep/out/inner", "deep/out/inner/new"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interruption_leaves_what_was_there(
    tmp_path: Path, interruption: type[BaseException], exists: bool
) -> None:
    if exists:
        fill(tmp_path, "old")
    before = names_in(tmp_path)
    target = tmp_path / "inner" if exists else tmp_path / "out"
    with pytest.raises(interruption), publish(target, True, FormatError) as draft:
        fill_and_fail(draft, interruption)
    assert names_in(tmp_path) == before


def test_a_failed_rename_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    before = names_in(tmp_path)
    rename = Path.rename

    def fail_for_drafts(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_drafts)
    monkeypatch.setattr("safeweights_peft.files._exchange", lambda *_: False)
    with (
        pytest.raises(FormatError, match="expected a writable directory, found no; free space"),
        publish(tmp_path / "out", True, FormatError) as draft,
    ):
        fill(draft)
    assert names_in(tmp_path) == before


def test_an_old_directory_is_replaced_whole_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    with pytest.raises(FormatError, match="found files; give --overwrite"):
        check_target(out, False, FormatError)
    with publish(out, True, FormatError) as draft:
        fill(draft)
    assert names_in(tmp_path) == ["out", "out/inner", "out/inner/new"]


def test_a_directory_that_came_meanwhile_stays(tmp_path: Path) -> None:
    late = publish(tmp_path / "out", False, FormatError)
    fill(late.__enter__())
    with publish(tmp_path / "out", False, FormatError) as first:
        fill(first, "first")
    with pytest.raises(FormatError, match="not empty"):
        late.__exit__(None, None, None)
    assert names_in(tmp_path) == ["out", "out/inner", "out/inner/first"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with publish(tmp_path / "out", False, FormatError) as draft:
        fill(draft)
    assert names_in(tmp_path) == ["out", "out/inner", "out/inner/new"]


def test_a_link_keeps_pointing_to_the_new_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with publish(tmp_path / "link", False, FormatError) as draft:
        fill(draft)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "inner" / "new").is_file()


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FormatError, match="expected a directory or nothing, found a file"):
        check_target(tmp_path / "out", True, FormatError)


def test_the_current_directory_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for path in (Path("."), tmp_path, tmp_path / "inner"):
        with pytest.raises(FormatError, match="expected another directory, found the current"):
            check_target(path, True, FormatError)


def test_a_directory_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(FormatError, match="expected a path below directories, found the file"),
        publish(tmp_path / "file" / "out", False, FormatError),
    ):
        pass
    assert names_in(tmp_path) == ["file"]


def test_published_files_have_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    with publish(tmp_path / "out", False, FormatError) as draft:
        save_file({"a": np.zeros(1)}, draft / "file")  # the library makes it for its owner alone
    for name in ("", "file"):
        assert (
            os.stat(tmp_path / "out" / name).st_mode == os.stat(tmp_path / "usual" / name).st_mode
        )


def test_bytes_that_are_no_hole_are_counted_until_there_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * 10_000)
    assert count_data(path, 1) >= 10_000
    with path.open("wb") as file:
        file.write(b"\1" * 4096)
        file.truncate(2**40)
    assert 4096 <= count_data(path, 2**40) < 2**30
    (tmp_path / "empty").touch()
    assert count_data(tmp_path / "empty", 1) == 0
