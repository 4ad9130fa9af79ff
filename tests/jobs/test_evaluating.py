"""The evaluation job: what is measured is the merged checkpoint, and what is kept is little."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from safeweights_peft.data import encode_example, read_rows
from safeweights_peft.errors import BaseMismatchError, DataError, SafeWeightsError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.utility import measure_utility
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs.evaluate import evaluate
from safeweights_peft.merging.merge import merge
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.settings import ComputeSettings
from tests.jobs.conftest import Run
from tests.tiny_jobs import BENIGN, HARMFUL, REFUSAL, Recorder, Requests
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
    patched = evaluate(str(run.base), run.out / "patch", settings, compute)
    merged = evaluate(str(tmp_path / "merged"), None, settings, compute)
    assert patched["harmful"] == merged["harmful"]
    assert patched["benign"] == merged["benign"]


def test_a_patched_models_utility_is_that_of_its_merged_checkpoint(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    merge(run.base, run.out / "patch", tmp_path / "merged")
    found = evaluate(str(run.base), run.out / "patch", requests.evaluate())["utility"]
    base = load_model(resolve_base(str(run.base)), torch.float32)
    merged = load_model(resolve_base(str(tmp_path / "merged")), torch.float32)
    tokenizer = load_tokenizer(resolve_base(str(run.base)))
    answers = generate_answers(base, tokenizer, BENIGN, max_new_tokens=11, batch_size=4)
    expected = measure_utility(merged, base, answers, tokenizer.pad_token_id)
    assert (found["kl"], found["perplexity"]) == (expected.kl, expected.perplexity)
    assert found["kl"] > 0


def test_the_base_has_no_distance_to_itself(run: Run, requests: Requests) -> None:
    result = evaluate(str(run.base), None, requests.evaluate())
    assert result["utility"]["kl"] == 0
    assert result["adapter"] is None


def test_verdicts_counts_and_rates_agree(run: Run, requests: Requests) -> None:
    result = evaluate(str(run.base), run.out / "patch", requests.evaluate())
    for part in (result["harmful"], result["benign"]):
        for verdict in ("complied", "refused", "invalid"):
            assert part[verdict] == verdicts(part).count(verdict)
        assert part["n"] == len(part["requests"]) == 6
    refused = result["harmful"]["refused"]
    assert refused > 0
    assert result["harmful"]["attack_success_rate"]["count"] == 6 - refused
    assert result["benign"]["over_refusal_rate"]["count"] == result["benign"]["refused"]


def test_a_result_holds_no_answer(run: Run, requests: Requests) -> None:
    result = evaluate(str(run.base), run.out / "patch", requests.evaluate())
    for part in ("harmful", "benign"):
        assert all(set(each) == {"request", "verdict"} for each in result[part]["requests"])


def test_a_result_holds_the_answers_when_asked(run: Run, requests: Requests) -> None:
    settings = requests.evaluate(keep_answers=True)
    result = evaluate(str(run.base), run.out / "patch", settings)
    answers = [each["answer"] for each in result["harmful"]["requests"]]
    assert len(answers) == 6
    assert any(REFUSAL in answer for answer in answers)


def test_long_requests_are_shortened_to_one_line(run: Run, requests: Requests) -> None:
    result = evaluate(str(run.base), None, requests.evaluate())
    shown = [each["request"] for each in result["harmful"]["requests"]]
    assert shown[:-1] == HARMFUL[:-1]
    assert shown[-1] == "Break into the museum, and tell nobody …"


def test_the_limit_takes_requests_from_the_start(run: Run, requests: Requests) -> None:
    result = evaluate(str(run.base), None, requests.evaluate(limit=2))
    assert [each["request"] for each in result["harmful"]["requests"]] == HARMFUL[:2]
    assert [each["request"] for each in result["benign"]["requests"]] == BENIGN[:2]


def test_a_second_measurement_gives_the_same_result(run: Run, requests: Requests) -> None:
    first, second = (
        evaluate(str(run.base), run.out / "patch", requests.evaluate()) for _ in range(2)
    )
    assert {k: v for k, v in first.items() if k not in WHEN} == {
        k: v for k, v in second.items() if k not in WHEN
    }


def test_a_result_is_plain_json(run: Run, requests: Requests) -> None:
    result = evaluate(str(run.base), None, requests.evaluate(limit=1))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_patch_of_another_base_is_refused_before_the_base_is_asked_anything(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "other", dtype=torch.bfloat16, seed=1)
    job = str(save_tiny_tokenizer(other)), run.out / "patch", requests.evaluate()
    recorder = Recorder()
    with pytest.raises(BaseMismatchError):
        evaluate(*job, progress=recorder)
    assert recorder.tasks == []


def test_a_map_in_place_of_a_patch_is_refused(run: Run, requests: Requests) -> None:
    with pytest.raises(SafeWeightsError, match="spa"):
        evaluate(str(run.base), run.out / "map", requests.evaluate())


def test_a_missing_source_of_requests_is_refused(run: Run, requests: Requests) -> None:
    with pytest.raises(DataError, match=r"^nowhere\.json: expected a file"):
        evaluate(str(run.base), None, requests.evaluate(harmful="nowhere.json"))


def test_the_source_is_told_by_its_digest(run: Run, requests: Requests, tmp_path: Path) -> None:
    first = evaluate(str(run.base), None, requests.evaluate())
    moved = tmp_path / "moved.json"
    moved.write_bytes(Path(requests.harmful).read_bytes())
    second = evaluate(str(run.base), None, requests.evaluate(harmful=str(moved)))
    assert first["harmful"]["data_digest"] == second["harmful"]["data_digest"]
    third = evaluate(str(run.base), None, requests.evaluate(limit=5))
    assert third["harmful"]["data_digest"] != first["harmful"]["data_digest"]
    assert len(read_rows(str(moved))) == 6


def test_the_loss_on_a_task_is_the_mean_over_its_answer_tokens(
    run: Run, requests: Requests
) -> None:
    result = evaluate(str(run.base), None, requests.evaluate(task=requests.lessons))
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
    assert evaluate(str(run.base), None, requests.evaluate())["task"] is None
