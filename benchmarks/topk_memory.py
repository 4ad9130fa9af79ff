"""Extra memory of the exact top-k: its peak over its input, against k entries and one tensor.

    python benchmarks/topk_memory.py [--density 0.01]

Scores of a 135M model's shapes are offered tensor by tensor, sorted the worst way for a bounded
selection (each tensor better than the last) and the usual way. An entry is an index and a score: 8
bytes for int32 indices. numpy reports its allocations to tracemalloc, so the peak is exact.
"""

import argparse
import tracemalloc
from collections.abc import Iterator

import numpy as np

from safeweights_peft.selection import TopK

SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
LAYERS = 30
ENTRY_BYTES = 8


def scores(rising: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yield scores, one tensor at a time."""
    generator = np.random.default_rng(0)
    for layer in range(LAYERS):
        for position, shape in enumerate(SHAPES):
            values = generator.random(shape, dtype=np.float32)
            values += np.float32(layer * len(SHAPES) + position if rising else 0)
            yield f"{layer:02d}.{position}", values


def peak_bytes(k: int, rising: bool) -> tuple[int, int]:
    """Measure the selection's own peak, and the size of the largest tensor's scores."""
    best, peak, largest = TopK(k), 0, 0
    for name, values in scores(rising):
        before = tracemalloc.get_traced_memory()[0] - held_bytes(best)
        tracemalloc.reset_peak()
        best.add(name, values)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
        largest = max(largest, values.nbytes)
    return peak, largest


def held_bytes(best: TopK) -> int:
    """Count what a selection holds already."""
    return sum(kept.indices.nbytes + kept.scores.nbytes for kept in best._kept.values())


def main() -> None:
    """Print the peaks and their ratios to the bound."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--density", type=float, default=0.01)
    total = LAYERS * sum(int(np.prod(shape)) for shape in SHAPES)
    k = round(parser.parse_args().density * total)
    tracemalloc.start()
    print("| scores | k | peak (MB) | k entries + one tensor's scores (MB) | ratio |")
    print("|---|---|---|---|---|")
    for title, rising in (("usual", False), ("worst case", True)):
        peak, largest = peak_bytes(k, rising)
        bound = k * ENTRY_BYTES + largest
        print(f"| {title} | {k:,} | {peak / 1e6:.1f} | {bound / 1e6:.1f} | {peak / bound:.2f} |")


if __name__ == "__main__":
    main()
