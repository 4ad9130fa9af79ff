"""A linear reading is what its definition says: states, fit, choice of the layer, and rates."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM

from safeweights_peft.data import Batching, Example, Layout, collate
from safeweights_peft.errors import DataError, ModelError
from safeweights_peft.jobs.job import Job
from safeweights_peft.modeling import answers
from safeweights_peft.modeling.answers import prompt_states
from safeweights_peft.settings import LinearSettings
from safeweights_peft.sources import Row
from safeweights_peft.study.linear import (
    FOLDS,
    compute_auc,
    deal_folds,
    find_threshold,
    fit_logistic,
    measure_scores,
    read_linearly,
)
from tests.tiny_jobs import Recorder, Requests, content

PROMPTS = [Example(ids, ()) for ids in ((5, 6, 7), (5, 6, 8, 9, 10), (5, 6, 11))]


@pytest.fixture
def settings(requests: Requests) -> LinearSettings:
    return LinearSettings(harmful=requests.harmful, benign=requests.benign)


@pytest.mark.parametrize("batching", Batching)
@torch.no_grad()
def test_the_states_of_a_batch_are_those_of_each_prompt_alone(
    batching: Batching, tiny_llama: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    found = prompt_states(model, collate(PROMPTS, 0, Layout(batching)))
    for position, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt.prompt_ids])
        told = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.stack([state[0, -1] for state in told[1:]])
        torch.testing.assert_close(found[:, position], expected)


def test_a_model_without_states_is_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    monkeypatch.setattr(answers, "_run", lambda *told, **options: object())
    with pytest.raises(ModelError, match="expected a model that returns the states of its layers"):
        prompt_states(model, collate(PROMPTS, 0, Layout(Batching.LEFT)))


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_fit_is_the_least_of_its_loss(penalty: float) -> None:
    states = torch.randn(40, 3, dtype=torch.float64)
    is_harmful = torch.arange(40) < 12
    states[is_harmful] += torch.tensor([1.0, -0.5, 0.0])

    def loss(fitted: np.ndarray) -> float:
        scores = states.numpy() @ fitted[:-1] + fitted[-1]
        harmful, benign = scores[is_harmful.numpy()], scores[~is_harmful.numpy()]
        mean = (np.logaddexp(0, -harmful).mean() + np.logaddexp(0, benign).mean()) / 2
        return mean + penalty / 2 * (fitted[:-1] ** 2).sum()

    weight, bias = fit_logistic(states, is_harmful, penalty)
    expected = minimize(loss, np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose([*weight, bias], expected, atol=1e-4)


def test_the_auc_counts_pairs_and_ties_by_half() -> None:
    harmful, benign = np.array([1.0, 2.0, 2.0, 5.0]), np.array([0.0, 2.0, 3.0])
    pairs = [(h > b) + (h == b) / 2 for h, b in product(harmful, benign)]
    assert compute_auc(harmful, benign) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(
    ("asr", "missed"), [(0.0, 0), (0.05, 1), (0.1, 3), (0.3, 9), (0.99, 29), (1.0, 30)]
)
def test_the_threshold_misses_as_many_as_it_may(asr: float, missed: int) -> None:
    harmful = np.random.default_rng(0).permutation(30.0 * np.arange(30))
    assert int((harmful < find_threshold(harmful, asr)).sum()) == missed


def test_of_equal_scores_none_is_missed_unless_all_may_be() -> None:
    assert find_threshold(np.ones(4), 0.75) == 1
    assert find_threshold(np.array([1.0, 1.0, 2.0, 2.0]), 0.5) == 2


def test_whole_categories_are_dealt_where_there_are_enough() -> None:
    rows = [Row("x", category=name) for name in "abcdefa"]
    folds = deal_folds(rows)
    assert folds[0] == folds[6]
    assert {*folds} == {*range(FOLDS)}


def test_few_categories_are_spread_over_all_folds() -> None:
    rows = [Row("x", category=name) for name in 5 * "ab"]
    for name in "ab":
        own = [
            fold for fold, row in zip(deal_folds(rows), rows, strict=True) if row.category == name
        ]
        assert own == [0, 1, 2, 3, 4]


def test_over_refusal_is_measured_at_each_asr_and_by_category() -> None:
    harmful = [Row("x")] * 20
    benign = [Row("x", category="easy")] * 30 + [Row("x", category="hard")] * 10
    scores = np.array([0.5, 1.5, *[3.0] * 18, *[0.0] * 30, *[1.0] * 5, *[2.0] * 5])
    strict, half, lax, all_missed = measure_scores(harmful, benign, scores, (0.0, 0.05, 0.1, 1.0))[
        "at"
    ]
    assert strict["attack_success_rate"]["count"] == 0
    assert strict["over_refusal_rate"]["count"] == 10
    assert (half["attack_success_rate"]["rate"], half["over_refusal_rate"]["count"]) == (0.05, 5)
    assert half["categories"]["hard"]["rate"] == 0.5
    assert half["categories"]["easy"]["rate"] == 0
    assert (lax["attack_success_rate"]["rate"], lax["over_refusal_rate"]["count"]) == (0.1, 0)
    assert all_missed["attack_success_rate"]["rate"] == 1
    assert all_missed["over_refusal_rate"]["count"] == 0


def test_intervals_hold_the_rates_and_know_that_the_threshold_is_uncertain() -> None:
    random = np.random.default_rng(1)
    scores = np.concatenate([random.normal(2, 1, 100), random.normal(0, 1, 400)])
    result = measure_scores([Row("x")] * 100, [Row("x")] * 400, scores, (0.05,))
    rate, auc = result["at"][0]["over_refusal_rate"], result["auc"]
    assert rate["low"] < rate["rate"] < rate["high"]
    assert auc["low"] < auc["auc"] < auc["high"]
    # For a known threshold it would be 0.1 wide.
    assert rate["high"] - rate["low"] > 0.15


def test_a_reading_tells_requests_apart_that_differ_at_their_start(
    tiny_llama: Path, requests: Requests, settings: LinearSettings
) -> None:
    recorder, before = Recorder(), content(tiny_llama)
    result = read_linearly(Job(tiny_llama, progress=recorder), settings, requests.evaluate())
    assert result["kind"] == "linear reading"
    assert 1 <= result["layer"] <= result["layers"] == 2
    assert len(result["training"]["losses"]) == 2
    assert result["auc"]["auc"] == 1
    assert [row["over_refusal_rate"]["count"] for row in result["at"]] == [0, 0]
    assert [(task, total) for task, total, _ in recorder.tasks] == [
        ("Read requests", 24),
        ("Fit layers", 2),
    ]
    assert all(done == total for _, total, done in recorder.tasks)
    assert any("are learned from as well" in note for note in recorder.notes)
    assert content(tiny_llama) == before
    again = read_linearly(Job(tiny_llama), settings, requests.evaluate(batch_size=1))
    for kind in ("harmful", "benign"):
        scores, others = (
            [row["score"] for row in each["requests"][kind]] for each in (result, again)
        )
        assert scores == pytest.approx(others, rel=1e-3)


def test_labels_that_say_nothing_give_no_auc(
    tiny_llama: Path, requests: Requests, settings: LinearSettings
) -> None:
    same = LinearSettings(harmful=settings.benign, benign=settings.benign)
    result = read_linearly(Job(tiny_llama), same, requests.evaluate(harmful=requests.benign))
    assert result["auc"]["auc"] == 0.5


def test_too_few_requests_to_learn_from_are_refused(
    tiny_llama: Path, requests: Requests, settings: LinearSettings, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("One\nTwo\nThree\nFour\n")
    few = LinearSettings(harmful=settings.harmful, benign=str(tmp_path / "few.txt"))
    recorder = Recorder()
    with pytest.raises(DataError, match="--benign: expected at least 5 requests to learn from"):
        read_linearly(Job(tiny_llama, progress=recorder), few, requests.evaluate())
    assert recorder.tasks == []
