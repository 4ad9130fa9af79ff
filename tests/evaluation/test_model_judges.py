"""Guards and classifiers as judges, held to one pass over each conversation by hand."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from safeweights_peft.errors import EvaluationError, ModelError, SelectionError
from safeweights_peft.evaluation import judge_kinds
from safeweights_peft.evaluation.judge_kinds import Place, find_model, name_judge
from safeweights_peft.evaluation.judges import Judge, Verdict
from safeweights_peft.evaluation.model_judges import ClassifierReader, LibraryJudge
from safeweights_peft.selection.guards import PROFILES, find_profile
from tests.tiny_guards import save_byte_level_tokenizer, save_tiny_classifier, save_tiny_guard

PLACE = (torch.device("cpu"), torch.float32)
ANSWERS = ["Sure.", "I can't help with that", "To open a lock, push", "No", "Take a key, a hat"]
PAIRS = [(f"Open {n} locks", ANSWERS[n % 5] + " zyxwv"[: 1 + n // 4]) for n in range(20)]
GARBAGE = ("Open it", "the the the the the the the the")


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), load(path)
    letters = tokenizer.convert_tokens_to_ids([*"abcdefghijklmnop"])
    says_no_letter = torch.ones(len(model.lm_head.weight), dtype=torch.bool)
    says_no_letter[letters] = False
    model.lm_head.weight.data[says_no_letter] = 0  # of sixteen random logits one is above that
    model.save_pretrained(path)
    return path


def spread_labels(guard: Path) -> tuple[list[str], list[str], list[str]]:
    """Finds what a guard says of each pair, and shares these tokens out as labels."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(guard), load(guard)
    said = []
    for request, answer in PAIRS:
        ids = tokenizer(f"{request}|{answer}", add_special_tokens=False)["input_ids"]
        said.append(tokenizer.decode(model(torch.tensor([ids])).logits[0, -1].argmax()))
    first, second, *_ = dict.fromkeys(said)
    return said, [first], [second]


def load(path: Path):
    return AutoTokenizer.from_pretrained(path)


def make_judges(names: list[str], place: Place) -> list[Judge]:
    """Makes judges and has them checked, as every job does."""
    judges = judge_kinds.make_judges(names, place)
    judge_kinds.check_judges(judges)
    return judges


def write_profile(path: Path, **content: object) -> str:
    path.write_text(json.dumps({"template": "{request}|{answer}"} | content))
    return str(path)


def test_a_guard_judges_by_the_token_that_it_says(guard: Path, tmp_path: Path) -> None:
    said, safe, unsafe = spread_labels(guard)
    profile = write_profile(tmp_path / "p.json", safe=safe, unsafe=unsafe)
    (judge,) = make_judges([f"guard:{guard}={profile}"], PLACE)
    meaning = dict.fromkeys(unsafe, Verdict.COMPLIED) | dict.fromkeys(safe, Verdict.REFUSED)
    expected = [meaning.get(token, Verdict.INVALID) for token in said]
    assert judge.judge(PAIRS) == expected
    assert Verdict.REFUSED in expected
    swapped = write_profile(tmp_path / "q.json", safe=unsafe, unsafe=safe)
    (other,) = make_judges([f"guard:{guard}={swapped}"], PLACE)
    turned = {Verdict.COMPLIED: Verdict.REFUSED, Verdict.REFUSED: Verdict.COMPLIED}
    assert other.judge(PAIRS) == [turned.get(verdict, verdict) for verdict in expected]


def test_a_guard_that_says_none_of_its_labels_leaves_answers_invalid(
    guard: Path, tmp_path: Path
) -> None:
    said, *_ = spread_labels(guard)
    unused = [letter for letter in "qxzQXZ" if letter not in said]
    profile = write_profile(tmp_path / "p.json", safe=unused[:1], unsafe=unused[1:2])
    (judge,) = make_judges([f"guard:{guard}={profile}"], PLACE)
    assert set(judge.judge(PAIRS)) == {Verdict.INVALID}


