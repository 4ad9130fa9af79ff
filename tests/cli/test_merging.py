"""Merging by the command line: scales, several patches, in place and back, a base on the Hub."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import SparseDelta, add_rounded, digest
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import inspect, read_adapter, write_adapter
from tests.cli.conftest import Run, call
from tests.tiny_files import edit_config
from tests.tiny_jobs import content


def weights(path: Path) -> dict[str, np.ndarray]:
    return load_file(path / "model.safetensors")


def test_merge_takes_a_scale(run: Run, tmp_path: Path) -> None:
    for scale in ("0", "1"):
        call("merge", run.base, f"{run.out / 'patch'}@{scale}", "--out", tmp_path / scale)
    base, none, whole = (weights(path) for path in (run.base, tmp_path / "0", tmp_path / "1"))
    assert all(np.array_equal(base[key], none[key]) for key in base)
    assert any(not np.array_equal(base[key], whole[key]) for key in base)


def test_an_at_sign_in_a_directorys_name_is_no_scale(run: Run, tmp_path: Path) -> None:
    patch = tmp_path / "patch@0"
    shutil.copytree(run.out / "patch", patch)
    called = call("merge", run.base, patch, "--out", tmp_path / "merged", "--json")
    assert json.loads(called.stdout)["patches"][0]["scale"] == 1.0


@pytest.fixture
def second(run: Run, tmp_path: Path) -> Path:
    """The run's patch with its values turned round: all entries are shared."""
    patch = read_adapter(run.out / "patch")
    turned = {
        name: SparseDelta(delta.shape, delta.indices, -delta.values)
        for name, delta in patch.deltas.items()
    }
    merged = {
        name: digest(add_rounded(CheckpointReader(run.base).gather(name, d.indices), d.values))
        for name, d in turned.items()
    }
    records = {
        name: replace(record, merged_digest=merged[name])
        for name, record in patch.metadata.tensors.items()
    }
    write_adapter(tmp_path / "second", Adapter(replace(patch.metadata, tensors=records), turned))
    return tmp_path / "second"


def test_merge_adds_patches_up_and_tells_what_they_share(
    run: Run, second: Path, tmp_path: Path
) -> None:
    patches = [run.out / "patch", f"{second}@0.5"]
    called = call("merge", run.base, *patches, "--out", tmp_path / "merged", "--json")
    report = json.loads(called.stdout)
    assert [patch["scale"] for patch in report["patches"]] == [1.0, 0.5]
    assert sum(overlap["entries"] for overlap in report["overlap"]) == report["entries"]
    table = call("merge", run.base, *patches, "--out", tmp_path / "again").stdout
    assert f"overlap  {report['entries']:,} entries of {patches[0]} and {second}" in table
    assert f"patch 2  {second} at scale 0.5" in table


def test_merge_refuses_an_overlap_when_asked(run: Run, second: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "merged", "--on-overlap", "error"]
    called = call("merge", run.base, run.out / "patch", second, *out)
    assert called.exit_code == 1
    assert "expected patches that change different entries" in called.stderr
    assert not (tmp_path / "merged").exists()


def test_merge_in_place_and_unmerge_print_their_reports(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    before, patch = content(base), run.out / "patch"
    report = json.loads(call("merge", base, patch, "--in-place", "--json").stdout)
    assert report["out_dir"] == str(base)
    assert report["entries"] == inspect(patch)["entries"]
    assert call("verify", patch, "--base", run.base, "--merged", base).exit_code == 0
    restored = json.loads(call("unmerge", base, "--json").stdout)
    assert restored["tensors"] == report["tensors"]
    assert content(base) == before


def test_a_dry_run_in_place_writes_nothing(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.base, base)
    before = content(base)
    called = call("merge", base, run.out / "patch", "--in-place", "--dry-run", "--json")
    assert json.loads(called.stdout)["write_bytes"] == 8 * inspect(run.out / "patch")["entries"]
    assert content(base) == before


@pytest.mark.parametrize(
    ("option", "commit"), [([], "0123abc"), (["--revision", "v2"], "v2")], ids=["own", "other"]
)
def test_a_base_on_the_hub_is_taken_at_the_commit_that_the_patch_names(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    commit: str,
) -> None:
    patch, requests = tmp_path / "patch", []
    shutil.copytree(run.out / "patch", patch)
    named = {"base_model_name_or_path": "someone/tiny", "revision": "0123abc"}
    edit_config(patch, lambda config: config.update(named))

    def snapshot(source: str, *, revision: str | None, **_: object) -> str:
        requests.append((source, revision))
        return str(run.base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    called = call("merge", "someone/tiny", patch, "--out", tmp_path / "merged", *option)
    assert called.exit_code == 0, called.output
    assert requests == [("someone/tiny", commit)]
    assert "commit 0123abc" in (tmp_path / "merged" / "README.md").read_text()
