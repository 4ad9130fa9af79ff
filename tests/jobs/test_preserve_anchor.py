"""The preserving job with an anchor: the base's answers are kept, held, and counted at the end."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeweights_peft import Anchor, TrainingError, collect_anchor
from safeweights_peft.chat import Chat
from safeweights_peft.cli import main
from safeweights_peft.errors import DataError, SettingsError
from safeweights_peft.jobs.anchor import read_sources
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.score import score
from safeweights_peft.settings import ComputeSettings, PreserveSettings
from safeweights_peft.training import anchor as anchoring
from safeweights_peft.training import finetune
from safeweights_peft.training.finetune import collate_answers, compute_answer_loss
from tests.tiny_jobs import BENIGN, HARMFUL, REFUSAL, Interrupted, Recorder, Requests, content
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer

HELP = "Here you are: all done."


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that refuses the harmful requests, and helps with the benign ones."""
    path = save_tiny_tokenizer(save_tiny_llama(tmp_path_factory.mktemp("refusing")))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    chat = Chat(tokenizer)
    rows = [chat.encode_example(text, REFUSAL, 32) for text in HARMFUL]
    rows += [chat.encode_example(text, HELP, 32) for text in BENIGN]
    batch = collate_answers(rows, tokenizer.pad_token_id)
    labels, optimizer = batch.pop("labels"), AdamW(model.parameters(), lr=0.01)
    for _ in range(150):
        compute_answer_loss(model(**batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


def anchored(requests: Requests, **changes: Any) -> PreserveSettings:
    defaults = {"anchor": True, "harmful": requests.harmful, "benign": requests.benign}
    return requests.preserve(**defaults | {"boundary": None, "anchor_every": 2} | changes)


def call(base: Path, requests: Requests, out: Path, **options: Any) -> dict[str, Any]:
    settings = options.pop("settings", None) or anchored(requests)
    job = Job(base, options.pop("compute", None), options.pop("progress", None))
    return preserve_model(job, options.pop("map_dir", None), requests.lessons, out, settings)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("has_map", [True, False])
def test_the_record_names_what_was_held_and_its_drift(
    has_map: bool, method: str, refusing: Path, requests: Requests, tmp_path: Path
) -> None:
    map_dir = tmp_path / "map" if has_map else None
    if map_dir:
        score(Job(refusing), map_dir, requests.score())
    settings = anchored(requests, method=method)
    record = call(refusing, requests, tmp_path / "out", settings=settings, map_dir=map_dir)
    assert json.loads((tmp_path / "out" / "preserving.json").read_text()) == record
    assert record["anchor"] == {"refusals": 6, "answers": 6}
    assert [measured["step"] for measured in record["drift"]] == [7]
    assert 0 <= record["drift"][0]["refusals"] <= 1
    assert (record["frozen_entries"] > 0) is has_map
    card = (tmp_path / "out" / "README.md").read_text()
    assert "12 of the base's own answers, refusals and others, were held" in card
    assert ("Safety Preserving Adaptation" in card) is has_map


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_anchor_keeps_refusals_that_a_training_without_one_loses(
    method: str, refusing: Path, requests: Requests, tmp_path: Path
) -> None:
    drift = []
    for weight in (0.0, 10.0):
        settings = anchored(
            requests, method=method, steps=30, anchor_weight=weight, learning_rate=0.02
        )
        record = call(refusing, requests, tmp_path / f"out{weight}", settings=settings)
        drift.append(record["drift"][-1]["drifted"])
    assert drift[1] < drift[0]


def test_a_base_that_refuses_nothing_is_refused_before_the_training(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    recorder = Recorder()
    with pytest.raises(TrainingError, match=r"found one that refuses none.*--no-anchor"):
        call(tiny_llama, requests, tmp_path / "out", progress=recorder)
    assert [task[0] for task in recorder.tasks] == ["Ask the base harmful requests"]
    assert list(tmp_path.iterdir()) == []


def test_neither_a_map_nor_an_anchor_is_refused(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="expected a map, a patch or an anchor"):
        call(tiny_llama, requests, tmp_path / "out", settings=requests.preserve())


@pytest.mark.parametrize("task", ["Ask the base benign requests", "Read its answers", "Fine-tune"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_job_gives_the_same_model_when_called_again(
    method: str,
    task: str,
    refusing: Path,
    requests: Requests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0)
    monkeypatch.setattr(anchoring, "CHECK_EVERY", 2)
    settings = anchored(requests, method=method)
    straight = call(refusing, requests, tmp_path / "straight", settings=settings)
    assert [measured["step"] for measured in straight["drift"]] == [2, 4, 6, 7]
    recorder = Recorder(task, 5)
    with pytest.raises(Interrupted):
        call(refusing, requests, tmp_path / "out", settings=settings, progress=recorder)
    again = Recorder()
    call(refusing, requests, tmp_path / "out", settings=settings, progress=again)
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    has_asked = any(name.startswith("Ask") for name, *_ in again.tasks)
    assert has_asked is (task == "Ask the base benign requests")


def test_a_training_that_drifts_too_far_is_stopped_and_nothing_is_published(
    refusing: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anchoring, "CHECK_EVERY", 5)
    settings = anchored(requests, steps=30, anchor_weight=0.0, learning_rate=0.05, stop_above=0.0)
    with pytest.raises(TrainingError, match=r"step \d+: expected at most 0 of the anchor's"):
        call(refusing, requests, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


def test_a_mixed_precision_starts_without_drift(
    refusing: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, real = [], Anchor.compute_loss

    def compute_loss(*these: Any) -> torch.Tensor:
        losses.append(real(*these))
        return losses[-1]

    monkeypatch.setattr(Anchor, "compute_loss", compute_loss)
    settings = anchored(requests, anchor_every=1, steps=1)
    compute = ComputeSettings(device="cpu", dtype="bfloat16")
    call(refusing, requests, tmp_path / "out", settings=settings, compute=compute)
    assert [loss.item() for loss in losses] == [pytest.approx(0, abs=1e-6)]


def test_a_request_source_that_is_missing_is_refused_first(
    refusing: Path, requests: Requests, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json"):
        call(
            *(refusing, requests, tmp_path / "out"),
            settings=anchored(requests, harmful="nowhere.json"),
        )


def test_an_anchor_is_collected_from_a_model_in_memory(
    refusing: Path, requests: Requests, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(refusing).train()
    tokenizer = AutoTokenizer.from_pretrained(refusing)
    anchor = collect_anchor(model, tokenizer, requests.harmful, requests.benign, weight=2.0)
    assert (anchor.refusals, len(anchor.rows), anchor.weight) == (6, 12, 2.0)
    answers = [tokenizer.decode(row.answer_ids) for row in anchor.rows]
    assert all(answer.startswith(REFUSAL) for answer in answers[:6])
    assert all(HELP.startswith(answer) for answer in answers[6:])
    with caplog.at_level(logging.INFO):
        assert anchor.measure(model).drifted == 0
    assert model.training


def test_the_first_of_several_sources_comes_first(requests: Requests) -> None:
    rows = read_sources([requests.benign, requests.harmful], 8)
    assert [row.instruction for row in rows] == [*BENIGN, *HARMFUL[:2]]
    spread = [row.instruction for row in read_sources(requests.benign, 3)]
    assert spread == BENIGN[::2]


def test_the_command_holds_answers_by_default_and_shows_their_drift(
    refusing: Path, requests: Requests, tmp_path: Path
) -> None:
    words = ["preserve", refusing, "--data", requests.lessons, "--steps", 4, "--batch-size", 2]
    words += ["--harmful", requests.harmful, "--benign", requests.benign]
    words += ["--boundary", requests.benign]
    called = CliRunner().invoke(main, [*map(str, words), "--out", str(tmp_path / "out")])
    assert called.exit_code == 0, called.output
    assert re.search(r"held +6 refusals, 6 benign answers\n", called.stdout)
    assert re.search(r"drift +\d+\.\d% of them begin otherwise than before\n", called.stdout)
    options = ["--out", str(tmp_path / "stopped"), "--lr", "0.1", "--stop-above", "0"]
    called = CliRunner().invoke(main, [*map(str, words), *options])
    assert called.exit_code == 1
    assert "step 4: expected at most 0 of the anchor's answers" in called.stderr
    assert not (tmp_path / "stopped").exists()
