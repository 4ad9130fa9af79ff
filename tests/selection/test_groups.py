"""Whole rows and columns: what a slow sort of all groups gives, bit for bit, in any order."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection.groups import (
    Groups,
    TopGroups,
    choose_groups,
    find_longest,
    make_ranking,
)
from safeweights_peft.selection.topk import Order, TopK
from safeweights_peft.settings import Granularity

Scores = dict[str, np.ndarray]
AUTO, COLUMN, ENTRY, ROW = (
    Granularity.AUTO,
    Granularity.COLUMN,
    Granularity.ENTRY,
    Granularity.ROW,
)

# Few different scores, so that groups tie; exact in any order of adding.
MATRICES = st.dictionaries(
    st.sampled_from("abcd"),
    st.one_of(
        arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5).flatmap(
            lambda shape: arrays.arrays(
                np.float32, shape, elements=st.sampled_from([0.0, 1.0, 2.5])
            )
        )
    ),
    min_size=1,
)


def list_groups(scores: np.ndarray, granularity: Granularity) -> list[list[int]]:
    """The flat indices of each group, by loops over matrices, groups and entries."""
    rows, columns = scores.shape[-2:]
    groups = []
    for matrix in range(scores.size // (rows * columns)):
        start = matrix * rows * columns
        if granularity is ROW:
            groups += [[start + r * columns + c for c in range(columns)] for r in range(rows)]
        else:
            groups += [[start + r * columns + c for r in range(rows)] for c in range(columns)]
    return groups


def mean(scores: np.ndarray, group: list[int]) -> np.float32:
    return np.float32(math.fsum(float(scores.flat[i]) for i in group) / len(group))


def hold(scores: np.ndarray, granularity: Granularity, size: Fraction, sign: int) -> Fraction:
    """The score that the first groups hold in so many entries, the last of them in part."""
    groups = list_groups(scores, granularity)
    held, left = Fraction(0), size
    for group in sorted(groups, key=lambda group: -sign * mean(scores, group)):
        taken = min(left, Fraction(len(group)))
        held, left = held + taken * Fraction(float(mean(scores, group))), left - taken
    return held


def select_slowly(all_scores: Scores, k: int, granularity: Granularity, order: Order) -> Scores:
    """Every entry of the groups that come first, with its group's score."""
    sign, ranked = (1 if order is Order.TOP else -1), []
    eligible = sum(scores.size for scores in all_scores.values())
    for name, scores in all_scores.items():
        kinds = [granularity]
        if granularity is AUTO:
            size = Fraction(k * scores.size, eligible)
            rows, columns = (hold(scores, kind, size, sign) for kind in (ROW, COLUMN))
            kinds = [COLUMN if sign * columns > sign * rows else ROW]
        for number, group in enumerate(list_groups(scores, kinds[0])):
            ranked.append((-sign * mean(scores, group), name, number, group))
    chosen: dict[str, dict[int, np.float32]] = {}
    for score, name, _, group in sorted(ranked):
        if k < len(group):
            break
        k -= len(group)
        chosen.setdefault(name, {}).update(dict.fromkeys(group, np.float32(-sign * score)))
    return {name: np.array(sorted(entries.items()), np.float64) for name, entries in chosen.items()}


def select(all_scores: Scores, k: int, granularity: Granularity, order: Order) -> Scores:
    eligible = sum(scores.size for scores in all_scores.values())
    best = TopGroups(k, eligible, granularity, order)
    for name, scores in all_scores.items():
        best.add(name, scores)
    return as_pairs(best)


def as_pairs(best: TopGroups) -> Scores:
    return {
        name: np.stack([kept.indices, kept.scores.astype(np.float64)], 1)
        for name, kept in best.result().items()
    }


def same(left: Scores, right: Scores) -> bool:
    return [*left] == sorted(right) and all(np.array_equal(left[n], right[n]) for n in left)


@settings(deadline=None, max_examples=200)
@given(MATRICES, st.data(), st.sampled_from([ROW, COLUMN, AUTO]), st.sampled_from([*Order]))
def test_groups_are_those_of_a_slow_sort(
    all_scores: Scores, data: st.DataObject, granularity: Granularity, order: Order
) -> None:
    longest = find_longest((scores.shape for scores in all_scores.values()), granularity)
    eligible = sum(scores.size for scores in all_scores.values())
    k = data.draw(st.integers(longest, eligible))
    expected = select_slowly(all_scores, k, granularity, order)
    assert same(select(all_scores, k, granularity, order), expected)
    shuffled = {name: all_scores[name] for name in data.draw(st.permutations([*all_scores]))}
    assert same(select(shuffled, k, granularity, order), expected)


