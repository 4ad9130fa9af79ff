"""`verify` answers by its exit code: 0 yes, 1 no, 2 unreadable, 3 can't tell. `sign` signs."""

import json
import shutil
from pathlib import Path

import pytest

from safeweights_peft.merging.merge import merge
from safeweights_peft.patch.io import read_artifact
from tests.cli.conftest import Run, call
from tests.test_signing import Keys
from tests.tiny_files import edit_config
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def merged(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "merged"
    merge(run.base, run.out / "patch", out)
    return out


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def patch(run: Run, tmp_path: Path) -> Path:
    """A copy of the run's patch, to be changed."""
    return Path(shutil.copytree(run.out / "patch", tmp_path / "patch"))


def test_what_is_verified_is_0(run: Run, merged: Path) -> None:
    for options in (["--base", run.base], ["--base", run.base, "--merged", merged]):
        called = call("verify", run.out / "patch", *options, "--json")
        assert called.exit_code == 0
        assert json.loads(called.stdout)["verdict"] == "verified"


def test_a_corrupted_adapter_is_1(corrupted: Path) -> None:
    called = call("verify", corrupted)
    assert called.exit_code == 1
    assert "tensors     FAILED: " in called.stdout


def test_another_base_is_1(run: Run, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    assert call("verify", run.out / "patch", "--base", other).exit_code == 1


def test_another_model_than_the_merged_one_is_1(run: Run) -> None:
    options = ["--base", run.base, "--merged", run.base]
    assert call("verify", run.out / "patch", *options).exit_code == 1


def test_an_adapter_that_is_none_is_2(patch: Path) -> None:
    (patch / "adapter_config.json").write_text("{}")
    assert call("verify", patch).exit_code == 2
    assert call("verify", patch, "--base", "someone/nothing").exit_code == 2


@pytest.mark.parametrize("which", ["--base", "--merged"])
def test_a_model_that_is_none_is_2(which: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    models = {"--base": run.base, "--merged": run.base} | {which: tmp_path / "empty"}
    options = [part for pair in models.items() for part in pair]
    assert call("verify", run.out / "patch", *options).exit_code == 2


def test_an_adapter_alone_is_3(run: Run) -> None:
    called = call("verify", run.out / "patch", "--json")
    assert called.exit_code == 3
    report = json.loads(called.stdout)
    assert report["verdict"] == "unknown"
    assert report["content_id"] == read_artifact(run.out / "patch").metadata.content_id
    assert report["checks"][-1] == {
        "name": "base",
        "verdict": "unknown",
        "detail": "not checked: no base was given",
    }


def test_a_base_that_cannot_be_had_is_3(
    run: Run, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for options in ([], ["--merged", merged]):
        called = call("verify", run.out / "patch", "--base", "someone/nothing", *options)
        assert called.exit_code == 3
        assert "base        UNKNOWN: not checked: someone/nothing: expected" in called.stdout


def test_a_base_that_is_merged_already_is_3(run: Run, merged: Path) -> None:
    assert call("verify", run.out / "patch", "--base", merged).exit_code == 3


def test_verify_prints_a_line_for_each_check_and_the_verdict(run: Run) -> None:
    called = call("verify", run.out / "patch", "--base", run.base)
    lines = [line.split()[:2] for line in called.stdout.splitlines()]
    assert lines[:4] == [[name, "ok:"] for name in ("config", "tensors", "base", "result")]
    assert lines[4:] == [["content", "id"], ["verdict", "verified"]]


def test_what_was_signed_is_as_it_was(patch: Path, keys: Keys) -> None:
    signed = call("sign", patch, "--key", keys.private, "--json")
    assert signed.exit_code == 0, signed.output
    called = call("verify-signature", patch, "--key", keys.public, "--json")
    assert called.exit_code == 0, called.output
    assert json.loads(called.stdout) == json.loads(signed.stdout)
    assert json.loads(called.stdout)["signature"] == str(patch / "model.sig")


def test_a_signature_may_lie_elsewhere(patch: Path, keys: Keys, tmp_path: Path) -> None:
    out = tmp_path / "patch.sig"
    assert call("sign", patch, "--key", keys.private, "--out", out).exit_code == 0
    arguments = ["verify-signature", patch, "--key", keys.public]
    assert call(*arguments).exit_code == 1
    assert call(*arguments, "--signature", out).exit_code == 0


def test_a_change_after_signing_is_a_failure_of_one_line(patch: Path, keys: Keys) -> None:
    call("sign", patch, "--key", keys.private)
    edit_config(patch, lambda config: config.update(scale=2.0))
    called = call("verify-signature", patch, "--key", keys.public)
    assert called.exit_code == 1
    assert called.stdout == ""
    (line,) = called.stderr.splitlines()
    assert "found adapter_config.json other than what was signed; do not use" in line


def test_a_signature_is_replaced_only_when_asked(patch: Path, keys: Keys) -> None:
    assert call("sign", patch, "--key", keys.private).exit_code == 0
    assert call("sign", patch, "--key", keys.private).exit_code == 1
    assert call("sign", patch, "--key", keys.private, "--overwrite").exit_code == 0


def test_a_signed_patch_works_as_before(
    run: Run, patch: Path, keys: Keys, options: dict[str, list[str]], tmp_path: Path
) -> None:
    call("sign", patch, "--key", keys.private)
    assert call("verify", patch, "--base", run.base).exit_code == 0
    assert call("merge", run.base, patch, "--out", tmp_path / "merged").exit_code == 0
    assert call("eval", run.base, "--adapter", patch, *options["eval"]).exit_code == 0
