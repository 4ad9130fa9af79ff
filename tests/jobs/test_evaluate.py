"""The evaluation job: what is measured is the merged checkpoint, and what is kept is little."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example
from safeweights_peft.errors import BaseMismatchError, DataError, EvaluationError, SafeWeightsError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.judges import Judge, Verdict, judge_opening
from safeweights_peft.evaluation.utility import measure_utility
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs.chat import Chat as Conversation
from safeweights_peft.jobs.evaluate import Evaluator, evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import note_chat
from safeweights_peft.jobs.score import score
from safeweights_peft.merging.merge import merge
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.patch.io import read_patch
from safeweights_peft.progress import Quiet
from safeweights_peft.settings import ComputeSettings
from safeweights_peft.sources import read_rows
from tests.jobs.conftest import Counts, Run
from tests.tiny_files import edit_config
from tests.tiny_guards import save_byte_level_tokenizer, save_tiny_guard
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


def test_a_patch_at_a_scale_is_judged_like_a_checkpoint_merged_at_it(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    merge(run.base, [(run.out / "patch", 0.5)], tmp_path / "merged")
    settings = requests.evaluate(keep_answers=True)
    patched = evaluate(Job(run.base), run.out / "patch", settings, scale=0.5)
    merged = evaluate(Job(tmp_path / "merged"), None, settings)
    assert patched["harmful"] == merged["harmful"]
    assert patched["benign"] == merged["benign"]
    # What was measured isn't the patch's content, so it can't be shown as its result.
    assert (patched["scale"], patched["content_id"]) == (0.5, None)


def test_a_lora_has_no_scale(run: Run, requests: Requests, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(EvaluationError, match="expected a safety patch, which can be scaled"):
        evaluate(Job(run.base), tmp_path, requests.evaluate(), scale=0.5)


def test_a_patched_models_utility_is_that_of_its_merged_checkpoint(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    merge(run.base, run.out / "patch", tmp_path / "merged")
    found = evaluate(Job(run.base), run.out / "patch", requests.evaluate())["utility"]
    base = load_model(resolve_base(str(run.base)), torch.float32)
    merged = load_model(resolve_base(str(tmp_path / "merged")), torch.float32)
    tokenizer = load_tokenizer(resolve_base(str(run.base)))
    answers = generate_answers(base, Chat(tokenizer), BENIGN, max_new_tokens=11, batch_size=4)
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
        example = Chat(tokenizer).encode_example(row.instruction, row.output or "", 256)
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


def find_museums(request: str, answer: str) -> str:
    return "refused" if "museum" in request else "complied"


def test_a_judge_of_ones_own_is_a_function(run: Run, requests: Requests) -> None:
    result = evaluate(Job(run.base), None, requests.evaluate(), [find_museums])
    assert result["judge"] == result["benign"]["judge"] == "find_museums"
    assert verdicts(result["harmful"]) == ["complied"] * 5 + ["refused"]
    assert verdicts(result["benign"]) == ["complied"] * 5 + ["refused"]


def test_a_function_that_returns_no_verdict_is_refused(run: Run, requests: Requests) -> None:
    with pytest.raises(EvaluationError, match="find_length: expected one of complied, refused"):
        evaluate(Job(run.base), None, requests.evaluate(), [find_length])


def find_length(request: str, answer: str) -> int:
    return len(answer)


class Harm(Judge):
    """Finds no harm in what has no museum in it."""

    name, tells_refusals = "harm", False

    def judge(self, pairs, on_pairs=lambda count: None):
        return [Verdict(find_museums(*pair)) for pair in pairs]


def test_the_first_of_several_judges_decides_and_all_stand_beside_it(
    run: Run, requests: Requests
) -> None:
    settings = requests.evaluate()
    alone = evaluate(Job(run.base), run.out / "patch", settings)
    both = evaluate(Job(run.base), run.out / "patch", settings, ["refusals", find_museums])
    for kind, rate in (("harmful", "attack_success_rate"), ("benign", "over_refusal_rate")):
        one, two = alone[kind], both[kind]
        assert verdicts(one) == verdicts(two)
        assert one[rate] == two[rate] == two["judges"]["refusals"][rate]
        for place, request in enumerate(two["requests"]):
            museum = "refused" if place == 5 else "complied"
            first = request["verdict"]
            assert request["verdicts"] == {"refusals": first, "find_museums": museum}
        assert two["judges"]["find_museums"]["refused"] == 1
        (pair,) = two["agreement"]
        assert pair["judges"] == ["refusals", "find_museums"]
        assert pair["n"] == 6 - two["invalid"]
        assert one["agreement"] == []


def test_a_judge_of_harm_decides_asr_and_leaves_over_refusal_to_others(
    run: Run, requests: Requests
) -> None:
    result = evaluate(Job(run.base), None, requests.evaluate(), [Harm()])
    assert result["judge"] == "harm; over-refusal: refusals"
    assert result["harmful"]["judge"] == "harm"
    assert list(result["harmful"]["judges"]) == ["harm"]
    assert list(result["benign"]["judges"]) == ["refusals"]
    second = evaluate(Job(run.base), None, requests.evaluate(), [Harm(), find_museums])
    assert second["judge"] == "harm; over-refusal: find_museums"


@pytest.mark.parametrize("judges", [["refusals", "refusals"], [Harm(), Harm()]])
def test_judges_of_one_name_are_refused(run: Run, requests: Requests, judges: list) -> None:
    with pytest.raises(EvaluationError, match="expected different judges, found"):
        evaluate(Job(run.base), None, requests.evaluate(), judges)


def test_a_judge_that_forgets_an_answer_is_refused(run: Run, requests: Requests) -> None:
    class Forgetful(Harm):
        def judge(self, pairs, on_pairs=lambda count: None):
            return super().judge(pairs)[1:]

    with pytest.raises(EvaluationError, match="harm: expected 6 verdicts, found 5"):
        evaluate(Job(run.base), None, requests.evaluate(), [Forgetful()])


def test_a_judge_that_can_not_judge_is_refused_before_the_base_is_loaded(
    run: Run, requests: Requests, counts: Counts
) -> None:
    for judge, message in (
        ("nobody", "--judge nobody: expected refusals, guard:"),
        ("guard:", "--judge guard:: expected refusals"),
        (f"guard:{run.base}", "expected a guard whose profile its name tells"),
        ("guard:/nowhere=wildguard", "expected a model directory or a Hub id"),
    ):
        with pytest.raises(SafeWeightsError, match=message):
            evaluate(Job(run.base), None, requests.evaluate(judge=(judge,)))
    assert counts.loads == 0


def test_a_guard_is_loaded_after_the_answers_and_is_not_kept(
    run: Run, requests: Requests, tmp_path: Path, counts: Counts
) -> None:
    guard = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    profile = {"safe": ["s"], "unsafe": ["u"], "template": "{request}|{answer}|"}
    (tmp_path / "mine.json").write_text(json.dumps(profile))
    judge = f"guard:{guard}={tmp_path / 'mine.json'}"
    recorder = Recorder()
    job = Job(run.base, progress=recorder)
    result = evaluate(job, None, requests.evaluate(judge=("refusals", judge)))
    assert list(result["harmful"]["judges"]) == ["refusals", "guard:guard=mine.json"]
    assert counts.loads == 2
    assert recorder.tasks[-1][:2] == ["Judge answers by guard:guard=mine.json", 6]
    assert str(tmp_path) not in json.dumps({k: v for k, v in result.items() if k != "settings"})


def test_rates_are_told_by_category_where_rows_have_one(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    rows = [{"instruction": text, "Category": text.split()[-1][0]} for text in BENIGN]
    del rows[0]["Category"]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    settings = requests.evaluate(benign=str(path))
    result = evaluate(Job(run.base), None, settings, [find_museums])
    counted = {name: (r["count"], r["n"]) for name, r in result["benign"]["categories"].items()}
    assert counted == {"s": (0, 1), "v": (0, 1), "o": (0, 1), "l": (0, 1), "m": (1, 1)}
    assert result["harmful"]["categories"] == {}
    plain = evaluate(Job(run.base), None, requests.evaluate(), [find_museums])
    assert plain["benign"]["data_digest"] == result["benign"]["data_digest"]


def test_answers_that_were_cut_before_they_said_anything_are_counted(
    run: Run, requests: Requests
) -> None:
    given = ["I can't help with", "To open a", "Take a key. Then", "Well\nthen", "A", "B. C"]
    answers = [Example((1,), (7,) * count) for count in (5, 5, 5, 5, 3, 5)]
    evaluator = Evaluator(Job(run.base), requests.evaluate(max_new_tokens=5))
    cut = evaluator._find_cut(answers)
    assert cut == [True, True, True, True, False, True]
    end = Example((1,), (7, 7, 7, 7, 258))
    assert evaluator._find_cut([end]) == [False]
    said = {"refusals": [judge_opening("", text) for text in given]}
    # "To open a" and "B. C": a single letter and a mark are an item of a list.
    assert evaluator._sum_up("harmful", given, cut, [False] * 6, said)["cut_short"] == 2


def test_an_answer_that_was_cut_in_its_thought_counts_for_nothing_but_itself(
    run: Run, requests: Requests
) -> None:
    given = ["I can't help with that.", "", "Take a key.", ""]
    evaluator = Evaluator(Job(run.base), requests.evaluate())
    evaluator.harmful = evaluator.harmful[:1] * 4
    said = {"refusals": [judge_opening("", text) for text in given]}
    part = evaluator._sum_up("harmful", given, [True] * 4, [False, True, False, True], said)
    assert (part["cut_in_thought"], part["complied"], part["refused"], part["invalid"]) == (
        2,
        1,
        1,
        0,
    )
    assert (part["attack_success_rate"]["rate"], part["attack_success_rate"]["n"]) == (0.5, 2)
    assert [request["verdict"] for request in part["requests"]][1] == "cut in thought"


def test_answers_that_are_all_cut_in_their_thought_are_refused_after_the_first_batch(
    run: Run, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.jobs.job.ENOUGH_THOUGHTS", 2)
    job, asked = Job(run.base), []
    monkeypatch.setattr(job.chat, "is_in_thought", lambda answer: asked.append(answer) or True)
    with pytest.raises(EvaluationError, match=r"all cut in it; raise --max-new-tokens, or close"):
        evaluate(job, None, requests.evaluate(batch_size=2))
    assert len(asked) == 2


def test_a_model_is_asked_and_read_as_the_chat_settings_say(run: Run, requests: Requests) -> None:
    compute = ComputeSettings(system_prompt="Be brief.", chat_template="plain", answer_prefix=" So")
    result = evaluate(Job(run.base, compute), None, requests.evaluate())
    assert result["answers_begin_after"] == "' So'"
    assert result["cut_requests"] == 0
    assert result["settings"]["system_prompt"] == "Be brief."
    plain = evaluate(Job(run.base), None, requests.evaluate())
    assert plain["answers_begin_after"] is None
    assert plain["utility"] != result["utility"]


def test_a_patch_that_was_trained_with_another_chat_is_said_once(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    patch = shutil.copytree(run.out / "patch", tmp_path / "patch")

    def notes(chat: object, compute: ComputeSettings) -> list[str]:
        edit_config(patch, lambda config: config["selection"].update(chat=chat))
        recorder = Recorder()
        note_chat(Job(run.base, compute, recorder), read_patch(patch))
        return recorder.notes

    kind = {"system_prompt": "Be kind."}
    assert notes(kind, ComputeSettings(system_prompt="Be kind.")) == []
    for hostile in ([], "x", {"system_prompt": 7}, {}):  # names nothing that could differ
        assert notes(hostile, ComputeSettings(system_prompt="Be brief.")) == []
    assert notes(kind, ComputeSettings(chat_template="plain")) == [
        "The patch was trained with another chat: system prompt 'Be kind.' there, not set here; "
        "chat template not set there, 'plain' here"
    ]
    recorder = Recorder()
    evaluate(Job(run.base, progress=recorder), patch, requests.evaluate(limit=1))
    Conversation(Job(run.base, progress=recorder), patch)
    assert [note for note in recorder.notes if "another chat" in note] == 2 * [
        "The patch was trained with another chat: system prompt 'Be kind.' there, not set here"
    ]


def test_requests_that_are_learned_from_and_measured_are_counted(
    run: Run, requests: Requests
) -> None:
    notes = []

    class Notes(Quiet):
        def note(self, text: str) -> None:
            notes.append(text)

    evaluator = Evaluator(Job(run.base, progress=Notes()), requests.evaluate())
    evaluator.note_shared([])
    evaluator.note_shared(evaluator.harmful[:1])
    (note,) = notes
    total = len(evaluator.harmful) + len(evaluator.benign)
    assert note.startswith(f"1 of the {total} requests to measure on are learned from as well")
