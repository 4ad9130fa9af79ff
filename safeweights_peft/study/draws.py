"""Figures over repeated draws on the same requests, and the difference of two rates.

A figure over draws varies for two reasons: the requests are a sample, the same one in each draw, so
that more draws don't make it larger; and the draws themselves differ. Both are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from safeweights_peft.rates import Rate, wilson_interval


@dataclass(frozen=True)
class Mean:
    """A mean over draws with its 95 % t interval.

    Attributes:
        mean: the mean.
        low: the interval's lower end, None for a single draw.
        high: the interval's upper end, None for a single draw.
    """

    mean: float
    low: float | None
    high: float | None


def rate_over_draws(rates: Sequence[Rate]) -> Rate:
    """Pool a rate over draws, with a 95 % interval for both the requests and the draws.

    Wilson's interval at the pooled rate, of the requests of a single draw, tells how far requests
    matter; Student's t interval of the draws' rates, how far draws do. From the rate to either end,
    the two distances are added as squares (MOVER: Zou & Donner 2008). The part of the requests is
    an upper bound, so the interval is rather too wide. For one draw it is Wilson's.
    """
    count, n = sum(each.count for each in rates), sum(each.n for each in rates)
    share, by_draws = count / n, _half_width([each.rate for each in rates])
    low, high = wilson_interval(share, rates[0].n)
    low = max(0.0, share - math.hypot(share - low, by_draws))
    high = min(1.0, share + math.hypot(high - share, by_draws))
    return Rate(count, n, share, low, high)


def mean_over_draws(values: Sequence[float]) -> Mean:
    """Average what is at least 0, with Student's 95 % t interval over the draws."""
    mean = fmean(values)
    if len(values) == 1:
        return Mean(mean, None, None)
    half = _half_width(values)
    return Mean(mean, max(0.0, mean - half), mean + half)


def difference_interval(first: Rate, second: Rate) -> tuple[float, float]:
    """Estimate how far one rate is above another (Newcombe 1998, method 10).

    Rather too wide for rates of the same requests, which rise and fall together.
    """
    difference = first.rate - second.rate
    below = math.hypot(first.rate - first.low, second.high - second.rate)
    above = math.hypot(first.high - first.rate, second.rate - second.low)
    return difference - below, difference + above


def t_quantile(freedom: int) -> float:
    """Find what Student's t exceeds, in absolute value, with a probability of 5 %."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _t_within(angle: float, freedom: int) -> float:
    """Tell the probability of |t| < sqrt(freedom) tan(angle).

    Source: Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    odd, cosine = freedom % 2, math.cos(angle)
    term = math.sin(angle) * cosine**odd
    total = term if freedom > 1 else 0.0
    for power in range(odd + 2, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return (angle + total) * 2 / math.pi if odd else total


def _half_width(values: Sequence[float]) -> float:
    """Halve the t interval of a mean; 0 for one value."""
    if len(values) == 1:
        return 0.0
    return t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
