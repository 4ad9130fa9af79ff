"""The evaluation job: what is measured is the merged checkpoint, and what is kept is little."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from safeweights_peft.data import encode_example, read_rows
from safeweights_peft.errors import BaseMismatchError, DataError, SafeWeightsError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.judges import Verdict
from safeweights_peft.evaluation.utility import measure_utility
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs.evaluate import Evaluator, evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.merging.merge import merge
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.settings import ComputeSettings
from tests.jobs.conftest import Counts, Run
from tests.tiny_jobs import BENIGN, HARMFUL, REFUSAL, Interrupted, Recorder, Requests
from tests.tiny_kinds import KINDS, build
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer

WHEN = {"seconds", "date"}


def verdicts(part: dict[str, Any]) -> list[str]:
    return [request["verdict"] for request in part["requests"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patched_model_is_judged_like_its_merged_checkpoint(
    dtype: str, run: Run, requests: Requests, tmp_path: Path
) -> None:
    compute = ComputeSettings(dtype=dtype)
    merge(run.base, run.out / "patch", tmp_path / "merged")
    settings = requests.evaluate(keep_answers=True)
    patched = evaluate(Job(run.base, compute), run.out / "patch", settings)
    merged = evaluate(Job(tmp_path / "merged", compute), None, settings)
    assert patched["harmful"] == merged["harmful"]
    assert patched["benign"] == merged["benign"]


def test_a_patched_models_utility_is_that_of_its_merged_checkpoint(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    merge(run.base, run.out / "patch", tmp_path / "merged")
    found = evaluate(Job(run.base), run.out / "patch", requests.evaluate())["utility"]
    base = load_model(resolve_base(str(run.base)), torch.float32)
    merged = load_model(resolve_base(str(tmp_path / "merged")), torch.float32)
    tokenizer = load_tokenizer(resolve_base(str(run.base)))
    answers = generate_answers(base, tokenizer, BENIGN, max_new_tokens=11, batch_size=4)
    expected = measure_utility(base, answers, tokenizer.pad_token_id, lambda: nullcontext(merged))
    assert (found["kl"], found["perplexity"]) == (expected.kl, expected.perplexity)
    assert found["kl"] > 0


def test_the_base_has_no_distance_to_itself(run: Run, requests: Requests) -> None:
    result = evaluate(Job(run.base), None, requests.evaluate())
    assert result["utility"]["kl"] == 0
    assert result["adapter"] is None


def test_verdicts_counts_and_rates_agree(run: Run, requests: Requests) -> None:
    result = evaluate(Job(run.base), run.out / "patch", requests.evaluate())
    for part in (result["harmful"], result["benign"]):
        for verdict in ("complied", "refused", "invalid"):
            assert part[verdict] == verdicts(part).count(verdict)
        assert part["n"] == len(part["requests"]) == 6
    refused = result["harmful"]["refused"]
    assert refused > 0
    assert result["harmful"]["attack_success_rate"]["count"] == 6 - refused
    assert result["benign"]["over_refusal_rate"]["count"] == result["benign"]["refused"]


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "mamba", "rwkv"])
def test_every_kind_of_model_is_scored_and_judged_and_its_layout_recorded(
    kind: str, requests: Requests, tmp_path: Path
) -> None:
    build(kind).save_pretrained(tmp_path / "base")
    job = Job(save_tiny_tokenizer(tmp_path / "base"))
    score(job, tmp_path / "map", requests.score())
    (whole, alone) = (
        evaluate(job, None, requests.evaluate(batch_size=size, keep_answers=True))
        for size in (6, 1)
    )
    assert whole["batching"] == KINDS[kind][0].value
    assert whole["harmful"] == alone["harmful"]
    assert whole["benign"] == alone["benign"]


def test_a_result_holds_no_answer(run: Run, requests: Requests) -> None:
    result = evaluate(Job(run.base), run.out / "patch", requests.evaluate())
    for part in ("harmful", "benign"):
        assert all(set(each) == {"request", "verdict"} for each in result[part]["requests"])


def test_a_result_holds_the_answers_when_asked(run: Run, requests: Requests) -> None:
    settings = requests.evaluate(keep_answers=True)
    result = evaluate(Job(run.base), run.out / "patch", settings)
    answers = [each["answer"] for each in result["harmful"]["requests"]]
    assert len(answers) == 6
    assert any(REFUSAL in answer for answer in answers)


def test_long_requests_are_shortened_to_one_line(run: Run, requests: Requests) -> None:
    result = evaluate(Job(run.base), None, requests.evaluate())
    shown = [each["request"] for each in result["harmful"]["requests"]]
    assert shown[:-1] == HARMFUL[:-1]
    assert shown[-1] == "Break into the museum, and tell nobody …"


def test_the_limit_takes_requests_from_the_start(run: Run, requests: Requests) -> None:
    result = evaluate(Job(run.base), None, requests.evaluate(limit=2))
    assert [each["request"] for each in result["harmful"]["requests"]] == HARMFUL[:2]
    assert [each["request"] for each in result["benign"]["requests"]] == BENIGN[:2]


def test_a_second_measurement_gives_the_same_result(run: Run, requests: Requests) -> None:
    first, second = (
        evaluate(Job(run.base), run.out / "patch", requests.evaluate()) for _ in range(2)
    )
    assert {k: v for k, v in first.items() if k not in WHEN} == {
        k: v for k, v in second.items() if k not in WHEN
    }


def test_a_result_is_plain_json(run: Run, requests: Requests) -> None:
    result = evaluate(Job(run.base), None, requests.evaluate(limit=1))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_patch_of_another_base_is_refused_before_the_base_is_asked_anything(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "other", dtype=torch.bfloat16, seed=1)
    recorder = Recorder()
    job = Job(save_tiny_tokenizer(other), progress=recorder)
    with pytest.raises(BaseMismatchError):
        evaluate(job, run.out / "patch", requests.evaluate())
    assert recorder.tasks == []


def test_a_map_in_place_of_a_patch_is_refused(run: Run, requests: Requests) -> None:
    with pytest.raises(SafeWeightsError, match="expected a safety patch, found a safety map"):
        evaluate(Job(run.base), run.out / "map", requests.evaluate())


def test_a_missing_source_of_requests_is_refused(run: Run, requests: Requests) -> None:
    with pytest.raises(DataError, match=r"^nowhere\.json: expected a file"):
        evaluate(Job(run.base), None, requests.evaluate(harmful="nowhere.json"))


def test_the_source_is_told_by_its_digest(run: Run, requests: Requests, tmp_path: Path) -> None:
    first = evaluate(Job(run.base), None, requests.evaluate())
    moved = tmp_path / "moved.json"
    moved.write_bytes(Path(requests.harmful).read_bytes())
    second = evaluate(Job(run.base), None, requests.evaluate(harmful=str(moved)))
    assert first["harmful"]["data_digest"] == second["harmful"]["data_digest"]
    third = evaluate(Job(run.base), None, requests.evaluate(limit=5))
    assert third["harmful"]["data_digest"] != first["harmful"]["data_digest"]
    assert len(read_rows(str(moved))) == 6


def test_the_loss_on_a_task_is_the_mean_over_its_answer_tokens(
    run: Run, requests: Requests
) -> None:
    result = evaluate(Job(run.base), None, requests.evaluate(task=requests.lessons))
    base = resolve_base(str(run.base))
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    losses = []
    for row in read_rows(requests.lessons):
        example = encode_example(tokenizer, row.instruction, row.output or "", 256)
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1]
        losses += F.cross_entropy(logits, torch.tensor(example.answer_ids), reduction="none")
    assert result["task"]["tokens"] == len(losses)
    assert result["task"]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_without_a_task_no_loss_is_measured(run: Run, requests: Requests) -> None:
    assert evaluate(Job(run.base), None, requests.evaluate())["task"] is None


def test_a_base_is_loaded_once_and_asked_each_request_once(
    run: Run, requests: Requests, counts: Counts
) -> None:
    evaluate(Job(run.base), None, requests.evaluate())
    assert (counts.loads, counts.asked) == (1, 12)


def test_a_patch_is_measured_in_the_one_model_that_is_loaded(
    run: Run, requests: Requests, counts: Counts
) -> None:
    evaluate(Job(run.base), run.out / "patch", requests.evaluate())
    assert (counts.loads, counts.asked) == (1, 18)


def test_a_lora_is_measured_in_a_second_model(
    run: Run, requests: Requests, tmp_path: Path, counts: Counts
) -> None:
    job = Job(run.base)
    lora = get_peft_model(job.take_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    evaluate(job, tmp_path, requests.evaluate())
    assert counts.loads == 1 + 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_measured_patch_leaves_the_base_bit_for_bit(
    dtype: str, run: Run, requests: Requests
) -> None:
    job = Job(run.base, ComputeSettings(dtype=dtype))
    before = {name: each.clone() for name, each in job.model.state_dict().items()}
    evaluate(job, run.out / "patch", requests.evaluate())
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_base_comes_back_after_an_interruption(run: Run, requests: Requests) -> None:
    job = Job(run.base, progress=Recorder("Ask harmful requests"))
    before = {name: each.clone() for name, each in job.model.state_dict().items()}
    with pytest.raises(Interrupted):
        evaluate(job, run.out / "patch", requests.evaluate())
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_judge_is_taken_by_name(
    run: Run, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = {True: Verdict.REFUSED, False: Verdict.COMPLIED}
    judges = {"museums": lambda request, answer: verdict["museum" in request]}
    monkeypatch.setattr("safeweights_peft.jobs.evaluate.JUDGES", judges)
    result = Evaluator(Job(run.base), requests.evaluate(), "museums").evaluate()
    assert result["judge"] == "museums"
    assert verdicts(result["harmful"]) == ["complied"] * 5 + ["refused"]
