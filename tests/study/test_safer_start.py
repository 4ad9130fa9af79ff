"""The start model whose safety is deep: all weights trained, resumed where it was broken off."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.jobs.job import Job
from tests.study.test_patch_study import load
from tests.tiny_jobs import Interrupted, Requests, content


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("safer_start", monkeypatch)


def test_all_weights_learn_to_refuse(
    script: ModuleType, requests: Requests, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    settings = requests.train(steps=30, learning_rate=None, step_gain=1.0, warmup_steps=1)
    record = script.make_safer(Job(tiny_llama_bf16), tmp_path / "safer", settings)
    assert record["losses"][-1]["refusal"] < 0.5 * record["losses"][0]["refusal"]
    assert json.loads((tmp_path / "safer" / script.RECORD_FILE).read_text()) == record
    base, safer = CheckpointReader(tiny_llama_bf16), CheckpointReader(tmp_path / "safer")
    assert base.keys() == safer.keys()
    for key in base.keys():
        assert base.info(key).dtype == safer.info(key).dtype
        assert not np.array_equal(base.read(key), safer.read(key))
    assert Job(tmp_path / "safer").model.config.num_hidden_layers > 0


def test_a_broken_off_training_resumes_to_the_same_weights(
    script: ModuleType,
    requests: Requests,
    tiny_llama_bf16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = requests.train(steps=4)
    script.make_safer(Job(tiny_llama_bf16), tmp_path / "whole", settings)

    def break_off(step: int, /, **_: float) -> None:
        if step == 3:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("safeweights_peft.training.finetune.SAVE_SECONDS", 0)
        patched.setattr(script, "say", break_off)
        with pytest.raises(Interrupted):
            script.make_safer(Job(tiny_llama_bf16), tmp_path / "broken", settings)
    assert [*tmp_path.glob(".broken.*.work/checkpoint-*")]
    seen: list[int] = []
    monkeypatch.setattr(script, "say", lambda step, **_: seen.append(step))
    script.make_safer(Job(tiny_llama_bf16), tmp_path / "broken", settings)
    assert seen[0] > 1
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_it_is_a_script(
    script: ModuleType,
    requests: Requests,
    tiny_llama_bf16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = {"train": {"harmful": requests.harmful, "benign": requests.benign}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    arguments = [
        *("safer_start.py", tiny_llama_bf16, "--out", tmp_path / "safer", "--steps", 2),
        *("--lr", 0.01, "--settings", tmp_path / "recipe.json"),
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    script.main()
    record = json.loads((tmp_path / "safer" / script.RECORD_FILE).read_text())
    assert (record["settings"]["steps"], record["learning_rate"]) == (2, 0.01)
    assert len(record["losses"]) == 2
