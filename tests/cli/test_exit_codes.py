"""0 done, 1 failed, 2 wrong usage, 3 inconclusive; an error is one line.

What `verify` makes of them is in `test_trust`.
"""

import errno
import json
import os
from pathlib import Path

import pytest

from safeweights_peft.errors import ModelError
from safeweights_peft.patch.io import inspect, write_map
from tests.cli.conftest import Run, call, call_afresh
from tests.tiny_files import as_map, dense, random_checkpoint, random_patch
from tests.tiny_jobs import content
from tests.tiny_models import save_tiny_llama


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.strip()]


@pytest.mark.parametrize("command", ["enhance", "score", "eval"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_missing_base_is_a_failure_of_one_line(
    command: str, dry_run: bool, options: dict[str, list[str]], tmp_path: Path
) -> None:
    called = call(
        *(command, tmp_path / "nowhere", "--out", tmp_path / "out", *options[command]),
        *(["--dry-run"] if dry_run else []),
    )
    assert called.exit_code == 1
    assert called.stdout == ""
    (line,) = error_lines(called.stderr)
    assert line.startswith(f"Error: {tmp_path / 'nowhere'}: expected a model directory")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_shows_no_traceback(tmp_path: Path) -> None:
    done = call_afresh("eval", tmp_path / "nowhere", "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(error_lines(done.stderr)) == 1


def test_a_full_disk_is_a_failure_of_one_line(
    run: Run, options: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safeweights_peft.files.write_json", full)
    called = call("eval", run.base, *options["eval"], "--out", tmp_path / "result.json")
    assert called.exit_code == 1
    assert called.stdout.startswith("ASR")  # what was measured is not lost
    line = error_lines(called.stderr)[-1]
    assert line.startswith(f"Error: {tmp_path / 'result.json'}: ")
    assert line.endswith("No space left on device; free some space, and call again")


def test_eval_never_writes_over_a_file(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text("precious")
    called = call("eval", run.base, *options["eval"], "--out", tmp_path / "result.json")
    assert called.exit_code == 1
    assert "result.json: expected no file there, found one" in called.stderr
    assert (tmp_path / "result.json").read_text() == "precious"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = call_afresh("--debug", "eval", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ModelError: " in done.stderr


def test_debug_lets_the_error_itself_through(tmp_path: Path) -> None:
    assert isinstance(call("--debug", "eval", tmp_path / "nowhere").exception, ModelError)


def test_a_patch_for_another_base_is_a_failure(run: Run, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    called = call("merge", other, run.out / "patch", "--out", tmp_path / "merged")
    assert called.exit_code == 1
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("command", ["score", "train", "preserve", "probe", "merge", "report"])
def test_an_existing_result_is_a_failure_unless_it_may_be_replaced(
    command: str, run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    safety_map = ["--map", run.out / "map"]
    inputs = dict.fromkeys(["train", "preserve", "probe"], safety_map)
    inputs["merge"] = [run.out / "patch"]
    (tmp_path / "file").write_text("old")
    source = run.out / "map" if command == "report" else run.base
    job = [command, source, *inputs.get(command, []), "--out", tmp_path]
    job += options.get(command, [])
    refused = call(*job)
    assert refused.exit_code == 1
    assert content(tmp_path) == {"file": b"old"}
    assert call(*job, "--overwrite").exit_code == 0
    assert "file" not in content(tmp_path)


def test_preserving_under_a_patch_that_is_not_merged_is_a_failure_of_one_line(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "patch", "--out", tmp_path / "model"]
    called = call("preserve", run.base, *inputs, *options["preserve"])
    assert called.exit_code == 1
    assert called.stdout == ""
    (line,) = error_lines(called.stderr)
    assert line.endswith("give the checkpoint that `safeweights merge` wrote")
    assert list(tmp_path.iterdir()) == []


def test_maps_of_models_of_other_shapes_are_a_failure_of_one_line(run: Run, tmp_path: Path) -> None:
    name = next(iter(inspect(run.out / "map")["tensors"]))
    record = {name: dense(name, (2, 3), "float32")}
    write_map(tmp_path / "other", as_map(random_patch(record, random_checkpoint(record), 1.0)))
    called = call("compare", run.out / "map", tmp_path / "other")
    assert called.exit_code == 1
    assert called.stdout == ""
    (line,) = error_lines(called.stderr)
    assert line.endswith("found [2, 3]; compare maps of one model")


def test_probing_under_a_patch_that_is_not_merged_is_a_failure_of_one_line(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    inputs = ["--map", run.out / "patch", "--out", tmp_path / "probe"]
    called = call("probe", run.base, *inputs, *options["probe"])
    assert called.exit_code == 1
    assert called.stdout == ""
    assert error_lines(called.stderr)[-1].endswith(
        "give the checkpoint that `safeweights merge` wrote"
    )
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_differ_are_a_failure_of_one_line(run: Run, tmp_path: Path) -> None:
    called = call("diff", run.base, run.base, "--out", tmp_path / "patch")
    assert called.exit_code == 1
    assert called.stdout == ""
    assert "may be kept, found none" in error_lines(called.stderr)[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_other_settings_is_a_failure_that_names_them(run: Run) -> None:
    called = call("enhance", run.base, *run.options, "--seed", "1")
    assert called.exit_code == 1
    (line,) = error_lines(called.stderr)
    assert "score.seed (0 there, 1 here), train.seed (0 there, 1 here)" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["score", "base"],
        ["score", "base", "--out", "map", "--method", "best"],
        ["score", "base", "--out", "map", "--settings", "nowhere"],
        ["enhance", "base", "--out", "run", "--guard", "guard"],
        ["train", "base", "--out", "patch"],
        ["preserve", "base", "--map", ".", "--out", "model"],
        ["preserve", "base", "--data", "rows.json", "--out", "model", "--no-anchor"],
        ["preserve", "base", "--map", "nowhere", "--data", "rows.json", "--out", "model"],
        ["probe", "base", "--out", "probe"],
        ["probe", "base", "--map", "."],
        ["probe", "base", "--linear", "--map", "."],
        ["probe", "base", "--linear", "--out", "probe"],
        ["probe", "base", "--linear", "--noise", "1"],
        ["probe", "base", "--linear", "--judge", "refusals"],
        ["probe", "base", "--map", ".", "--out", "probe", "--at-asr", "0.1"],
        ["protect", "--map", ".", "--out", "model"],
        ["protect", "--map", ".", "--out", "model", "--tuned", "."],
        ["protect", "--map", ".", "--out", "model", "--tuned", ".", "--base", ".", "--lora", "l"],
        ["protect", "--map", ".", "--out", "model", "--tuned", ".", "--base", ".", "--merged"],
        ["eval", "base", "--adapter", "nowhere"],
        ["merge", "nowhere", "nowhere", "--out", "merged"],
        ["merge", ".", "--out", "merged"],
        ["merge", ".", "."],
        ["merge", ".", ".", "--out", "merged", "--in-place"],
        ["merge", "someone/model", ".", "--in-place"],
        ["merge", ".", ".@much", "--out", "merged"],
        ["merge", ".", ".@nan", "--out", "merged"],
        ["merge", ".", "nowhere@1", "--out", "merged"],
        ["unmerge", "nowhere"],
        ["diff", "base", "tuned"],
        ["diff", "base", "tuned", "--out", "patch", "--map", "nowhere"],
        ["export", ".", "--out", "other"],
        ["export", ".", "--to", "checkpoint", "--out", "other"],
        ["inspect", "nowhere"],
        ["verify"],
        ["verify", "nowhere"],
        ["verify", ".", "--merged", "nowhere"],
        ["verify", ".", "--revision", "main"],
        ["sign", "."],
        ["sign", ".", "--key", "nowhere"],
        ["verify-signature", "."],
        ["verify-signature", ".", "--key", "nowhere"],
        ["report", "."],
        ["reproduce", "."],
        ["reproduce", "nowhere", "--out", "again"],
        ["reproduce", ".", "--out", "again", "--data", "nowhere.json"],
        ["report", "nowhere", "--out", "report"],
        ["compare", "."],
        ["compare", ".", "nowhere"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_before_anything_is_done(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    called = call(*arguments)
    assert called.exit_code == 2
    assert called.stdout == ""
    assert "Usage: " in called.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_as_evals_result_file_is_wrong_usage(run: Run, tmp_path: Path) -> None:
    assert call("eval", run.base, "--out", tmp_path).exit_code == 2


def test_a_corrupted_patch_is_a_failure_where_it_is_used(
    run: Run, corrupted: Path, tmp_path: Path
) -> None:
    called = call("merge", run.base, corrupted, "--out", tmp_path / "merged")
    assert called.exit_code == 1
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("limit", "code"), [("0.5", 3), ("1", 0)])
def test_an_asr_above_the_limit_is_no_clear_yes(
    limit: str, code: int, run: Run, options: dict[str, list[str]]
) -> None:
    called = call("eval", run.base, *options["eval"], "--max-asr", limit, "--json")
    assert called.exit_code == code
    assert json.loads(called.stdout)["harmful"]["attack_success_rate"]["rate"] == 1


def test_a_result_above_the_limit_is_written_all_the_same(
    run: Run, options: dict[str, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    call("eval", run.base, *options["eval"], "--max-asr", "0", "--out", out)
    assert out.exists()
