"""The repairing job: a tuned model gets a patch of its own, started from an old one's entries."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from safeweights_peft.errors import BaseMismatchError, DataError, ModelError, SettingsError
from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.jobs.evaluate import evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.repair import repair
from safeweights_peft.merging.convert import convert
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import verify
from safeweights_peft.patch.io import inspect, read_adapter
from safeweights_peft.settings import Granularity, RunSettings
from tests.jobs.conftest import Run
from tests.tiny_jobs import Interrupted, Recorder, Requests, content
from tests.tiny_models import save_tiny_mixtral, save_tiny_tokenizer


def tune(base: Path, out: Path) -> Path:
    """A base whose weights have all been moved a little."""
    torch.manual_seed(1)
    shutil.copytree(base, out)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def tuned(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(run.base, tmp_path_factory.mktemp("tuned") / "model")


@pytest.fixture(scope="module")
def lora(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the base."""
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(run.base), config)
    out = tmp_path_factory.mktemp("loras") / "lora"
    model.save_pretrained(str(out))
    return out


@pytest.fixture
def settings(tuned: Path, requests: Requests) -> RunSettings:
    return requests.run(tuned, steps=3, evaluate=requests.evaluate(task=requests.lessons))


@pytest.fixture(scope="module")
def repaired(
    run: Run, tuned: Path, requests: Requests, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("repaired") / "run"
    settings = requests.run(tuned, steps=3, evaluate=requests.evaluate(task=requests.lessons))
    return out, repair(settings, out, patch=run.out / "patch")


def test_the_patch_is_one_for_the_tuned_model_and_not_for_the_base(
    run: Run, tuned: Path, repaired: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    patch = repaired[0] / "patch"
    merge(tuned, patch, tmp_path / "merged")
    assert verify(patch, tuned, tmp_path / "merged").ok
    assert not verify(patch, run.base).ok


def test_trained_are_the_old_patch_s_entries_from_zero(
    run: Run, repaired: tuple[Path, dict[str, Any]]
) -> None:
    old, new = (read_adapter(path / "patch").deltas for path in (run.out, repaired[0]))
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[name].indices, new[name].indices) for name in old)
    # Three steps of at most 0.02, where the old patch had twenty.
    assert max(np.abs(delta.values.astype(np.float32)).max() for delta in new.values()) < 0.07


def test_the_figures_are_the_tuned_model_s_without_and_with_the_patch(
    tuned: Path, settings: RunSettings, repaired: tuple[Path, dict[str, Any]]
) -> None:
    out, result = repaired
    for stage, adapter in (("before", None), ("after", out / "patch")):
        alone = evaluate(Job(tuned), adapter, settings.evaluate)
        assert result[stage]["attack_success_rate"] == alone["harmful"]["attack_success_rate"]
        assert result[stage]["over_refusal_rate"] == alone["benign"]["over_refusal_rate"]
        assert result[stage]["task_loss"] == alone["task"]["loss"]
        assert result[stage]["kl"] == alone["utility"]["kl"]
    assert result["kind"] == "repair"
    assert json.loads((out / "result.json").read_text()) == result


@pytest.mark.parametrize(
    ("task", "after"),
    [("Ask harmful requests", 1), ("Ask the base benign requests", 1), ("Train", 2)],
)
def test_a_repair_that_was_interrupted_goes_on_to_the_same_patch(
    *, task: str, after: int, run: Run, settings: RunSettings, tmp_path: Path,
    repaired: tuple[Path, dict[str, Any]],
) -> None:  # fmt: skip
    out, old = tmp_path / "run", run.out / "patch"
    with pytest.raises(Interrupted):
        repair(settings, out, Recorder(task, after), old)
    repair(settings, out, patch=old)
    tensors = "adapter_model.safetensors"
    assert (out / "patch" / tensors).read_bytes() == (repaired[0] / "patch" / tensors).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in repaired[0].iterdir()}


def test_a_finished_repair_is_not_done_again_and_no_other_takes_its_place(
    run: Run, settings: RunSettings, repaired: tuple[Path, dict[str, Any]]
) -> None:
    out, result = repaired
    before, recorder = content(out), Recorder()
    assert repair(settings, out, recorder, run.out / "patch") == result
    assert recorder.tasks == []
    with pytest.raises(DataError, match=r"other repair\.patch \(sha256:\w+ there, None here\)"):
        repair(settings, out)
    with pytest.raises(DataError, match=r"other repair\.add_patch \(None there, 0\.5 here\)"):
        repair(settings, out, patch=run.out / "patch", add_patch=0.5)
    with pytest.raises(DataError, match=r"other repair\.patch"):
        enhance(settings, out)
    assert content(out) == before