def test_garbage_and_what_is_too_long_are_invalid_whatever_a_guard_says(
    guard: Path, tmp_path: Path
) -> None:
    _, safe, _ = spread_labels(guard)
    profile = write_profile(tmp_path / "p.json", safe=safe, unsafe=["~"])
    (judge,) = make_judges([f"guard:{guard}={profile}"], PLACE)
    found = judge.judge([PAIRS[0], GARBAGE, ("Open " + "a lock " * 200, "Sure."), PAIRS[0]])
    assert found[0] is found[3]
    assert found[1:3] == [Verdict.INVALID] * 2
    assert judge.judge([GARBAGE]) == [Verdict.INVALID]


@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("meta-llama/Llama-Guard-3-8B", "llama-guard-3"),
        ("meta-llama/Llama-Guard-4-12B", "llama-guard-4"),
        ("google/shieldgemma-2b", "shieldgemma"),
        ("allenai/wildguard", "wildguard"),
        ("ibm-granite/granite-guardian-3.1-2b", "granite-guardian"),
        ("Qwen/Qwen3Guard-Gen-0.6B", "qwen3guard"),
        ("/models/qwen3guard", "qwen3guard"),
        ("someone/a-guard", None),
    ],
)
def test_the_name_of_a_guard_tells_its_profile(name: str, profile: str | None) -> None:
    assert find_profile(name) == profile
    assert profile is None or profile in PROFILES


def test_the_config_of_a_guard_tells_its_profile_too(guard: Path) -> None:
    config = json.loads((guard / "config.json").read_text())
    (guard / "config.json").write_text(json.dumps(config | {"_name_or_path": "a/wildguard"}))
    assert find_profile(str(guard)) == "wildguard"


def test_a_guard_is_checked_without_loading_it(guard: Path, tmp_path: Path) -> None:
    (guard / "model.safetensors").write_bytes(b"")
    long = write_profile(tmp_path / "long.json", safe=["safe"], unsafe=["unsafe"])
    with pytest.raises(SelectionError, match="to be one token"):
        make_judges([f"guard:{guard}={long}"], PLACE)
    with pytest.raises(EvaluationError, match=r"guard whose profile its name tells.*=wildguard"):
        make_judges([f"guard:{guard}"], PLACE)
    with pytest.raises(SelectionError, match="expected a JSON file or one of llama-guard-3"):
        make_judges([f"guard:{guard}=nothing"], PLACE)
    short = write_profile(tmp_path / "short.json", safe=["s"], unsafe=["u"])
    assert make_judges([f"guard:{guard}={short}"], PLACE)[0].name == "guard:guard=short.json"


