"""Copies of files, by whatever the file system can do."""

import errno
import os
from pathlib import Path

import pytest

from safeweights_peft.checkpoint.writer import copy_file

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
