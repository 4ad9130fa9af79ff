"""A share among so many, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safeweights_peft.errors import EvaluationError

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % Wilson interval, all in [0, 1].

    Attributes:
        count: how often it happened.
        n: out of how many.
        rate: count / n.
        low: the interval's lower end.
        high: the interval's upper end.
    """

    count: int
    n: int
    rate: float
    low: float
    high: float


def wilson(count: int, n: int) -> Rate:
    """Estimate a share (Wilson 1927), sound also near 0 and 1 and for small n."""
    if n < 1 or not 0 <= count <= n:
        raise EvaluationError(f"rate: expected 0 <= count <= n and n >= 1, found {count} of {n}")
    return Rate(count, n, count / n, *wilson_interval(count / n, n))


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Compute the ends of Wilson's 95 % interval."""
    z2 = Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half
