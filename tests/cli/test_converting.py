"""Converting by the command line: both ways, with the base that the patch names."""

import json
from pathlib import Path

from safeweights_peft.patch.io import read_metadata
from tests.cli.conftest import Run, call
from tests.tiny_files import edit_config


def test_convert_finds_the_base_that_the_patch_names(run: Run, tmp_path: Path) -> None:
    compact, plain = tmp_path / "compact", tmp_path / "plain"
    called = call("convert", run.out / "patch", "--encoding", "compact", "--out", compact, "--json")
    assert called.exit_code == 0, called.stderr
    report = json.loads(called.stdout)
    assert report["after_bytes_per_entry"] < report["before_bytes_per_entry"]
    assert read_metadata(compact).needs_base
    called = call("convert", compact, "--encoding", "plain", "--out", plain, "--json")
    assert json.loads(called.stdout)["content_id"] == report["content_id"]
    short = report["content_id"].removeprefix("sha256:")[:12]
    assert short in call("inspect", plain).stdout
    assert call("verify", compact, "--base", run.base).exit_code == 0


def test_convert_without_a_named_base_keeps_the_values(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    call("convert", run.out / "patch", "--encoding", "plain", "--out", first)
    edit_config(first, lambda config: config.update(base_model_name_or_path=None))
    called = call("convert", first, "--encoding", "compact", "--out", second, "--json")
    assert json.loads(called.stdout)["changed_values"] == 0
    assert not read_metadata(second).needs_base
    given = tmp_path / "given"
    call("convert", first, "--encoding", "compact", "--base", run.base, "--out", given)
    assert read_metadata(given).needs_base


def test_a_map_is_converted_without_its_base(run: Run, tmp_path: Path) -> None:
    called = call("convert", run.out / "map", "--encoding", "compact", "--out", tmp_path / "map")
    assert called.exit_code == 0, called.stderr
    assert "content id" in called.stdout
    assert "_" not in called.stdout.replace(str(tmp_path), "")  # no raw keys


def test_convert_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    compact = tmp_path / "compact"
    call("convert", run.out / "patch", "--encoding", "compact", "--out", compact)
    edit_config(compact, lambda config: config.update(base_model_name_or_path=None))
    called = call("convert", compact, "--encoding", "plain", "--out", tmp_path / "plain")
    assert called.exit_code == 1
    assert "expected the base that its values are steps from" in called.stderr
    assert not (tmp_path / "plain").exists()
