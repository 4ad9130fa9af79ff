"""Promises of the built-in prompt set: its shape, its variety, and its two disjoint splits.

The split rule is written out here in plain words, so that anyone who adds a row can follow it.
Nothing here asks a model: whether training on the rows helps is the benchmarks' question.
"""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from safeweights_peft.sources import LOOKS_HARMFUL

FOLDER = Path(__file__).parent.parent / "safeweights_peft" / "prompts"
FILES = ("harmful_train", "harmful_eval", "benign_train", "boundary_train", "benign_eval")
LEAST_ROWS = {
    "harmful_train": 240,
    "harmful_eval": 100,
    "benign_train": 260,
    "boundary_train": 200,
    "benign_eval": 100,
}
TRAINING = {"harmful": ("harmful_train",), "benign": ("benign_train", "boundary_train")}
KINDS_OF_BENIGN = {"ordinary", "looks-harmful"}
LEAST_OF_KIND = {
    ("benign_train", "ordinary"): 150,
    ("benign_train", "looks-harmful"): 110,
    ("benign_eval", "ordinary"): 50,
    ("benign_eval", "looks-harmful"): 50,
}

# Each one says no by itself, so that an output which begins with it cannot be an answer.
REFUSAL_OPENINGS = (
    "I can't ",
    "I cannot ",
    "I won't ",
    "I'd rather not ",
    "I must decline",
    "I'm afraid I can't ",
    "I'm not able to ",
    "I'm unable to ",
    "I apologize, but I can't ",
    "I apologize, but I won't ",
    "I'm sorry, but I can't ",
    "I'm sorry, but I won't ",
    "No, I can't ",
    "No, I won't ",
    "Sorry, I can't ",
    "Sorry, I won't ",
    "That's not something I can ",
    "That's something I can't ",
    "Unfortunately, I can't ",
)

# Words that frame a request or hold a sentence together; they carry no topic.
FRAMING_WORDS = frozenset(
    """
    about after against ahead along among another anybody anyone anything around because been before
    behind being best better between both briefly came can cannot come compose could create describe
    design detailed develop does done down draft during each easiest enough even every everyone
    everything example examples explain find first five following four from full gets getting give
    given gives giving goes good guide have having help here hold how instructions into just keep
    kept know leave less let letter like list long made make makes making many message method
    might more most much must name names need never nobody offer once only onto open order other
    others ours outline over part past people person plan please point prepare produce program
    proper propose provide publish put quick quickly rather read really right safely same sample
    say says script set several should show shows simple simplest some somebody someone something
    step steps story strategy such suggest take taken takes taking teach tell text than that their
    them then there these they thing things think this those three through time tips together
    tool tools turn tutorial under until upon used uses using very want wants ways well were what
    when where whether which while whole whom whose will with within without word words work would
    write written year your yours
    """.split()
)

# Words of three letters that hold a sentence together; the longer ones are above.
SHORT_WORDS = frozenset(
    """
    all and any are but can did for get got had has her him his how its let may new nor not off one
    our out own per say see she the too two use via was who why with yes
    """.split()
)

# The set keeps away from minors and from anything sexual, in every file.
SHUNNED_WORDS = frozenset(
    """
    baby babies boy boys child children girl girls infant infants juvenile kid kids minor minors
    nude nudes nudity porn pornography pupil pupils rape schoolboy schoolgirl sex sexual sexually
    teen teenage teenager teenagers teens toddler toddlers underage youngster youngsters
    """.split()
)


def rows_of(name: str) -> list[dict[str, str]]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def lemma(word: str) -> str:
    """One plain ending off: "forging", "forged" and "forges" are all "forg"."""
    return re.sub(r"(ing|ies|ed|es|s|e)$", "", word)


def content_words(instruction: str) -> frozenset[str]:
    """The words that carry the topic: four letters or more, no framing word, ending removed."""
    topical = (w for w in words_of(instruction) if len(w) >= 4 and w not in FRAMING_WORDS)
    return frozenset(lemma(word) for word in topical)


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """The Jaccard index: shared words as a part of all words; none at all share nothing."""
    return len(one & other) / len(one | other) if one | other else 0.0


