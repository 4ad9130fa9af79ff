"""The estimate: right where it can be, from the files' headers alone."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from safeweights_peft.errors import ModelError
from safeweights_peft.jobs.estimate import estimate
from safeweights_peft.jobs.job import Job
from safeweights_peft.settings import ComputeSettings, PreserveMethod
from tests.jobs.conftest import Run
from tests.tiny_jobs import Requests


def test_parameters_are_those_of_the_model(tiny_llama: Path, requests: Requests) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    needs = estimate(Job(tiny_llama), score=requests.score())
    assert needs.parameters == sum(each.numel() for each in model.parameters())


def test_tied_weights_count_once(tiny_tied_llama: Path, requests: Requests) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_tied_llama)
    needs = estimate(Job(tiny_tied_llama), score=requests.score())
    assert needs.parameters == sum(each.numel() for each in model.parameters())


def test_scoring_needs_the_weights_and_the_layers_gradients_in_float32(
    tiny_llama_bf16: Path, requests: Requests
) -> None:
    needs = estimate(Job(tiny_llama_bf16, ComputeSettings("cpu")), score=requests.score())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_bf16)
    layers = sum(each.numel() for each in model.model.layers.parameters())
    assert needs.memory_bytes == 4 * needs.parameters + 4 * layers


@pytest.mark.parametrize(("method", "sums"), [("esi", 1), ("fisher", 2), ("movement", 0)])
def test_scores_need_the_sums_that_they_read(
    tiny_llama: Path, requests: Requests, method: str, sums: int
) -> None:
    needs = estimate(Job(tiny_llama), score=requests.score(method=method))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    layers = sum(each.numel() for each in model.model.layers.parameters())
    assert needs.memory_bytes == 4 * needs.parameters + 4 * sums * layers


def test_passes_over_few_layers_need_less_memory(tiny_llama: Path, requests: Requests) -> None:
    whole, parts = (
        estimate(Job(tiny_llama), score=requests.score(layers_per_pass=n)) for n in (None, 1)
    )
    assert parts.memory_bytes < whole.memory_bytes


def test_a_guard_is_held_beside_the_model(tiny_llama: Path, requests: Requests) -> None:
    plain = estimate(Job(tiny_llama), score=requests.score())
    settings = requests.score(guard=str(tiny_llama), profile="llama-guard-3")
    judged = estimate(Job(tiny_llama), score=settings)
    assert judged.memory_bytes == plain.memory_bytes + plain.parameters * 4


def test_one_judge_at_a_time_is_held_beside_the_model(tiny_llama: Path, requests: Requests) -> None:
    plain = estimate(Job(tiny_llama), evaluate=requests.evaluate())
    judges = (f"guard:{tiny_llama}=wildguard", f"classifier:{tiny_llama}", "refusals")
    judged = estimate(Job(tiny_llama), evaluate=requests.evaluate(judge=judges))
    assert judged.memory_bytes == plain.memory_bytes + plain.parameters * 4


def test_a_patch_is_measured_in_the_base_and_a_lora_in_a_second_model(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    alone, patched, adapted = (
        estimate(Job(run.base), adapter=path) for path in (None, run.out / "patch", tmp_path)
    )
    assert patched == alone
    assert adapted.memory_bytes == 2 * alone.memory_bytes


def test_the_patchs_size_is_about_right(run: Run, requests: Requests) -> None:
    needs = estimate(Job(run.base), score=requests.score(), train=requests.train())
    actual = (run.out / "patch" / "adapter_model.safetensors").stat().st_size
    assert 0.7 < needs.patch_bytes / actual < 1.3


def test_preserving_needs_weights_gradients_and_two_moments_in_float32(
    tiny_llama_bf16: Path, requests: Requests
) -> None:
    settings = requests.preserve()
    needs = estimate(Job(tiny_llama_bf16), preserve=settings)
    assert needs.memory_bytes == needs.parameters * 16


def test_preserving_by_lora_needs_less(tiny_llama: Path, requests: Requests) -> None:
    full, lora = (
        estimate(Job(tiny_llama), preserve=requests.preserve(method=each))
        for each in PreserveMethod
    )
    assert lora.memory_bytes < full.memory_bytes


def test_no_weights_are_loaded(tmp_path: Path, requests: Requests) -> None:
    numel = 2**38  # a terabyte of float32, all of it a hole in the file
    header = {"w": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 4 * numel]}}
    raw = json.dumps(header).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + 4 * numel)
    assert estimate(Job(tmp_path), score=requests.score()).parameters == numel


def test_a_missing_base_is_refused(tmp_path: Path, requests: Requests) -> None:
    with pytest.raises(ModelError, match="expected a model directory or a Hub id"):
        estimate(Job(tmp_path / "nowhere"), score=requests.score())
