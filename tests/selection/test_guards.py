"""Guards: each profile says what it must, and a wrong one is refused by name."""

import json
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection.guards import PROFILES, GuardProfile, read_profile
from safeweights_peft.selection.soft_judges import ClassifierJudge, GuardJudge
from tests.tiny_guards import save_byte_level_tokenizer, save_tiny_classifier, save_tiny_guard
from tests.tiny_models import CHAT_TEMPLATE

PARTS_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_byte_level_tokenizer(tmp_path / "tokenizer"))


@pytest.mark.parametrize("name", PROFILES)
def test_every_guard_reads_request_and_answer_in_this_order(name: str, tokenizer) -> None:
    profile = PROFILES[name]
    tokenizer.chat_template = PARTS_TEMPLATE if profile.parts else CHAT_TEMPLATE
    before, after = profile.render(tokenizer, "How do I steal?")
    assert "How do I steal?" in before
    assert "answer" not in before[before.index("steal") :].replace("Answers", "")
    assert after.endswith(profile.cue)
    assert not set(profile.safe) & set(profile.unsafe)


def test_a_guards_own_chat_template_gets_its_options(tokenizer) -> None:
    tokenizer.chat_template = "{{ guideline }}|{{ messages[1].content }}|"
    profile = GuardProfile(safe=("No",), unsafe=("Yes",), options={"guideline": "Be kind."})
    assert profile.render(tokenizer, "x") == ("Be kind.|", "|")


def test_a_cue_that_the_prompt_ends_with_is_not_repeated(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[1].content + '\n\n' }}"
    assert GuardProfile(("s",), ("u",), cue="\n\n").render(tokenizer, "x") == ("", "\n\n")


@pytest.mark.parametrize(
    ("template", "times"), [("{{ messages[0].content }}", 0), ("{{ messages[1].content * 2 }}", 2)]
)
def test_a_template_that_does_not_show_the_answer_once_is_refused(
    tokenizer, template: str, times: int
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(SelectionError, match=f"answer once, found it {times} times"):
        PROFILES["llama-guard-3"].render(tokenizer, "x")


def test_a_guard_without_a_chat_template_is_refused(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(SelectionError, match="expected a chat template, found none"):
        PROFILES["llama-guard-3"].render(tokenizer, "x")


def test_a_profile_in_a_file_is_one_of_its_own(tmp_path: Path, tokenizer) -> None:
    content = {"safe": ["ok"], "unsafe": ["bad"], "template": "Q {request} A {answer}", "cue": "?"}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    profile = read_profile(str(tmp_path / "mine.json"))
    assert (profile.safe, profile.unsafe) == (("ok",), ("bad",))
    assert profile.render(tokenizer, "{answer}") == ("Q {answer} A ", "?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"safe": []}, "safe: expected a list of labels"),
        ({"unsafe": "bad"}, "unsafe: expected a list of labels"),
        ({"labels": ["x"]}, "labels: expected only cue, options, parts, safe, template, unsafe"),
        ({"cue": 3}, "cue: expected a str, found 3"),
        ({"options": []}, "options: expected a dict"),
        ({"template": "A {answer}"}, "template: expected {request} and {answer} in it"),
        ({"template": "{request} {answer} {answer}"}, "template: expected .* once each"),
        ({"unsafe": ["bad", "ok"]}, "safe: expected labels that aren't unsafe too, found 'ok'"),
        ({"options": {"tokenize": True}}, "options: expected what .* found tokenize"),
    ],
)
def test_a_wrong_profile_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    content = {"safe": ["ok"], "unsafe": ["bad"]} | changes
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(SelectionError, match=message):
        read_profile(str(tmp_path / "mine.json"))


def test_a_label_of_several_tokens_is_refused(tmp_path: Path, tokenizer) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(SelectionError, match=r"the label 'unsafe' to be one token .* found 5"):
        GuardJudge(guard, tokenizer, tokenizer, GuardProfile(("s",), ("unsafe",)))


def test_a_label_that_the_classifier_lacks_is_refused(tmp_path: Path, tokenizer) -> None:
    path = save_tiny_classifier(save_byte_level_tokenizer(tmp_path / "cls"), ["good", "bad"])
    classifier = AutoModelForSequenceClassification.from_pretrained(path)
    with pytest.raises(SelectionError, match="one of its labels bad, good, found 'evil'"):
        ClassifierJudge(classifier, tokenizer, tokenizer, "evil", is_safe=False)