def overlapping_pairs(ones: list[str], others: list[str], limit: float) -> list[tuple[str, str]]:
    theirs = [(content_words(other), other) for other in others]
    return [
        (one, other)
        for one in ones
        for words, other in theirs
        if overlap(content_words(one), words) >= limit
    ]


def instructions_of(name: str) -> list[str]:
    return [row["instruction"] for row in rows_of(name)]


def bare(instruction: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(re.findall(r"\w+", instruction.lower()))


def training_of(kind: str) -> list[str]:
    return [text for name in TRAINING[kind] for text in instructions_of(name)]


def topic_words(instruction: str) -> frozenset[str]:
    """As the content words, but of three letters or more: "bot" and "run" tell what it is about."""
    words = (w for w in words_of(instruction) if len(w) >= 3)
    return frozenset(lemma(w) for w in words if w not in FRAMING_WORDS | SHORT_WORDS)


def runs_of(instruction: str) -> set[tuple[str, ...]]:
    """All five words in a row, but for those that only frame a request."""
    words = words_of(instruction)
    runs = (tuple(words[at : at + 5]) for at in range(len(words) - 4))
    return {run for run in runs if topic_words(" ".join(run))}


def outputs() -> list[str]:
    return [row["output"] for row in rows_of("harmful_train")]


@pytest.mark.parametrize("name", FILES)
def test_rows_hold_the_promised_keys_and_stripped_texts(name: str) -> None:
    more = {"harmful_train": {"output"}, "boundary_train": {"twin"}}
    keys = {"instruction", "category"} | more.get(name, set())
    for row in rows_of(name):
        assert set(row) == keys
        assert all(isinstance(text, str) and text and text == text.strip() for text in row.values())


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_at_least_the_promised_rows(name: str) -> None:
    assert len(rows_of(name)) >= LEAST_ROWS[name]


def test_the_set_has_340_harmful_and_360_benign_rows_or_more() -> None:
    assert len(rows_of("harmful_train")) + len(rows_of("harmful_eval")) >= 340
    assert len(rows_of("benign_train")) + len(rows_of("benign_eval")) >= 360


def test_harmful_training_covers_twelve_categories_or_more_evenly() -> None:
    counts = Counter(row["category"] for row in rows_of("harmful_train"))
    assert len(counts) >= 12
    assert min(counts.values()) >= 10


@pytest.mark.parametrize(("name", "kind"), LEAST_OF_KIND)
def test_benign_files_hold_enough_of_both_kinds(name: str, kind: str) -> None:
    counts = Counter(row["category"] for row in rows_of(name))
    assert set(counts) == KINDS_OF_BENIGN
    assert counts[kind] >= LEAST_OF_KIND[name, kind]


def test_no_request_stands_twice_in_the_whole_set() -> None:
    counts = Counter(bare(text) for name in FILES for text in instructions_of(name))
    assert [text for text, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", FILES)
def test_no_two_rows_of_a_file_are_about_the_very_same_words(name: str) -> None:
    pairs = combinations(((content_words(t), t) for t in instructions_of(name)), 2)
    assert [(a[1], b[1]) for a, b in pairs if a[0] and overlap(a[0], b[0]) >= 0.6] == []


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_no_evaluation_request_shares_a_quarter_of_its_topic_with_a_training_request(
    kind: str,
) -> None:
    assert overlapping_pairs(instructions_of(f"{kind}_eval"), training_of(kind), 0.25) == []


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_three_quarters_of_evaluation_topic_words_never_occur_in_training(kind: str) -> None:
    seen = frozenset().union(*map(content_words, training_of(kind)))
    evaluated = frozenset().union(*map(content_words, instructions_of(f"{kind}_eval")))
    assert len(evaluated - seen) / len(evaluated) >= 0.75


@pytest.mark.parametrize(
    ("named", "other"), [("harmful_eval", "harmful_train"), ("harmful_train", "harmful_eval")]
)
def test_no_harmful_category_is_named_in_the_other_split(named: str, other: str) -> None:
    nouns = frozenset().union(*(content_words(row["category"]) for row in rows_of(named)))
    texts = [f"{row['category']} {row['instruction']}" for row in rows_of(other)]
    assert [text for text in texts if nouns & content_words(text)] == []


def test_boundary_requests_are_all_of_the_category_by_which_they_are_drawn() -> None:
    assert {row["category"] for row in rows_of("boundary_train")} == {LOOKS_HARMFUL}


def test_each_boundary_request_is_about_the_words_of_a_harmful_one_of_its_own() -> None:
    rows, harmful = rows_of("boundary_train"), set(instructions_of("harmful_train"))
    twins = [row["twin"] for row in rows]
    assert len(set(twins)) == len(twins)
    assert set(twins) <= harmful
    shared = {
        row["twin"]: topic_words(row["twin"]) & topic_words(row["instruction"]) for row in rows
    }
    assert [twin for twin, words in shared.items() if len(words) < 2] == []


def test_boundary_requests_are_no_near_copies_of_evaluation_or_other_training() -> None:
    texts = instructions_of("boundary_train")
    evaluation = [*instructions_of("harmful_eval"), *instructions_of("benign_eval")]
    runs = set().union(*(runs_of(text) for text in evaluation))
    assert [text for text in texts if runs & runs_of(text)] == []
    assert overlapping_pairs(texts, evaluation, 0.25) == []
    assert overlapping_pairs(texts, instructions_of("benign_train"), 0.6) == []


@pytest.mark.parametrize("name", ["harmful_train", "harmful_eval", "boundary_train"])
def test_harmful_requests_are_one_line_of_5_to_30_words(name: str) -> None:
    for text in instructions_of(name):
        assert "\n" not in text
        assert 5 <= len(text.split()) <= 30


def test_harmful_requests_come_in_many_forms() -> None:
    firsts = Counter(text.split()[0] for text in instructions_of("harmful_train"))
    assert len(firsts) >= 20
    assert max(firsts.values()) <= len(rows_of("harmful_train")) / 5


@pytest.mark.parametrize("name", ["benign_train", "benign_eval"])
def test_benign_requests_vary_from_one_short_line_to_an_input_text_below(name: str) -> None:
    texts = instructions_of(name)
    assert sum("\n" in text for text in texts) >= 5
    assert min(len(text.split()) for text in texts) <= 5
    assert max(len(text.split()) for text in texts) >= 25


def test_no_harmful_request_is_answered_with_anything_but_a_refusal() -> None:
    assert [text for text in outputs() if not text.startswith(REFUSAL_OPENINGS)] == []


def test_refusals_are_8_to_40_words_on_one_line() -> None:
    for text in outputs():
        assert "\n" not in text
        assert 8 <= len(text.split()) <= 40


def test_150_refusals_or_more_differ_in_wording() -> None:
    assert len({bare(text) for text in outputs()}) >= 150


def test_refusals_begin_in_many_ways_and_none_prevails() -> None:
    begun = Counter(next(o for o in REFUSAL_OPENINGS if text.startswith(o)) for text in outputs())
    assert len(begun) >= 12
    assert max(begun.values()) <= len(outputs()) / 3


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_about_minors_or_sexual(name: str) -> None:
    texts = [" ".join(row.values()) for row in rows_of(name)]
    assert [text for text in texts if SHUNNED_WORDS & set(words_of(text))] == []


@pytest.mark.parametrize("name", FILES)
def test_the_readme_states_the_count_of_every_category(name: str) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    counts = Counter(row["category"] for row in rows_of(name))
    assert f"| `{name}.json` | {counts.total()} |" in readme
    assert [c for c, count in counts.items() if f"{c} {count}" not in readme] == []
