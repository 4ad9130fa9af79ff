"""A conversation: answers as `eval` gets them, all turns kept, the scale switched in place."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeweights_peft.errors import BaseMismatchError, EvaluationError, SettingsError
from safeweights_peft.evaluation.generate import generate_answers, stream_answer
from safeweights_peft.jobs.chat import Chat
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.merge import merge
from safeweights_peft.modeling.answers import find_layout
from safeweights_peft.settings import ComputeSettings
from tests.jobs.conftest import Counts, Run
from tests.tiny_jobs import HARMFUL, let_write


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeweights_peft.jobs.chat.MAX_NEW_TOKENS", 11)


def first_answer(model_dir: Path) -> str:
    job = Job(model_dir)
    (answer,) = generate_answers(job.model, job.chat, HARMFUL[:1], max_new_tokens=11)
    return job.read(answer)


def test_a_first_answer_is_that_of_the_merged_model_at_each_scale(
    run: Run, tmp_path: Path, counts: Counts
) -> None:
    pieces: list[str] = []
    chat = Chat(Job(run.base), run.out / "patch")
    found = {}
    for scale in (1.0, 0.5, 0.0):
        chat.set_scale(scale)
        chat.turns.clear()
        found[scale] = chat.ask(HARMFUL[0], lambda text, _: pieces.append(text))
    assert counts.loads == 1
    assert "".join(pieces) == "".join(found.values())
    for scale, answer in found.items():
        merge(run.base, [(run.out / "patch", scale)], tmp_path / str(scale))
        assert answer == first_answer(tmp_path / str(scale))
    assert found[1.0] != found[0.0] == first_answer(run.base)


def test_the_base_is_a_switch_that_remembers_the_scale(run: Run) -> None:
    chat = Chat(Job(run.base), run.out / "patch", 0.5)
    before = {name: each.clone() for name, each in chat.job.model.named_parameters()}
    scales = [chat.scale]
    for _ in range(2):
        chat.toggle()
        scales.append(chat.scale)
    assert scales == [0.5, 0.0, 0.5]
    chat.ask("Hello")
    for name, parameter in chat.job.model.named_parameters():
        assert torch.equal(parameter, before[name])  # the patch is in it while it answers alone


def test_every_answer_knows_the_turns_before_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(Job(run.base))
    prompts: list[str] = []

    def stream(model, chat, ids, *others):
        prompts.append(chat.tokenizer.decode(ids))
        return stream_answer(model, chat, ids, *others)

    monkeypatch.setattr("safeweights_peft.jobs.chat.stream_answer", stream)
    answer = chat.ask("Name a barn")
    chat.ask("And a shop")
    assert prompts[1].startswith(prompts[0])
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert chat.turns[1] == {"role": "assistant", "content": answer, "scale": 0.0}
    assert "And a shop" in prompts[1]


def test_a_scale_needs_a_patch_and_a_number_in_range(run: Run) -> None:
    with pytest.raises(SettingsError, match="expected a patch, found none"):
        Chat(Job(run.base)).set_scale(0.5)
    chat = Chat(Job(run.base), run.out / "patch")
    for scale in ("x", float("nan"), 1e30):
        with pytest.raises(SettingsError, match="scale: expected"):
            chat.set_scale(scale)
    assert chat.scale == 1.0


def test_a_patch_of_another_base_is_refused_before_a_model_is_loaded(
    run: Run, tiny_llama: Path, counts: Counts
) -> None:
    with pytest.raises(BaseMismatchError):
        Chat(Job(tiny_llama), run.out / "patch")
    assert counts.loads == 0


def test_an_answer_ends_with_the_models_positions_and_a_longer_conversation_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(run.base)
    layout = replace(find_layout(job.model), positions=16)
    monkeypatch.setattr("safeweights_peft.evaluation.generate.find_layout", lambda _: layout)
    short = stream_answer(job.model, job.chat, [5] * 14, 11, lambda *_: None)
    assert len(short.answer_ids) <= 2
    with pytest.raises(EvaluationError, match=r"fewer tokens than the 16 .* begin another"):
        stream_answer(job.model, job.chat, [5] * 16, 11, lambda *_: None)


@pytest.mark.parametrize("generates", [True, False])
@pytest.mark.parametrize(
    ("written", "thought", "answer", "is_cut"),
    [
        ("<think>Hm. A b\n</think>\n\nI won't.", "<think>Hm. A b\n</think>", "\n\nI won't.", False),
        ("No <think> of it.", "", "No <think> of it.", False),
        ("<th", "", "<th", False),  # held back until it ends there
        ("<thin ice> ahead", "", "<thin ice> ahead", False),
        ("<think>Hm, I", "<think>Hm, I", "", True),
        ("<think></think>Yes.", "<think></think>", "Yes.", False),
        ("", "", "", False),
    ],
)  # fmt: skip
def test_thoughts_are_passed_on_apart_and_are_no_part_of_the_conversation(
    written: str,
    thought: str,
    answer: str,
    is_cut: bool,
    generates: bool,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = Chat(Job(run.base))
    layout = replace(find_layout(chat.job.model), generates=generates)
    monkeypatch.setattr("safeweights_peft.evaluation.generate.find_layout", lambda _: layout)
    let_write(written, chat.job.tokenizer, monkeypatch)
    pieces: list[tuple[str, bool]] = []
    assert chat.ask("Hi", lambda *piece: pieces.append(piece)) == answer
    for is_thought, text in ((True, thought), (False, answer)):
        assert "".join(piece for piece, kind in pieces if kind == is_thought) == text
    kinds = [kind for _, kind in pieces]
    assert kinds == sorted(kinds, reverse=True)  # the thought first
    assert not generates or len(pieces) >= written.count(" ")  # as it is written
    assert chat.turns[1]["content"] == answer
    assert chat.turns[1].get("cut_in_thought", False) == is_cut


def test_a_thought_that_the_prompt_begins_is_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(Job(run.base, ComputeSettings(answer_prefix="<think>\n")))
    let_write("Hm, so.</think>No.", chat.job.tokenizer, monkeypatch)
    pieces: list[tuple[str, bool]] = []
    assert chat.ask("Hi", lambda *piece: pieces.append(piece)) == "No."
    assert pieces == [("Hm, ", True), ("so.</think>", True), ("No.", False)]
