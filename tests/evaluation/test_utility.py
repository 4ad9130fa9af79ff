"""KL to the base and perplexity, held to sums over tokens written out."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example
from safeweights_peft.errors import EvaluationError
from safeweights_peft.evaluation.utility import Utility, measure_utility
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from tests.tiny_models import save_tiny_llama

PAD = 256
ANSWERS = [("Sew.", "Thread a needle."), ("Bake a cake, please.", "Mix."), ("Sew.", "No: knit!")]


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve_base(str(path)), dtype)


@pytest.fixture
def answers(tiny_llama: Path) -> list[Example]:
    tokenizer = load_tokenizer(resolve_base(str(tiny_llama)))
    return [Chat(tokenizer).encode_example(*pair, 14) for pair in ANSWERS]


@pytest.fixture
def other(tmp_path: Path) -> PreTrainedModel:
    return load(save_tiny_llama(tmp_path / "other", seed=5))


def utility_twin(
    model: PreTrainedModel, base: PreTrainedModel, answers: list[Example]
) -> tuple[float, float, int]:
    """Goes through the answers token by token, without padding, in float64."""
    kl = loss = 0.0
    tokens = 0
    for example in answers:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        p = base(ids).logits[0].double().softmax(-1)
        q = model(ids).logits[0].double().softmax(-1)
        for t, token in enumerate(example.answer_ids, len(example.prompt_ids) - 1):
            kl += sum(float(p[t, v] * (p[t, v] / q[t, v]).log()) for v in range(p.shape[1]))
            loss -= math.log(q[t, token])
            tokens += 1
    return kl / tokens, math.exp(loss / tokens), tokens


def measure(
    model: PreTrainedModel, base: PreTrainedModel, answers: list[Example], **options: int
) -> Utility:
    """Compares two models in memory."""
    return measure_utility(base, answers, PAD, lambda: nullcontext(model), **options)


def as_tuple(utility: Utility) -> tuple[float, float, int]:
    return utility.kl, utility.perplexity, utility.tokens


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_kl_and_perplexity_are_the_means_over_answer_tokens(
    tiny_llama: Path, other, answers, batch_size: int
) -> None:
    base = load(tiny_llama)
    found = measure(other, base, answers, batch_size=batch_size)
    assert as_tuple(found) == pytest.approx(utility_twin(other, base, answers), rel=1e-4)
    assert found.kl > 0.01


def test_kl_is_that_of_the_base_to_the_model_not_the_other_way_round(
    tiny_llama: Path, other, answers
) -> None:
    base = load(tiny_llama)
    there, back = (measure(*pair, answers).kl for pair in [(other, base), (base, other)])
    assert back == pytest.approx(utility_twin(base, other, answers)[0], rel=1e-4)
    assert there != pytest.approx(back, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_itself_has_no_kl_and_its_own_perplexity(
    tiny_llama: Path, answers, dtype: torch.dtype
) -> None:
    base, copy = load(tiny_llama, dtype), load(tiny_llama, dtype)
    itself, twin = measure_utility(base, answers, PAD), measure(copy, base, answers)
    assert itself.kl == 0
    assert itself == twin
    if dtype is torch.float32:
        assert as_tuple(itself) == pytest.approx(utility_twin(base, base, answers), rel=1e-4)


def test_every_answer_token_counts_once_and_no_prompt_token(tiny_llama: Path, answers) -> None:
    base = load(tiny_llama)
    expected = sum(len(example.answer_ids) for example in answers)
    assert measure_utility(base, answers, PAD).tokens == expected


def test_an_answer_of_no_tokens_weighs_nothing(tiny_llama: Path, other, answers) -> None:
    base = load(tiny_llama)
    silent = [*answers, Example(answers[0].prompt_ids, ())]
    found = measure(other, base, silent)
    assert as_tuple(found) == pytest.approx(as_tuple(measure(other, base, answers)))


def test_each_batch_is_reported_with_its_size(tiny_llama: Path, answers) -> None:
    base, sizes = load(tiny_llama), []
    measure_utility(base, answers, PAD, batch_size=2, on_batch=sizes.append)
    assert sizes == [2, 1]


@pytest.mark.parametrize("empty", [[], [Example((1, 2), ())]])
def test_no_answer_tokens_at_all_are_refused(tiny_llama: Path, empty: list[Example]) -> None:
    base = load(tiny_llama)
    with pytest.raises(EvaluationError, match="answers: expected at least one token, found none"):
        measure_utility(base, empty, PAD)


def test_a_perplexity_beyond_all_floats_is_refused(
    tiny_llama: Path, other: PreTrainedModel, answers: list[Example]
) -> None:
    other.lm_head.weight.mul_(1e5)
    with pytest.raises(EvaluationError, match=r"a loss of at most 700 nats/token, found .* broken"):
        measure(other, load(tiny_llama), answers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_is_refused(
    tiny_llama: Path, other: PreTrainedModel, answers: list[Example], value: float
) -> None:
    other.lm_head.weight[0, 0] = value
    with pytest.raises(EvaluationError, match="answers: expected finite likelihoods, found NaN"):
        measure(other, load(tiny_llama), answers)
