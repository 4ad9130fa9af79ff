"""The exact streaming top-k against torch.topk on the concatenation: time, and memory on top.

    python benchmarks/topk_cost.py [--density 0.01] [--rounds 5]

Scores of a 135M model's shapes, 1.3e8 in all, lie in memory, tensor by tensor. torch concatenates
them and sorts out k; the streaming selection is offered one tensor after the other, in the usual
order or in the worst for it, each tensor better than the last. Time is CPU time on one thread, the
median over rounds that take each in turn; memory is the high-water mark of the resident set minus
what was resident before, in a process of its own. The last column holds the selection's own peak,
by numpy's allocations, to k entries (8 bytes each) and one tensor's scores.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from training_cost import in_new_process, status_kib

from safeweights_peft.selection.topk import TopK

SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
LAYERS = 30
EMBEDDINGS = (49152, 576)
ENTRY_BYTES = 8
KINDS = ("torch.topk", "streaming, usual order", "streaming, worst order")

Scores = dict[str, np.ndarray]


def make_scores(rising: bool) -> Scores:
    """Draw all scores."""
    generator = np.random.default_rng(0)
    shapes = [EMBEDDINGS, *SHAPES * LAYERS]
    return {
        f"{position:03d}": generator.random(shape, dtype=np.float32)
        + np.float32(position if rising else 0)
        for position, shape in enumerate(shapes)
    }


def select_by_torch(scores: Scores, k: int) -> None:
    """Sort out the k best of all scores at once."""
    torch.topk(torch.cat([torch.from_numpy(values).view(-1) for values in scores.values()]), k)


def select_streaming(scores: Scores, k: int) -> None:
    """Offer one tensor after the other."""
    best = TopK(k)
    for name, values in scores.items():
        best.add(name, values)
    best.result()


def selector(kind: str) -> tuple[Callable[[Scores, int], None], Scores]:
    """Name how a kind selects, and from what."""
    scores = make_scores(rising=kind.endswith("worst order"))
    return select_by_torch if kind == "torch.topk" else select_streaming, scores


def measure_times(density: float, rounds: int) -> dict[str, float]:
    """Measure each kind's CPU time in seconds."""
    selectors = {kind: selector(kind) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, (select, scores) in selectors.items():
            start = time.process_time()
            select(scores, count(scores, density))
            times[kind].append(time.process_time() - start)
    return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def measure_memory(kind: str, density: float) -> int:
    """Measure what a selection needs on top of its scores, in KiB."""
    select, scores = selector(kind)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    resident = status_kib("VmRSS")
    select(scores, count(scores, density))
    return status_kib("VmHWM") - resident


def measure_bound(kind: str, density: float) -> float:
    """Measure the streaming selection's own peak, to k entries and one tensor's scores."""
    scores = make_scores(rising=kind.endswith("worst order"))
    k, peak = count(scores, density), 0
    tracemalloc.start()
    best = TopK(k)
    for name, values in scores.items():
        before = tracemalloc.get_traced_memory()[0] - count_bytes(best)
        tracemalloc.reset_peak()
        best.add(name, values)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return peak / (k * ENTRY_BYTES + max(values.nbytes for values in scores.values()))


def count_bytes(best: TopK) -> int:
    """Count the bytes of what a selection keeps."""
    return sum(kept.indices.nbytes + kept.scores.nbytes for kept in best._kept.values())


def count(scores: Scores, density: float) -> int:
    """Count the entries to select."""
    return round(density * sum(values.size for values in scores.values()))


def main() -> None:
    """Print times and peaks, with their ratios to torch's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return print(measure_memory(arguments.memory_of, arguments.density))
    torch.set_num_threads(1)
    times = measure_times(arguments.density, arguments.rounds)
    density = ["--density", str(arguments.density)]
    memory = {kind: in_new_process(["--memory-of", kind, *density], __file__) for kind in KINDS}
    first = KINDS[0]
    print("| selection | CPU time (s) | ratio | memory on top (MB) | ratio | to its bound |")
    print("|---|---|---|---|---|---|")
    for kind in KINDS:
        cells = [
            kind,
            f"{times[kind]:.2f}",
            f"{times[kind] / times[first]:.2f}",
            f"{memory[kind] / 1024:.0f}",
            f"{memory[kind] / memory[first]:.2f}",
            "" if kind == first else f"{measure_bound(kind, arguments.density):.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
