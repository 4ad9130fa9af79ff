"""`hf safeweights`: hf's own program finds the script and runs it."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from safeweights_peft.cli import extension
from tests.cli.conftest import call

MANIFEST = ".local/share/hf/extensions/hf-safeweights/manifest.json"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip makes of the project's entry for the script, in a home of its own."""
    path = tmp_path / "scripts" / "hf-safeweights"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\nfrom safeweights_peft.cli import main\nmain()\n")
    path.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(extension, "get_path", lambda _: str(path.parent))
    return path


def hf(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs hf as its console script does."""
    command = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *arguments]
    environment = os.environ | {"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_project_installs_the_script_that_hf_asks_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["hf-safeweights"] == project["scripts"]["safeweights"]


def test_hf_runs_the_command_line(script: Path) -> None:
    called = call("extend-hf", "--json")
    assert called.exit_code == 0
    assert json.loads(called.stdout)["runs"] == str(script)
    done = hf("safeweights", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: hf-safeweights [OPTIONS] COMMAND")
    assert "enhance" in done.stdout


def test_hf_passes_arguments_and_exit_codes_on(script: Path) -> None:
    call("extend-hf")
    done = hf("safeweights", "verify", "nowhere")
    assert done.returncode == 2
    assert "Directory 'nowhere' does not exist" in done.stderr


def test_hf_lists_and_removes_it(script: Path, tmp_path: Path) -> None:
    call("extend-hf")
    assert "hf safeweights" in hf("extensions", "list").stdout
    assert hf("extensions", "remove", "safeweights").returncode == 0
    assert not (tmp_path / MANIFEST).exists()


def test_no_repository_on_github_can_take_its_place(script: Path, tmp_path: Path) -> None:
    call("extend-hf")
    owner = json.loads((tmp_path / MANIFEST).read_text())["owner"]
    assert not owner.replace("-", "").isalnum()  # GitHub's owners are letters, digits and hyphens


def test_without_the_script_nothing_is_registered(script: Path, tmp_path: Path) -> None:
    script.unlink()
    called = call("extend-hf")
    assert called.exit_code == 1
    assert "expected the script that comes with safeweights-peft" in called.stderr
    assert not (tmp_path / MANIFEST).exists()