def test_without_an_old_patch_the_entries_are_those_that_scoring_finds(
    tuned: Path, settings: RunSettings, tmp_path: Path
) -> None:
    repair(settings, tmp_path / "repaired")
    enhance(settings, tmp_path / "enhanced")
    mine, others = (inspect(tmp_path / name / "patch") for name in ("repaired", "enhanced"))
    assert mine["content_id"] == others["content_id"]


def test_whole_rows_stay_whole_rows(
    run: Run, requests: Requests, tuned: Path, tmp_path: Path
) -> None:
    rows = requests.score(granularity=Granularity.ROW)
    enhance(requests.run(run.base, steps=1, score=rows), tmp_path / "old")
    repair(requests.run(tuned, steps=1), tmp_path / "new", patch=tmp_path / "old" / "patch")
    old, new = (inspect(tmp_path / name / "patch") for name in ("old", "new"))
    assert new["rows"] == old["rows"] > 0
    assert new["entries"] == old["entries"]


@pytest.mark.parametrize("encoding", ["plain", "compact"])
def test_a_patch_added_again_has_the_old_values_at_that_scale_and_trains_nothing(
    encoding: str, run: Run, tuned: Path, settings: RunSettings, tmp_path: Path
) -> None:
    old, out, recorder = tmp_path / "old", tmp_path / "run", Recorder()
    convert(run.out / "patch", encoding, old, run.base)
    result = repair(settings, out, recorder, old, add_patch=0.5)
    assert "Train" not in [entry[0] for entry in recorder.tasks]
    expected, found = read_adapter(run.out / "patch"), read_adapter(out / "patch")
    assert found.metadata.scale == 0.5 * expected.metadata.scale
    for name, delta in expected.deltas.items():
        assert np.array_equal(found.deltas[name].indices, delta.indices)
        assert np.array_equal(found.deltas[name].values, delta.values) or encoding == "compact"
    merge(tuned, out / "patch", tmp_path / "merged")
    assert verify(out / "patch", tuned, tmp_path / "merged").ok
    assert result["add_patch"] == 0.5
    assert result["after"]["kl"] > 0
    assert (out / "patch" / "README.md").is_file()


def test_a_lora_is_merged_as_peft_merges_it_and_the_patch_is_for_that_model(
    run: Run, lora: Path, requests: Requests, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = requests.run(lora, steps=1)
    result = repair(settings, out, patch=run.out / "patch")
    base = AutoModelForCausalLM.from_pretrained(run.base)
    expected = PeftModel.from_pretrained(base, str(lora)).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert verify(out / "patch", out / "model").ok
    assert result["base"]["name"] == str(out / "model")
    before, recorder = content(out), Recorder()
    assert repair(settings, out, recorder, run.out / "patch") == result
    assert recorder.tasks == []
    assert content(out) == before


def test_another_architecture_is_refused_in_a_line_before_anything_is_measured(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    other = save_tiny_tokenizer(save_tiny_mixtral(tmp_path / "other"))
    recorder = Recorder()
    with pytest.raises(BaseMismatchError, match="found no such parameter; give the patch of") as e:
        repair(requests.run(other), tmp_path / "run", recorder, run.out / "patch")
    assert "\n" not in str(e.value)
    assert recorder.tasks == []
    assert not (tmp_path / "run").exists()


def test_a_scale_without_a_patch_and_a_patch_as_the_model_are_refused(
    run: Run, settings: RunSettings, tmp_path: Path
) -> None:
    for old in (None, run.out / "map"):
        with pytest.raises(SettingsError, match="--add-patch: expected a patch as --patch"):
            repair(settings, tmp_path / "run", patch=old, add_patch=1.0)
    with pytest.raises(SettingsError, match="add_patch: expected a number above 0"):
        repair(settings, tmp_path / "run", patch=run.out / "patch", add_patch=0.0)
    with pytest.raises(ModelError, match="found a safety patch or map; give the model that"):
        repair(replace(settings, base=str(run.out / "patch")), tmp_path / "run")
    with pytest.raises(ModelError, match="--base other: expected a LoRA with it"):
        repair(settings, tmp_path / "run", base="other")
    assert list(tmp_path.iterdir()) == []