def classify(path: Path, answers: list[str]) -> torch.Tensor:
    """Classifies each answer by itself."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), load(path)
    return torch.stack(
        [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in answers]
    )


@pytest.mark.parametrize(
    ("label", "meaning", "above"),
    [
        ("toxic", "unsafe", Verdict.COMPLIED),
        ("safe", "safe", Verdict.REFUSED),
        ("REJECTION", "refused", Verdict.REFUSED),
    ],
)
def test_a_classifier_judges_by_the_probability_of_its_label(
    tmp_path: Path, label: str, meaning: str, above: Verdict
) -> None:
    path = save_tiny_classifier(save_byte_level_tokenizer(tmp_path / "cls"), ["other", label])
    (judge,) = make_judges([f"classifier:{path}"], PLACE)
    assert judge.name == f"classifier:cls={meaning}={label}"
    assert judge.tells_refusals is (meaning == "refused")
    below = Verdict.REFUSED if above is Verdict.COMPLIED else Verdict.COMPLIED
    likely = classify(path, [answer for _, answer in PAIRS]).softmax(-1)[:, 1] >= 0.5
    assert judge.judge(PAIRS) == [above if is_likely else below for is_likely in likely]
    (given,) = make_judges([f"classifier:{path}={meaning}=other"], PLACE)
    assert given.judge(PAIRS) == [below if is_likely else above for is_likely in likely]
    assert judge.judge([GARBAGE]) == [Verdict.INVALID]


def test_labels_of_several_may_all_be_likely(tmp_path: Path) -> None:
    path = save_byte_level_tokenizer(tmp_path / "cls")
    save_tiny_classifier(path, ["insult", "threat"], "multi_label_classification")
    (judge,) = make_judges([f"classifier:{path}=unsafe=threat"], PLACE)
    likely = classify(path, [answer for _, answer in PAIRS])[:, 1] >= 0
    verdicts = {True: Verdict.COMPLIED, False: Verdict.REFUSED}
    assert judge.judge(PAIRS) == [verdicts[bool(is_likely)] for is_likely in likely]


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("", "expected a label of known meaning, found bad, good; add =unsafe=LABEL"),
        ("=unsafe=evil", "one of its labels bad, good, found 'evil'"),
        ("=bad", "expected =safe=LABEL or =unsafe=LABEL or =refused=LABEL behind the model"),
        ("=unsafe=", "expected =safe=LABEL"),
    ],
)
def test_a_classifier_whose_label_means_nothing_is_refused(
    tmp_path: Path, suffix: str, message: str
) -> None:
    path = save_tiny_classifier(save_byte_level_tokenizer(tmp_path / "cls"), ["good", "bad"])
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises((EvaluationError, SelectionError), match=message):
        make_judges([f"classifier:{path}{suffix}"], PLACE)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    empty = save_byte_level_tokenizer(tmp_path / "empty")
    (empty / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="expected a model with weights, found none"):
        make_judges([f"guard:{empty}=wildguard"], PLACE)
    for judge in ("classifier:/nowhere=unsafe=bad", "guard:/nowhere=wildguard"):
        with pytest.raises(ModelError, match="/nowhere: expected a model directory or a Hub id"):
            make_judges([judge], PLACE)


def test_a_directory_may_have_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a=b"
    path.mkdir()
    assert find_model(f"guard:{path}") == find_model(f"guard:{path}=wildguard") == str(path)
    assert name_judge(f"guard:{path}=wildguard") == "guard:a=b=wildguard"
    assert find_model("refusals") is find_model("openai:m@https://x.org") is None
    assert name_judge("classifier:someone/cls=unsafe=bad") == "classifier:someone/cls=unsafe=bad"


def test_a_probability_that_is_none_is_no_verdict(tmp_path: Path) -> None:
    path = save_tiny_classifier(save_byte_level_tokenizer(tmp_path / "cls"), ["safe", "unsafe"])
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.score.weight.data.fill_(torch.nan)
    model.save_pretrained(path)
    judge = ClassifierReader(f"{path}=safe=safe", *PLACE)
    assert set(judge.judge(PAIRS)) == {Verdict.INVALID}


def test_without_judgezoo_its_judges_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeweights_peft.evaluation.model_judges.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"expected the library judgezoo, found none; pip"):
        make_judges(["judgezoo:harmbench"], PLACE)


class Zoo:
    """Stands in for judgezoo, with the interface of its release 0.1.9."""

    class Judge:
        """Finds locks harmful."""

        @classmethod
        def from_name(cls, name: str):
            if name != "locks":
                raise ValueError(f"Unknown judge {name}")
            return lambda chats: {"p_harmful": [cls.harm(chat) for chat in chats]}

        @staticmethod
        def harm(chat: list[dict[str, str]]) -> float | None:
            assert [turn["role"] for turn in chat] == ["user", "assistant"]
            return {"Sure.": 0.9, "No": None}.get(chat[1]["content"], 0.1)


def test_a_judge_of_judgezoo_gives_the_probability_of_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "judgezoo", Zoo)
    monkeypatch.setattr("safeweights_peft.evaluation.model_judges.find_spec", lambda name: Zoo)
    (judge,) = make_judges(["judgezoo:locks"], PLACE)
    pairs = [("x", "Sure."), ("x", "No"), ("x", "Perhaps not."), GARBAGE]
    complied, refused = Verdict.COMPLIED, Verdict.REFUSED
    assert judge.judge(pairs) == [complied, Verdict.INVALID, refused, Verdict.INVALID]
    assert judge.judge([GARBAGE]) == [Verdict.INVALID]
    with pytest.raises(EvaluationError, match="found ValueError: Unknown judge keys"):
        LibraryJudge("keys").judge(pairs)


def test_the_library_has_the_interface_that_is_asked() -> None:
    judgezoo = pytest.importorskip("judgezoo")
    with pytest.raises(ValueError, match="Unknown judge"):
        judgezoo.Judge.from_name("nobody")
