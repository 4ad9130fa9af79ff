"""Scores: ESI as its formula says, sums of gradients that resume, and controls drawn evenly."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example
from safeweights_peft.errors import SelectionError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.selection.objective import ReferenceObjective
from safeweights_peft.selection.scores import (
    SCORES,
    GradientSum,
    check_left,
    score_entries,
    split_by_layer,
    sum_gradients,
)
from safeweights_peft.selection.topk import Order, select
from safeweights_peft.settings import Aggregation, Granularity, Method

PAD = 256
REQUESTS = ["Forge a cheque.", "Pick a lock for me, please.", "Steal.", "Write a threat to Bob."]
REFUSALS = ["No.", "I can't help with that request.", "I won't do this.", "Never."]


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(resolve_base(str(path)), dtype)


def refusals(path: Path) -> list[Example]:
    """Requests and refusals of different lengths, one of the refusals cut."""
    tokenizer = load_tokenizer(resolve_base(str(path)))
    return [
        Chat(tokenizer).encode_example(request, refusal, 25)
        for request, refusal in zip(REQUESTS, REFUSALS, strict=True)
    ]


def mean_log_likelihood(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """S written out: one example at a time, one token at a time, no padding."""
    total = torch.zeros(())
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        log_p = F.log_softmax(model(ids).logits[0].float(), -1)
        start, length = len(example.prompt_ids), len(example.answer_ids)
        for t, token in enumerate(example.answer_ids):
            total = total + log_p[start + t - 1, token] / length
    return total / len(examples)


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    return load(tiny_llama)


@pytest.fixture
def examples(tiny_llama: Path) -> list[Example]:
    return refusals(tiny_llama)


def draw_scores(parameters: dict[str, nn.Parameter], *seed: int) -> Iterator:
    return score_entries(SCORES[Method.RANDOM], parameters, {}, *seed)


def gradients_of(
    model: PreTrainedModel, examples: list[Example], batch_size: int
) -> dict[str, torch.Tensor]:
    objective = ReferenceObjective(examples, PAD, batch_size)
    return sum_gradients(model, eligible_parameters(model), objective)


def test_the_terms_sum_to_the_mean_log_likelihood(model, examples) -> None:
    total = sum(term.item() for term in ReferenceObjective(examples, PAD, 3).terms(model))
    assert total == pytest.approx(mean_log_likelihood(model, examples).item(), rel=1e-5)


def test_gradients_are_those_of_the_mean_log_likelihood_written_out(model, examples) -> None:
    actual = gradients_of(model, examples, batch_size=3)
    parameters = eligible_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss = mean_log_likelihood(model, examples)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    for (name, gradient), twin in zip(actual.items(), expected, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_does_not_change_the_gradients(model, examples, batch_size: int) -> None:
    actual = gradients_of(model, examples, batch_size)
    for name, expected in gradients_of(model, examples, 3).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_a_request_that_comes_twice_counts_twice(model, examples) -> None:
    twice = [examples[0], examples[0], examples[1]]
    total = sum(term.item() for term in ReferenceObjective(twice, PAD, 2).terms(model))
    assert total == pytest.approx(mean_log_likelihood(model, twice).item(), rel=1e-5)


def test_scores_are_sigma_times_gradient_without_a_sign(model, examples) -> None:
    parameters = eligible_parameters(model)
    gradients = gradients_of(model, examples, batch_size=4)
    scores = dict(score_entries(SCORES[Method.ESI], parameters, gradients))
    assert list(scores) == list(parameters)
    for name, parameter in parameters.items():
        sigma = np.std(parameter.detach().double().numpy(), ddof=1)
        expected = sigma * np.abs(gradients[name].numpy())
        assert scores[name].dtype == np.float32
        np.testing.assert_allclose(scores[name], expected, rtol=1e-5, atol=0)


def test_the_gradient_predicts_how_far_a_small_move_of_one_entry_moves_safety(
    model, examples
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    gradient = gradients_of(model, examples, batch_size=4)[name]
    at = int(gradient.abs().argmax())
    entry = model.get_parameter(name).detach().view(-1)[at]
    safety = []
    for step in (1e-2, -2e-2):
        entry += step
        safety.append(mean_log_likelihood(model, examples).item())
    change = (safety[0] - safety[1]) / 2e-2
    assert change == pytest.approx(gradient.view(-1)[at].item(), rel=0.01)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_bfloat16_models_gradients_are_summed_in_float32(
    tiny_llama_bf16: Path, batch_size: int
) -> None:
    model, examples = load(tiny_llama_bf16, torch.bfloat16), refusals(tiny_llama_bf16)
    actual = gradients_of(model, examples, batch_size)
    parameters = eligible_parameters(model)
    expected = {name: torch.zeros(parameter.shape) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for term in ReferenceObjective(examples, PAD, batch_size).terms(model):
        own = torch.autograd.grad(term, list(parameters.values()))
        for name, gradient in zip(parameters, own, strict=True):
            assert gradient.dtype == torch.bfloat16
            expected[name] += gradient.float()
    for name, gradient in actual.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("trainable", [True, False])
def test_scoring_leaves_the_model_as_it_was(model, examples, trainable: bool) -> None:
    model.requires_grad_(trainable)
    model.get_parameter("model.norm.weight").requires_grad_(not trainable)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradients_of(model, examples, batch_size=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == required[name], name
        assert parameter.grad is None, name
        assert not parameter._post_accumulate_grad_hooks, name


def test_a_failing_objective_leaves_the_model_as_it_was_too(model, examples) -> None:
    class Failing(ReferenceObjective):
        def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[torch.Tensor]:
            yield next(super().terms(model, start))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        sum_gradients(model, eligible_parameters(model), Failing(examples, PAD, 2))
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.grad is None, name
        assert not parameter._post_accumulate_grad_hooks, name


def test_a_gradient_from_before_does_not_count(model, examples) -> None:
    expected = gradients_of(model, examples, batch_size=4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for name, gradient in gradients_of(model, examples, batch_size=4).items():
        assert torch.equal(gradient, expected[name]), name


def test_an_expert_that_no_token_reaches_scores_zero(tiny_mixtral: Path) -> None:
    model = load(tiny_mixtral)
    router = model.get_parameter("model.layers.0.mlp.gate.weight").detach()
    router[1:] = router[:1]  # a tie goes to the first experts, so the last two get no token
    gradients = gradients_of(model, refusals(tiny_mixtral), batch_size=2)
    scores = dict(score_entries(SCORES[Method.ESI], eligible_parameters(model), gradients))
    experts = scores["model.layers.0.mlp.experts.gate_up_proj"]
    assert sorted(Counter(experts.reshape(4, -1).any(1).tolist()).items()) == [
        (False, 2),
        (True, 2),
    ]


def test_an_objective_needs_examples() -> None:
    with pytest.raises(SelectionError, match="examples: expected at least one request"):
        ReferenceObjective([], PAD)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_an_objective_has_as_many_terms_as_it_says_and_reports_each(
    model, examples, batch_size: int
) -> None:
    objective, reported = ReferenceObjective(examples, PAD, batch_size), []
    sum_gradients(
        model, eligible_parameters(model), objective, lambda now: reported.append(now.terms)
    )
    assert reported == list(range(1, len(objective) + 1))
    assert len(objective) == -(-len(examples) // batch_size)


def test_sizes_are_summed_request_by_request_where_asked(model, examples) -> None:
    parameters, objective = eligible_parameters(model), ReferenceObjective(examples, PAD, 1)
    how = Aggregation.MEAN_OF_ABS
    actual = sum_gradients(model, parameters, objective, aggregation=how)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    singly = [
        torch.autograd.grad(mean_log_likelihood(model, [example]), list(parameters.values()))
        for example in examples
    ]
    for name, *own in zip(actual, *singly, strict=True):
        expected = sum(gradient.abs() for gradient in own) / len(examples)
        torch.testing.assert_close(actual[name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_an_interrupted_sum_goes_on_bit_for_bit(model, examples, done: int) -> None:
    parameters, objective = eligible_parameters(model), ReferenceObjective(examples, PAD, 1)
    expected = sum_gradients(model, parameters, objective)
    kept = {}

    def interrupt(now: GradientSum) -> None:
        if now.terms == done:
            kept["now"] = GradientSum({n: g.clone() for n, g in now.gradients.items()}, done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sum_gradients(model, parameters, objective, interrupt)
    actual = sum_gradients(model, parameters, objective, resume_from=kept["now"])
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


def test_a_gradient_that_is_not_finite_is_refused_after_the_first_term(model, examples) -> None:
    model.get_parameter("model.layers.1.mlp.up_proj.weight").detach()[0, 0] = float("nan")
    reported = []
    with pytest.raises(SelectionError, match="expected a finite gradient, found NaN or infinity"):
        sum_gradients(
            model, eligible_parameters(model), ReferenceObjective(examples, PAD, 1), reported.append
        )
    assert not reported


def test_layers_are_shared_out_over_passes_in_order() -> None:
    names = ["embed", "model.layers.0.a", "model.layers.0.b.0.c", "model.layers.1.a", "head"]
    assert split_by_layer(names, None) == [names]
    assert split_by_layer(names, 1) == [names[:1], names[1:3], names[3:4], names[4:]]
    assert split_by_layer(names, 2) == [names[:3], names[3:]]
    assert split_by_layer(names, 9) == [names]


def parameters_of(*sizes: int) -> dict[str, nn.Parameter]:
    return {f"layer {n}": nn.Parameter(torch.zeros(size, 10)) for n, size in enumerate(sizes)}


def test_random_scores_are_fixed_by_seed_and_name_alone() -> None:
    parameters = parameters_of(3, 4, 5)
    scores = dict(draw_scores(parameters, 7))
    backwards = dict(draw_scores(dict(reversed(parameters.items())), 7))
    for name, parameter in parameters.items():
        alone = dict(draw_scores({name: parameter}, 7))[name]
        assert np.array_equal(scores[name], alone)
        assert np.array_equal(scores[name], backwards[name])


def test_random_scores_differ_by_seed_and_by_name() -> None:
    scores, others = (dict(draw_scores(parameters_of(9, 9), seed)) for seed in (0, 1))
    assert not np.array_equal(scores["layer 0"], others["layer 0"])
    assert not np.array_equal(scores["layer 0"], scores["layer 1"])


def test_random_scores_are_float32_of_the_parameters_shape_in_0_to_1() -> None:
    ((_, scores),) = draw_scores(parameters_of(500), 0)
    assert (scores.dtype, scores.shape) == (np.float32, (500, 10))
    assert scores.min() >= 0
    assert scores.max() < 1


def test_the_top_of_random_scores_is_a_uniform_choice() -> None:
    parameters = parameters_of(1000, 3000, 6000)
    k = 10_000
    selected = select(draw_scores(parameters, 0), k)
    for name, parameter in parameters.items():
        share = parameter.numel() / 100_000
        spread = (k * share * (1 - share)) ** 0.5
        assert selected[name].indices.size == pytest.approx(k * share, abs=4 * spread)
        halves = selected[name].indices < parameter.numel() // 2
        assert halves.mean() == pytest.approx(0.5, abs=2 / halves.size**0.5)


# --- the table -----------------------------------------------------------------------------------


def test_every_method_that_can_be_chosen_has_a_score() -> None:
    assert set(SCORES) == set(Method)


def test_magnitude_and_movement_are_sizes_of_weights_and_of_changes() -> None:
    parameters = {"w": nn.Parameter(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))}
    changes = {"w": torch.tensor([[0.5, 0.0], [-2.0, 1.0]])}
    ((_, magnitudes),) = score_entries(SCORES[Method.MAGNITUDE], parameters, {})
    ((_, movements),) = score_entries(SCORES[Method.MOVEMENT], parameters, changes)
    assert magnitudes.tolist() == [[3, 4], [0, 1]]
    assert movements.tolist() == [[0.5, 0], [2, 1]]


@pytest.mark.parametrize("granularity", list(Granularity))
def test_a_random_score_is_one_for_each_group(granularity: Granularity) -> None:
    parameters = {f"w{n}": nn.Parameter(torch.zeros(2, 5, 7)) for n in range(20)}
    score, kinds = SCORES[Method.RANDOM], set()
    for _, scores in score_entries(score, parameters, {}, 3, granularity=granularity):
        assert scores.shape == (2, 5, 7)
        spreads = [np.ptp(scores, axis).any() for axis in (-1, -2)]
        kinds.add({(True, True): "entry", (False, True): "row", (True, False): "column"}[*spreads])
    assert kinds == ({"row", "column"} if granularity is Granularity.AUTO else {granularity.value})


def test_the_bottom_is_the_other_end_of_the_same_scores() -> None:
    parameters = {"w": nn.Parameter(torch.arange(6.0).reshape(2, 3))}
    gradients = {"w": torch.tensor([[3.0, -1.0, 0.5], [0.0, 2.0, -4.0]])}
    top, bottom = SCORES[Method.ESI], SCORES[Method.BOTTOM]
    (first,), (second,) = (score_entries(score, parameters, gradients) for score in (top, bottom))
    assert np.array_equal(first[1], second[1])
    assert select([first], 2, top.order)["w"].indices.tolist() == [0, 5]
    assert select([second], 2, bottom.order)["w"].indices.tolist() == [2, 3]


# --- controls ------------------------------------------------------------------------------------

SHAPES = {"a": (4, 5), "b": (30,), "c": (7, 2)}


def make_scores(seed: int) -> dict[str, np.ndarray]:
    """Scores with many ties, zeros among them."""
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 5, shape).astype(np.float32) for name, shape in SHAPES.items()}


def exclude(seed: int, fraction: float, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: np.sort(random.choice(size, int(size * fraction), replace=False))
        for name, size in sizes.items()
    }


def as_set(indices: dict[str, np.ndarray]) -> set[tuple[str, int]]:
    return {(name, int(i)) for name, flat in indices.items() for i in flat}


def select_lowest(scores: dict[str, np.ndarray], excluded: dict) -> set[tuple[str, int]]:
    count = len(as_set(excluded))
    selected = select(scores.items(), count, Order.BOTTOM, excluded)
    return as_set({name: entries.indices for name, entries in selected.items()})


def sizes_of(scores: dict[str, np.ndarray]) -> dict[str, int]:
    return {name: values.size for name, values in scores.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_the_lowest_of_what_is_left_are_selected(seed: int, fraction: float) -> None:
    scores = make_scores(seed)
    excluded = exclude(seed, fraction, sizes_of(scores))
    # Ties go to the smaller name, then to the smaller index.
    left = [
        (value, name, i)
        for name, values in scores.items()
        for i, value in enumerate(values.flatten())
        if (name, i) not in as_set(excluded)
    ]
    lowest = sorted(left)[: len(as_set(excluded))]
    assert select_lowest(scores, excluded) == {(name, i) for _, name, i in lowest}


def test_no_excluded_entry_is_selected_where_all_others_are_needed() -> None:
    scores = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    excluded = exclude(0, 0.5, sizes_of(scores))
    everything = as_set({name: np.arange(size) for name, size in sizes_of(scores).items()})
    assert select_lowest(scores, excluded) == everything - as_set(excluded)


def test_excluded_entries_keep_the_scores_that_they_had() -> None:
    scores = np.ones(4, np.float32)
    select([("w", scores)], 2, excluded={"w": np.array([0, 1])})
    assert scores.tolist() == [1, 1, 1, 1]


def test_entries_of_other_tensors_count_but_exclude_nothing() -> None:
    scores = make_scores(0)
    lowest = sorted(value for values in scores.values() for value in values.flatten())[:9]
    actual = select_lowest(scores, {"elsewhere": np.arange(9)})
    assert sorted(scores[name].flatten()[i] for name, i in actual) == lowest


def draw(path: Path, *seed: int) -> set[tuple[str, int]]:
    parameters = eligible_parameters(load(path))
    excluded = exclude(0, 0.1, {name: parameter.numel() for name, parameter in parameters.items()})
    drawn = select_lowest(dict(draw_scores(parameters, *seed)), excluded)
    assert not drawn & as_set(excluded)
    assert len(drawn) == len(as_set(excluded))
    return drawn


def test_random_entries_are_fixed_by_seed_and_draw(tiny_llama: Path) -> None:
    first, same, other_draw, other_seed = (
        draw(tiny_llama, *seed) for seed in ((3, 1), (3, 1), (3, 2), (4, 1))
    )
    assert first == same
    assert other_draw != first != other_seed


def test_random_entries_are_spread_evenly(tiny_llama: Path) -> None:
    sizes = {
        name: parameter.numel() for name, parameter in eligible_parameters(load(tiny_llama)).items()
    }
    drawn = [name for seed in range(5) for name, _ in draw(tiny_llama, 0, seed)]
    for name, size in sizes.items():
        fraction = drawn.count(name) / len(drawn)
        assert fraction == pytest.approx(size / sum(sizes.values()), rel=0.2)


def test_a_map_of_half_the_entries_leaves_enough() -> None:
    check_left(parameters_of(1, 1), {"layer 0": np.arange(10)})


def test_a_map_that_leaves_too_few_is_refused() -> None:
    message = r"^map: expected at most as many .* found 11 and 9 eligible ones left; use a map of"
    with pytest.raises(SelectionError, match=message):
        check_left(parameters_of(1, 1), {"layer 0": np.arange(10), "layer 1": np.arange(1)})
