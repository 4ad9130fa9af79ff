"""A run made again on the command line: 0 the same, 3 differs, 1 if it can't be tried."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run, call


@pytest.fixture(scope="module")
def again(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, made again once for all tests; calling again compares alone."""
    out = tmp_path_factory.mktemp("made") / "again"
    assert call("reproduce", run.out, "--out", out).exit_code == 0
    return out


def test_the_same_run_is_the_same(run: Run, again: Path) -> None:
    called = call("reproduce", run.out, "--out", again)
    assert called.exit_code == 0
    content_id, *_ = [line for line in called.stdout.splitlines() if line.startswith("content id")]
    assert content_id.endswith("same")
    assert "IoU 1.0000" in called.stdout
    assert called.stdout.count("within the interval") == 4


def test_all_of_the_comparison_is_in_the_json(run: Run, again: Path) -> None:
    comparison = json.loads(call("reproduce", run.out, "--out", again, "--json").stdout)
    assert comparison["kind"] == "comparison"
    assert comparison["same"]


def test_a_run_that_differs_is_a_check_that_did_not_pass(
    run: Run, again: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(run.out, tmp_path / "run")
    record = json.loads((other / "reproduce.json").read_text())
    record["content_id"] = "sha256:" + "0" * 64
    record["environment"]["torch"] = "2.6.0"
    (other / "reproduce.json").write_text(json.dumps(record))
    called = call("reproduce", other, "--out", again)
    assert called.exit_code == 3
    lines = called.stdout.splitlines()
    assert next(line for line in lines if line.startswith("content id")).endswith("DIFFERS")
    assert next(line for line in lines if line.startswith("torch")).endswith("another environment")
    assert "It differs from what was recorded." in called.stderr


def test_changed_data_is_a_failure_of_one_line(run: Run, tmp_path: Path) -> None:
    other = shutil.copytree(run.out, tmp_path / "run")
    record = json.loads((other / "reproduce.json").read_text())
    record["data"]["train.benign"]["digest"] = "sha256:" + "0" * 64
    (other / "reproduce.json").write_text(json.dumps(record))
    called = call("reproduce", other, "--out", tmp_path / "again")
    assert called.exit_code == 1
    assert called.stdout == ""
    assert called.stderr.startswith("Error: train.benign: ")
    assert not (tmp_path / "again").exists()


def test_a_dry_run_tells_what_it_needs_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    called = call("reproduce", run.out, "--out", tmp_path / "again", "--dry-run")
    assert called.exit_code == 0
    assert [line.split()[0] for line in called.stdout.splitlines()] == [
        *("parameters", "memory", "patch")
    ]
    assert list(tmp_path.iterdir()) == []
