"""What handles adapters as files starts without torch."""

import shutil
from pathlib import Path

import pytest

from safeweights_peft.merging.in_place import merge_in_place
from safeweights_peft.merging.merge import merge
from tests.cli.conftest import Run, call_afresh
from tests.test_signing import Keys
from tests.tiny_files import cache_model

HEAVY = ("torch", "transformers", "peft", "huggingface_hub", "datasets", "matplotlib")
REPORT = f"print(*sorted({set(HEAVY)} & set(sys.modules)), file=sys.stderr)"


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "verify",
        "verify --merged",
        "sign",
        "compare",
        "convert",
        "merge",
        "merge --dry-run",
        "merge --in-place",
        "unmerge",
    ],
)
def test_a_command_on_files_loads_no_torch(command: str, run: Run, tmp_path: Path) -> None:
    patch = run.out / "patch"
    merged = tmp_path / "merged"
    if command == "merge --in-place":
        shutil.copytree(run.base, merged)
    if command == "verify --merged":
        merge(run.base, patch, merged)
    if command == "unmerge":
        shutil.copytree(run.base, merged)
        merge_in_place(merged, patch)
    arguments = {
        "inspect": ["inspect", patch],
        "verify": ["verify", patch, "--base", run.base],
        "verify --merged": ["verify", patch, "--base", run.base, "--merged", merged],
        "sign": ["sign", patch, "--key", Keys(tmp_path).private, "--out", tmp_path / "out.sig"],
        "compare": ["compare", patch, run.out / "map"],
        "convert": ["convert", patch, "--encoding", "compact", "--out", merged],
        "merge": ["merge", run.base, patch, "--out", merged],
        "merge --dry-run": ["merge", run.base, patch, "--out", merged, "--dry-run"],
        "merge --in-place": ["merge", merged, patch, "--in-place"],
        "unmerge": ["unmerge", merged],
    }[command]
    done = call_afresh(*arguments, code=REPORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ""


@pytest.mark.parametrize("command", ["verify", "convert", "merge"])
def test_for_a_base_on_the_hub_a_command_on_files_loads_the_hub_s_client_alone(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_model(tmp_path, run.base, "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    patch, out = run.out / "patch", tmp_path / "out"
    arguments = {
        "verify": ["verify", patch, "--base", "someone/tiny"],
        "convert": [
            "convert",
            patch,
            "--encoding",
            "compact",
            "--base",
            "someone/tiny",
            "--out",
            out,
        ],
        "merge": ["merge", "someone/tiny", patch, "--out", out],
    }[command]
    done = call_afresh(*arguments, code=REPORT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "huggingface_hub"


def test_the_probe_notices_torch(tmp_path: Path) -> None:
    done = call_afresh("eval", tmp_path / "nowhere", code=REPORT)
    assert "torch" in done.stderr.splitlines()[-1].split()