@pytest.mark.parametrize("granularity", [ROW, COLUMN])
def test_means_of_real_scores_are_rounded_once(granularity: Granularity) -> None:
    random = np.random.default_rng(0)
    scores = np.exp(random.normal(0, 4, (3, 40, 50))).astype(np.float32)
    found = choose_groups(scores, granularity, Fraction(1, 10), Order.TOP).scores
    expected = [mean(scores, group) for group in list_groups(scores, granularity)]
    assert found.tolist() == expected


@pytest.mark.parametrize("granularity", [ROW, COLUMN, AUTO])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_selection_resumes(granularity: Granularity, done: int) -> None:
    random = np.random.default_rng(1)
    all_scores = {name: random.random((4, 6), dtype=np.float32) for name in "abc"}
    first, second = (TopGroups(20, 72, granularity, Order.TOP) for _ in range(2))
    for name in "abc"[:done]:
        first.add(name, all_scores[name])
    second.restore(first.state())
    for name in "abc"[done:]:
        second.add(name, all_scores[name])
    assert same(as_pairs(second), select(all_scores, 20, granularity, Order.TOP))


def test_a_larger_selection_only_adds() -> None:
    random = np.random.default_rng(2)
    all_scores = {name: random.random((5, 7), dtype=np.float32) for name in "ab"}
    before: set[tuple[str, int]] = set()
    for k in range(7, 71):
        found = select(all_scores, k, ROW, Order.TOP)
        now = {(name, int(index)) for name, pairs in found.items() for index in pairs[:, 0]}
        assert before <= now
        assert k - 7 < len(now) <= k
        before = now


def test_auto_takes_what_holds_more_in_as_many_entries() -> None:
    scores = np.zeros((4, 8), np.float32)
    scores[1] = 1
    # A whole row of 8 against two columns of 4, each a quarter full.
    assert choose_groups(scores, AUTO, Fraction(1, 4), Order.TOP).granularity is ROW
    scores = np.zeros((4, 8), np.float32)
    scores[:, 5] = 1
    assert choose_groups(scores, AUTO, Fraction(1, 4), Order.TOP).granularity is COLUMN
    flat = np.ones((4, 8), np.float32)
    assert choose_groups(flat, AUTO, Fraction(1, 4), Order.TOP).granularity is ROW


def test_a_group_in_part_holds_a_part_of_its_score() -> None:
    groups = Groups((2, 4), ROW, np.array([1, 3], np.float32))
    held = [groups.hold(Fraction(size), Order.TOP) for size in (0, 2, 4, 5, 8)]
    assert held == [0, 6, 12, 13, 16]
    assert groups.hold(Fraction(5), Order.BOTTOM) == 4 + 3


def test_indices_of_a_large_parameter_are_wide() -> None:
    groups = Groups((2**16, 2**15), ROW, np.zeros(2**16, np.float32))
    kept = groups.select(np.array([2**16 - 1]))
    assert kept.indices.dtype == np.int64
    assert kept.indices[-1] == 2**31 - 1


def test_single_entries_are_ranked_as_ever() -> None:
    assert isinstance(make_ranking(3, 9, ENTRY, Order.TOP), TopK)
    assert find_longest([(2, 3)], ENTRY) == 1
    assert find_longest([(2, 3), (5, 4, 1)], AUTO) == 4


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda best: best.result(), "k: expected at least 3 entries, the group of the best"),
        (lambda best: best.add("a", np.ones((2, 3), np.float32)), "expected to be scored once"),
        (
            lambda best: best.add("b", np.ones((2, 3), np.float32), np.array([1])),
            "b: expected to select whole rows or columns, found entries to exclude",
        ),
        (lambda best: best.add("b", np.full((2, 3), np.nan, np.float32)), "expected finite scores"),
    ],
)
def test_what_cannot_be_selected_is_refused(action, message: str) -> None:
    best = TopGroups(2, 6, ROW, Order.TOP)
    best.add("a", np.ones((2, 3), np.float32))
    with pytest.raises(SelectionError, match=message):
        action(best)
