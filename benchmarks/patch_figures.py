"""Figures of the patch study at one ASR: curves over scales, and bootstrap intervals."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safeweights_peft.rates import wilson_interval

DRAWS = 1000
Floats = NDArray[np.float64]
Figures = dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and the bootstrap draws that comparisons pair."""

    value: float
    low: float
    high: float
    draws: Floats


class Tests:
    """All measurements of one row, of one seed or several, as arrays."""

    def __init__(self, tests: Sequence[Mapping[str, Any]]) -> None:
        """Take what `patch_study.py` measured; all seeds were asked the same requests."""
        self.tests = tests
        self.refused = {
            kind: np.array(
                [[[*map(int, line)] for line in test["refused"][kind]] for test in tests]
            )
            for kind in tests[0]["refused"]
        }  # (seeds, scales, requests)
        self.kl = np.array([test["kl"] for test in tests])  # (seeds, scales, answers)
        self.tokens = np.array(tests[0]["tokens"])  # (answers,)
        self.log_scales = np.log([test["scales"] for test in tests])  # (seeds, scales)
        by_category = defaultdict(list)
        for place, category in enumerate(tests[0]["categories"]):
            by_category[category].append(place)
        self.groups = {name: np.array(places) for name, places in by_category.items()}

    def figure(self, target: float, generator: np.random.Generator | None = None) -> Figures:
        """Compute all figures at an ASR; of the rows and seeds drawn by a generator, if any."""
        sizes = {kind: array.shape[-1] for kind, array in self.refused.items()}
        drawn = {kind: _draw(size, generator) for kind, size in sizes.items()}
        answers, seeds = _draw(len(self.tokens), generator), _draw(len(self.tests), generator)
        picked = self._pick_categories(drawn["builtin_benign"])
        rows = [self._figure_seed(seed, target, drawn, answers, picked) for seed in seeds]
        return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}

    def _pick_categories(self, drawn: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        picked = {name: drawn[np.isin(drawn, places)] for name, places in self.groups.items()}
        # A draw may miss a small category.
        return {name: rows if len(rows) else self.groups[name] for name, rows in picked.items()}

    def _figure_seed(
        self,
        seed: int,
        target: float,
        drawn: Mapping[str, NDArray[np.int64]],
        answers: NDArray[np.int64],
        picked: Mapping[str, NDArray[np.int64]],
    ) -> Figures:
        refused = {
            kind: array[seed][:, drawn[kind]].mean(1) for kind, array in self.refused.items()
        }
        scales, middle = self.log_scales[seed], self.log_scales.shape[1] // 2
        place = find_place(scales, 1 - refused["harmful"], target)
        kl = self.kl[seed][:, answers].sum(1) / self.tokens[answers].sum()
        builtin = self.refused["builtin_benign"][seed]
        return {
            "asr": 1 - refused["harmful"][middle],
            "scale": float(np.exp(place)),
            "kl": float(np.exp(read_line(scales, np.log(np.maximum(kl, 1e-12)), place))),
            "over_refusal": _rate(read_line(scales, refused["benign"], place)),
            "builtin_asr": _rate(read_line(scales, 1 - refused["builtin_harmful"], place)),
            "builtin": _rate(read_line(scales, refused["builtin_benign"], place)),
            **{
                f"built-in, {name}": _rate(read_line(scales, builtin[:, rows].mean(1), place))
                for name, rows in picked.items()
            },
        }

    def estimate(self, target: float) -> dict[str, Estimate]:
        """Estimate all figures at an ASR; draws of rows that were asked the same are paired."""
        values = self.figure(target)
        generator = np.random.default_rng(0)
        draws = [self.figure(target, generator) for _ in range(DRAWS)]
        counts = {
            "asr": self.refused["harmful"].shape[-1],
            "over_refusal": self.refused["benign"].shape[-1],
            "builtin_asr": self.refused["builtin_harmful"].shape[-1],
            "builtin": self.refused["builtin_benign"].shape[-1],
            **{f"built-in, {name}": len(rows) for name, rows in self.groups.items()},
        }
        estimates = {}
        for key, value in values.items():
            drawn = np.array([draw[key] for draw in draws])
            low, high = np.quantile(drawn, (0.025, 0.975))
            if key in counts:  # where all rows agree, every draw does
                least, most = wilson_interval(value, counts[key])
                low, high = min(low, least), max(high, most)
            estimates[key] = Estimate(value, float(low), float(high), drawn)
        return estimates


def find_place(log_scales: Floats, rates: Floats, target: float) -> float:
    """Find the log of the scale at which an ASR is reached, on a line through those measured."""
    if len(log_scales) == 1:
        return float(log_scales[0])
    slope, mean, middle = _fit_line(log_scales, rates)
    span = float(log_scales.max() - log_scales.min())
    if slope >= 0:  # too few rows, or nothing changes any more
        return middle
    place = middle + (target - mean) / slope
    # Not far beyond what was measured.
    return float(np.clip(place, log_scales.min() - span / 2, log_scales.max() + span / 2))


def read_line(log_scales: Floats, values: Floats, place: float) -> float:
    """Read a figure at a scale from a line through those measured."""
    if len(log_scales) == 1:
        return float(values[0])
    slope, mean, middle = _fit_line(log_scales, values)
    return mean + slope * (place - middle)


def _fit_line(x: Floats, y: Floats) -> tuple[float, float, float]:
    middle, mean = float(x.mean()), float(y.mean())
    return float(((x - middle) * (y - mean)).sum() / ((x - middle) ** 2).sum()), mean, middle


def _rate(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _draw(size: int, generator: np.random.Generator | None) -> NDArray[np.int64]:
    return np.arange(size) if generator is None else generator.integers(size, size=size)


def compare(first: Mapping[str, Estimate], second: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Compare two rows: the ratio of their KL, and the differences of their over-refusal."""
    parts = {"kl": (first["kl"].value / second["kl"].value, first["kl"].draws / second["kl"].draws)}
    for key in ("over_refusal", "builtin"):
        parts[key] = (first[key].value - second[key].value, first[key].draws - second[key].draws)
    return {
        key: Estimate(value, *map(float, np.quantile(draws, (0.025, 0.975))), draws)
        for key, (value, draws) in parts.items()
    }
