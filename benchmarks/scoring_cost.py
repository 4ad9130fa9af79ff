"""What scoring costs: CPU time and memory, against plain training steps on the same tokens.

    python benchmarks/scoring_cost.py [--model DIR] [--rounds 5]

A plain step is a forward and backward pass of all weights with transformers' own loss; an
optimizer's part is left out. Scoring is the same with the reference objective, its gradients summed
in float32. Both read the same tokens: 64 rows, as many as `safeweights score` takes by default, in
batches of 8, each row of 32 or 128 tokens, half of them answer. Time is the median over rounds that
take each in turn, on one thread; memory is the high-water mark of the resident set minus what is
resident with the model built, in a process of its own, and is also given less one float32
accumulator. Without ``--model``, a Llama of 34 million weights is built.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from training_cost import build_base, in_new_process, status_kib
from transformers import LlamaForCausalLM

from safeweights_peft.data import Example
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.selection.objective import ReferenceObjective
from safeweights_peft.selection.scores import sum_gradients

ROWS = 64
BATCH_SIZE = 8
TOKENS = (32, 128)
KINDS = ("plain steps", "scoring")


def make_run(kind: str, model: LlamaForCausalLM, tokens: int) -> Callable[[], None]:
    """Make a run over all rows that leaves no gradient behind."""
    ids = torch.randint(0, model.config.vocab_size, (ROWS, tokens))
    if kind == "scoring":
        half = tokens // 2
        rows = [Example(tuple(row[:half]), tuple(row[half:])) for row in ids.tolist()]
        objective = ReferenceObjective(rows, 0, BATCH_SIZE)
        parameters = eligible_parameters(model)
        return lambda: sum_gradients(model, parameters, objective).clear()
    labels = ids.clone()
    labels[:, : tokens // 2] = -100

    def train() -> None:
        model.requires_grad_(True)
        for batch, targets in zip(ids.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
            model(input_ids=batch, labels=targets).loss.backward()
            model.zero_grad()

    return train


def measure_times(path: str | None, tokens: int, rounds: int) -> dict[str, float]:
    """Measure each kind's CPU time in seconds."""
    model = build_base(path)
    runs = {kind: make_run(kind, model, tokens) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds + 1):  # the first round warms up
        for kind, run in runs.items():
            start = time.process_time()
            run()
            if number:
                times[kind].append(time.process_time() - start)
    return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def measure_memory(kind: str, path: str | None, tokens: int) -> int:
    """Measure what a run needs on top of the model, in KiB."""
    run = make_run(kind, build_base(path), tokens)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    resident = status_kib("VmRSS")
    run()
    return status_kib("VmHWM") - resident


def accumulator_kib(model: nn.Module) -> float:
    """Compute the size of one float32 number for each weight that may be selected."""
    return 4 * sum(weight.numel() for weight in eligible_parameters(model).values()) / 1024


def main() -> None:
    """Print a table of times and of peaks, with ratios to the plain step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="directory of a causal language model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        kind, tokens = arguments.memory_of
        return print(measure_memory(kind, arguments.model, int(tokens)))
    torch.set_num_threads(1)
    model = ["--model", arguments.model] if arguments.model else []
    accumulator = accumulator_kib(build_base(arguments.model))
    titles = ("plain steps (s)", "scoring (s)", "ratio", "plain steps (MB)", "scoring (MB)")
    print(f"| tokens a row | {' | '.join(titles)} | ratio less one accumulator |")
    print("|---|---|---|---|---|---|---|")
    for tokens in TOKENS:
        times = measure_times(arguments.model, tokens, arguments.rounds)
        plain, scoring = (
            in_new_process(["--memory-of", kind, str(tokens), *model], __file__) for kind in KINDS
        )
        cells = [
            str(tokens),
            *(f"{times[kind]:.2f}" for kind in KINDS),
            f"{times['scoring'] / times['plain steps']:.2f}",
            f"{plain / 1024:.0f}",
            f"{scoring / 1024:.0f}",
            f"{(scoring - accumulator) / plain:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
