"""The Fisher information of benign answers: squares row by row, and scores by the formula."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.data import Example
from safeweights_peft.errors import SelectionError
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.selection.fisher import (
    DAMPING,
    SquareSum,
    average,
    damp,
    score_answer,
    sum_squares,
)
from safeweights_peft.selection.scores import SCORES, score_entries
from safeweights_peft.settings import Method
from tests.selection.test_scores import load, refusals


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    return load(tiny_llama)


@pytest.fixture
def examples(tiny_llama: Path) -> list[Example]:
    return refusals(tiny_llama)


def squares_of(model: PreTrainedModel, examples: list[Example]) -> list[torch.Tensor]:
    """The mean over rows of the squared gradient of a row's log-likelihood, per token."""
    parameters = [*eligible_parameters(model).values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    total = [torch.zeros(parameter.shape) for parameter in parameters]
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        logits = model(ids).logits[0, len(example.prompt_ids) - 1 : -1].float()
        loss = F.cross_entropy(logits, torch.tensor(example.answer_ids), reduction="sum")
        gradients = torch.autograd.grad(loss, parameters)
        for part, gradient in zip(total, gradients, strict=True):
            part += gradient.square() / len(example.answer_ids) / len(examples)
    return total


def test_squares_are_those_of_the_formula_written_out(model, examples) -> None:
    parameters = eligible_parameters(model)
    found = sum_squares(model, parameters, {}, examples)
    for (name, total), expected in zip(
        found.squares.items(), squares_of(model, examples), strict=True
    ):
        torch.testing.assert_close(total / found.rows, expected, rtol=1e-3, atol=1e-9, msg=name)


def test_squares_of_a_bfloat16_model_are_summed_in_float32_bit_for_bit(
    tiny_llama_bf16: Path,
) -> None:
    model, examples = load(tiny_llama_bf16, torch.bfloat16), refusals(tiny_llama_bf16)
    parameters = eligible_parameters(model)
    found = sum_squares(model, parameters, parameters, examples)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    expected = {name: torch.zeros(parameter.shape) for name, parameter in parameters.items()}
    totals = dict.fromkeys(parameters, torch.zeros(()))
    for example in examples:
        loss = score_answer(model, example)
        gradients = torch.autograd.grad(loss, [*parameters.values()])
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += gradient.float() ** 2
            totals[name] = totals[name] + (gradient.float() ** 2).sum()
    for name in parameters:
        assert torch.equal(found.squares[name], expected[name]), name
        assert torch.equal(found.totals[name], totals[name]), name


def test_watched_parameters_are_summed_and_not_kept(model, examples) -> None:
    parameters = eligible_parameters(model)
    names = [*parameters]
    whole = sum_squares(model, parameters, parameters, examples)
    part = sum_squares(model, {names[0]: parameters[names[0]]}, parameters, examples)
    assert [*part.squares] == names[:1]
    assert torch.equal(part.squares[names[0]], whole.squares[names[0]])
    assert all(torch.equal(part.totals[name], whole.totals[name]) for name in names)
    entries = sum(parameter.numel() for parameter in parameters.values())
    mean = sum(total.double().sum() for total in whole.squares.values()) / entries / len(examples)
    assert average(whole.totals, entries, len(examples)) == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize("done", [1, 3])
def test_an_interrupted_sum_resumes_bit_for_bit(model, examples, done: int) -> None:
    parameters, kept = eligible_parameters(model), {}
    expected = sum_squares(model, parameters, parameters, examples)

    def interrupt(now: SquareSum) -> None:
        if now.rows == done:
            copies = [{n: t.clone() for n, t in ts.items()} for ts in (now.squares, now.totals)]
            kept["now"] = SquareSum(*copies, done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sum_squares(model, parameters, parameters, examples, interrupt)
    found = sum_squares(model, parameters, parameters, examples, resume_from=kept["now"])
    for name in parameters:
        assert torch.equal(found.squares[name], expected.squares[name]), name
        assert torch.equal(found.totals[name], expected.totals[name]), name


def test_a_score_is_gain_squared_over_damped_harm(model, examples) -> None:
    parameters, random = eligible_parameters(model), torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(p.shape, generator=random) for n, p in parameters.items()}
    found = sum_squares(model, parameters, parameters, examples)
    entries, rows = sum(p.numel() for p in parameters.values()), found.rows
    mean = average(found.totals, entries, rows)
    fisher = {name: total.double().numpy() / rows for name, total in found.squares.items()}
    harms = damp(found.squares, rows, mean)
    scores = score_entries(SCORES[Method.FISHER], parameters, gradients, harms=harms)
    for name, part in scores:
        expected = gradients[name].double().numpy() ** 2 / (fisher[name] + DAMPING * mean)
        np.testing.assert_allclose(part, expected, rtol=1e-5)


def test_squares_of_small_gradients_do_not_vanish(model) -> None:
    parameters = {"w": eligible_parameters(model)["model.layers.0.mlp.up_proj.weight"]}
    gradient = torch.full(parameters["w"].shape, 1e-25)
    harms = {"w": torch.full(parameters["w"].shape, 1e-30)}
    ((_, scores),) = score_entries(SCORES[Method.FISHER], parameters, {"w": gradient}, harms=harms)
    assert scores == pytest.approx(1e-20, rel=1e-5)


@pytest.mark.parametrize("total", [0.0, math.inf, math.nan])
def test_answers_that_depend_on_no_weight_are_refused(total: float) -> None:
    with pytest.raises(SelectionError, match="benign: expected answers that depend on the weights"):
        average({"w": torch.tensor(total)}, 10, 2)
