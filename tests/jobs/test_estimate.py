"""The estimate: right where it can be, from the files' headers alone."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from safeweights_peft.errors import ModelError
from safeweights_peft.jobs.estimate import estimate
from safeweights_peft.settings import ComputeSettings, PreserveMethod
from tests.jobs.conftest import Run
from tests.tiny_jobs import Requests


@pytest.fixture
def same_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeweights_peft.jobs.estimate._measure_speed", lambda device: 1e9)


def test_parameters_are_those_of_the_model(tiny_llama: Path, requests: Requests) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    needs = estimate(str(tiny_llama), score=requests.score())
    assert needs.parameters == sum(each.numel() for each in model.parameters())


def test_tied_weights_count_once(tiny_tied_llama: Path, requests: Requests) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_tied_llama)
    needs = estimate(str(tiny_tied_llama), score=requests.score())
    assert needs.parameters == sum(each.numel() for each in model.parameters())


def test_scoring_needs_the_weights_and_the_layers_gradients_in_float32(
    tiny_llama_bf16: Path, requests: Requests
) -> None:
    needs = estimate(str(tiny_llama_bf16), score=requests.score(), compute=ComputeSettings("cpu"))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_bf16)
    layers = sum(each.numel() for each in model.model.layers.parameters())
    assert needs.memory_bytes == 4 * needs.parameters + 4 * layers


def test_passes_over_few_layers_need_less_memory_and_more_time(
    tiny_llama: Path, requests: Requests, same_speed: None
) -> None:
    whole, parts = (
        estimate(str(tiny_llama), score=requests.score(layers_per_pass=n)) for n in (None, 1)
    )
    assert parts.memory_bytes < whole.memory_bytes
    assert parts.seconds["score"] == pytest.approx(2 * whole.seconds["score"])  # of two layers


def test_a_guard_is_held_beside_the_model_and_takes_its_time(
    tiny_llama: Path, requests: Requests, same_speed: None
) -> None:
    plain = estimate(str(tiny_llama), score=requests.score())
    settings = requests.score(guard=str(tiny_llama), profile="llama-guard-3")
    judged = estimate(str(tiny_llama), score=settings)
    assert judged.memory_bytes == plain.memory_bytes + plain.parameters * 4
    assert judged.seconds["score"] > plain.seconds["score"]


def test_a_patched_model_is_held_beside_its_base(tiny_llama_bf16: Path, requests: Requests) -> None:
    one, two = (
        estimate(str(tiny_llama_bf16), evaluate=requests.evaluate(), evaluations=n) for n in (1, 3)
    )
    assert two.memory_bytes == 2 * one.memory_bytes


def test_the_patchs_size_is_about_right(run: Run, requests: Requests) -> None:
    needs = estimate(str(run.base), score=requests.score(), train=requests.train())
    actual = (run.out / "patch" / "adapter_model.safetensors").stat().st_size
    assert 0.7 < needs.patch_bytes / actual < 1.3


def test_only_the_steps_that_are_asked_for_are_timed(tiny_llama: Path, requests: Requests) -> None:
    needs = estimate(str(tiny_llama), score=requests.score(), train=requests.train())
    assert set(needs.seconds) == {"score", "train"}
    assert all(seconds > 0 for seconds in needs.seconds.values())


def test_preserving_needs_weights_gradients_and_two_moments_in_float32(
    tiny_llama_bf16: Path, requests: Requests
) -> None:
    settings = requests.preserve()
    needs = estimate(str(tiny_llama_bf16), preserve=settings, data=requests.lessons)
    assert needs.memory_bytes == needs.parameters * 16
    assert set(needs.seconds) == {"preserve"}


@pytest.mark.usefixtures("same_speed")
def test_preserving_by_lora_needs_less_of_both(tiny_llama: Path, requests: Requests) -> None:
    full, lora = (
        estimate(str(tiny_llama), preserve=requests.preserve(method=each), data=requests.lessons)
        for each in PreserveMethod
    )
    assert lora.memory_bytes < full.memory_bytes
    assert lora.seconds["preserve"] < full.seconds["preserve"]


@pytest.mark.usefixtures("same_speed")
def test_preserving_takes_longer_with_more_steps_and_longer_answers(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    rows = json.loads(Path(requests.lessons).read_text())
    longer = tmp_path / "longer.json"
    longer.write_text(json.dumps([row | {"output": 2 * row["output"]} for row in rows]))
    once, twice, wordy = (
        estimate(str(tiny_llama), preserve=requests.preserve(steps=n), data=str(data))
        for n, data in ((4, requests.lessons), (8, requests.lessons), (4, longer))
    )
    assert twice.seconds["preserve"] == pytest.approx(2 * once.seconds["preserve"])
    assert wordy.seconds["preserve"] > once.seconds["preserve"]


@pytest.mark.usefixtures("same_speed")
def test_times_grow_with_the_work(tiny_llama: Path, requests: Requests) -> None:
    short, long = (
        estimate(str(tiny_llama), score=requests.score(examples=n), train=requests.train(steps=n))
        for n in (10, 30)
    )
    tripled = {step: 3 * seconds for step, seconds in short.seconds.items()}
    assert long.seconds == pytest.approx(tripled)


@pytest.mark.usefixtures("same_speed")
def test_a_limit_shortens_the_evaluation(tiny_llama: Path, requests: Requests) -> None:
    whole, half = (
        estimate(str(tiny_llama), evaluate=requests.evaluate(limit=limit)) for limit in (None, 3)
    )
    assert 2 * half.seconds["evaluate"] == pytest.approx(whole.seconds["evaluate"])


def test_no_weights_are_loaded(tmp_path: Path, requests: Requests) -> None:
    numel = 2**38  # a terabyte of float32, all of it a hole in the file
    header = {"w": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 4 * numel]}}
    raw = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 4 * numel)
    assert estimate(str(tmp_path), score=requests.score()).parameters == numel


def test_a_missing_base_is_refused(tmp_path: Path, requests: Requests) -> None:
    with pytest.raises(ModelError, match="expected a model directory or a Hub id"):
        estimate(str(tmp_path / "nowhere"), score=requests.score())
