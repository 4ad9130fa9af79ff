"""Controls: as many entries as are taken, none of them, held to a sort of all that is left."""

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from safeweights_peft.errors import SelectionError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.selection.controls import check_left, select_lowest
from safeweights_peft.selection.esi import random_scores

SHAPES = {"a": (4, 5), "b": (30,), "c": (7, 2)}


def make_scores(seed: int) -> dict[str, np.ndarray]:
    """Scores with many ties, zeros among them."""
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 5, shape).astype(np.float32) for name, shape in SHAPES.items()}


def take(seed: int, share: float, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict:
    random = np.random.default_rng(seed)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    return {
        name: np.sort(random.choice(size, int(size * share), replace=False))
        for name, size in sizes.items()
    }


def as_set(indices: dict) -> set[tuple[str, int]]:
    return {(name, int(i)) for name, each in indices.items() for i in each}


def selected(scores: dict[str, np.ndarray], taken: dict) -> set[tuple[str, int]]:
    found = select_lowest(((name, each.copy()) for name, each in scores.items()), taken)
    return as_set({name: each.indices for name, each in found.items()})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_lowest_of_what_is_left_are_selected(seed: int, share: float) -> None:
    scores, taken = make_scores(seed), take(seed, share)
    # Ties go to the smaller name, then to the smaller index.
    left = [
        (value, name, i)
        for name, each in scores.items()
        for i, value in enumerate(each.flatten())
        if (name, i) not in as_set(taken)
    ]
    lowest = sorted(left)[: len(as_set(taken))]
    assert selected(scores, taken) == {(name, i) for _, name, i in lowest}


def test_no_taken_entry_is_selected_where_all_others_are_needed() -> None:
    taken = take(0, 0.5)
    found = selected({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, taken)
    everything = {(name, i) for name, shape in SHAPES.items() for i in range(int(np.prod(shape)))}
    assert found == everything - as_set(taken)


def test_entries_of_other_tensors_count_but_take_nothing_away() -> None:
    scores, taken = make_scores(0), {"elsewhere": np.arange(9)}
    lowest = sorted(each for values in scores.values() for each in values.flatten())[:9]
    found = selected(scores, taken)
    assert sorted(scores[name].flatten()[i] for name, i in found) == lowest


def draw(path: Path, *seed: int) -> set[tuple[str, int]]:
    parameters = eligible_parameters(load_model(resolve_base(str(path))))
    taken = take(0, 0.1, {name: tuple(each.shape) for name, each in parameters.items()})
    found = select_lowest(random_scores(parameters, *seed), taken)
    drawn = as_set({name: each.indices for name, each in found.items()})
    assert not drawn & as_set(taken)
    assert len(drawn) == len(as_set(taken))
    return drawn


def test_random_entries_are_fixed_by_seed_and_draw(tiny_llama: Path) -> None:
    first, same, other_draw, other_seed = (
        draw(tiny_llama, *seed) for seed in ((3, 1), (3, 1), (3, 2), (4, 1))
    )
    assert first == same
    assert other_draw != first != other_seed


def test_random_entries_are_spread_evenly(tiny_llama: Path) -> None:
    parameters = eligible_parameters(load_model(resolve_base(str(tiny_llama))))
    sizes = {name: each.numel() for name, each in parameters.items()}
    drawn = [name for seed in range(5) for name, _ in draw(tiny_llama, 0, seed)]
    for name, size in sizes.items():
        share = drawn.count(name) / len(drawn)
        assert share == pytest.approx(size / sum(sizes.values()), rel=0.2)


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(nn.init.zeros_(nn.Linear(1, 10).weight)) for name in ("first", "second")
    }


def test_a_map_of_half_the_entries_leaves_enough(parameters: dict[str, nn.Parameter]) -> None:
    check_left(parameters, {"first": np.arange(10)})


def test_a_map_that_leaves_too_few_is_refused(parameters: dict[str, nn.Parameter]) -> None:
    message = r"^map: expected at most as many .* found 11 and 9 eligible ones left; use a map of"
    with pytest.raises(SelectionError, match=message):
        check_left(parameters, {"first": np.arange(10), "second": np.arange(1)})
