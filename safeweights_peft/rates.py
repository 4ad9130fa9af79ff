"""Proportions with Wilson confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from safeweights_peft.errors import EvaluationError

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A proportion with its 95 % interval, all in [0, 1]."""

    count: int
    n: int
    rate: float  # count / n
    low: float
    high: float


def wilson(count: int, n: int) -> Rate:
    """Estimate a proportion and its Wilson interval."""
    if n < 1 or not 0 <= count <= n:
        raise EvaluationError(f"rate: expected 0 <= count <= n and n >= 1, found {count} of {n}")
    return Rate(count, n, count / n, *wilson_interval(count / n, n))


def wilson_interval(rate: float, n: int) -> tuple[float, float]:
    """Compute the ends of the 95 % interval of Wilson (1927)."""
    # Unlike the normal one it stays in [0, 1] and holds near both ends and for small n.
    z2 = Z_95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # Exact at both ends, where rounding would leave a rate outside its interval.
    return 0.0 if rate == 0 else centre - half, 1.0 if rate == 1 else centre + half


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Compute how far two judges agree beyond chance; None where chance alone agrees in all."""
    # Cohen (1960): (p - e) / (1 - e), where p is the fraction on which they agree, and e the
    # fraction on which two judges would who give each verdict as often and know nothing else.
    if not first or len(first) != len(second):
        raise EvaluationError(
            f"kappa: expected two verdicts on each of at least one answer, found {len(first)} and "
            f"{len(second)}"
        )
    counts = Counter(first), Counter(second)
    expected = sum(counts[0][verdict] * counts[1][verdict] for verdict in counts[0])
    if expected == len(first) ** 2:
        return None
    agreed = sum(one == other for one, other in zip(first, second, strict=True))
    return (agreed * len(first) - expected) / (len(first) ** 2 - expected)
