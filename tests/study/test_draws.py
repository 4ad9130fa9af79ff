"""Intervals over draws, held to tables, to their limits, and to what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeweights_peft.rates import Rate, wilson
from safeweights_peft.study.draws import (
    Mean,
    difference_interval,
    mean_over_draws,
    rate_over_draws,
    t_quantile,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, 12.706205),
        (2, 4.302653),
        (3, 3.182446),
        (4, 2.776445),
        (5, 2.570582),
        (10, 2.228139),
        (29, 2.045230),
        (100, 1.983972),
    ],
)
def test_the_t_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-6)


def test_a_single_draw_has_wilsons_interval() -> None:
    assert rate_over_draws([wilson(7, 20)]) == wilson(7, 20)


def test_draws_that_agree_leave_the_interval_of_the_requests() -> None:
    pooled, single = rate_over_draws([wilson(7, 20)] * 5), wilson(7, 20)
    assert (pooled.count, pooled.n, pooled.rate) == (35, 100, single.rate)
    assert (pooled.low, pooled.high) == pytest.approx((single.low, single.high))


def test_the_two_parts_are_added_as_squares() -> None:
    pooled, single = (
        rate_over_draws([wilson(8, 20), wilson(10, 20), wilson(12, 20)]),
        wilson(10, 20),
    )
    by_draws = 4.302653 * 0.1 / math.sqrt(3)
    assert pooled.rate == 0.5
    assert 0.5 - pooled.low == pytest.approx(math.hypot(0.5 - single.low, by_draws), abs=1e-6)
    assert pooled.high - 0.5 == pytest.approx(math.hypot(single.high - 0.5, by_draws), abs=1e-6)


@given(st.integers(1, 60), st.data())
def test_the_rate_lies_within_its_interval_and_both_within_0_and_1(n: int, data) -> None:
    counts = data.draw(st.lists(st.integers(0, n), min_size=1, max_size=8))
    rate = rate_over_draws([wilson(count, n) for count in counts])
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1


@pytest.mark.parametrize(
    ("by_request", "by_draw"), [(0.0, 0.0), (1.5, 0.0), (0.0, 1.0), (1.0, 1.0)]
)
def test_the_interval_covers_the_true_rate_as_often_as_it_promises(
    by_request: float, by_draw: float
) -> None:
    random = np.random.default_rng(0)

    def chances(requests: int, draws: int) -> np.ndarray:
        effects = by_draw * random.standard_normal((draws, 1))
        return 1 / (1 + np.exp(1 - effects - by_request * random.standard_normal(requests)))

    truth = np.mean([chances(500, 500).mean() for _ in range(20)])
    covered = 0
    for _ in range(400):
        counts = (random.random((5, 40)) < chances(40, 5)).sum(1)
        rate = rate_over_draws([wilson(int(count), 40) for count in counts])
        covered += rate.low <= truth <= rate.high
    assert covered / 400 >= 0.93


def test_a_mean_has_students_interval() -> None:
    found = mean_over_draws([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((max(0, 2 - half), 2 + half), abs=1e-6)


def test_a_mean_of_one_draw_has_no_interval() -> None:
    assert mean_over_draws([0.25]) == Mean(0.25, None, None)


def test_a_published_example_of_a_difference_comes_out() -> None:
    """56 of 70 against 48 of 80: Newcombe 1998, table II, example (a), method 10."""
    low, high = difference_interval(wilson(56, 70), wilson(48, 80))
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_difference_turned_round_is_its_opposite() -> None:
    first, second = wilson(3, 10), Rate(12, 40, 0.3, 0.1, 0.8)
    low, high = difference_interval(first, second)
    assert difference_interval(second, first) == pytest.approx((-high, -low))
