"""Time to switch a safety patch on or off on a loaded model.

    python benchmarks/switching_cost.py [--rounds 20]

A bfloat16 Llama of 135 million weights is built from a config, with a patch of 1 % of its linear
layers. Times are medians of CPU time on one thread, per switch and per million entries. Beside them
stand two that no switch can go below: a bare loop that writes the entries, of which each lies in a
cache line of its own, in the fastest way that torch has, with indices that are ready; and PEFT's
walk through all modules.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from load_time import build_base, build_patch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from safeweights_peft.patch.io import read_metadata
from safeweights_peft.tuner.layer import layers


def median_time(call: Callable[[], object], before: Callable[[], object], rounds: int) -> float:
    """Return the median CPU time of a call, in seconds; before each call make another."""
    times = []
    for _ in range(rounds):
        before()
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return float(np.median(times))


def bare_loop(model: PeftModel) -> Callable[[], None]:
    """Prepare a loop that writes the entries which are there."""
    ready = []
    for layer in layers(model):
        bits = layer.parameter.detach().view(-1).view(torch.int16)
        indices = layer.indices["default"].long()
        ready.append((bits, indices, bits[indices]))

    def write() -> None:
        for bits, indices, entries in ready:
            bits.scatter_(0, indices, entries)

    return write


def measure(model: PeftModel, rounds: int) -> dict[str, float]:
    """Switch off and on by turns; return the median CPU time of each, in seconds."""
    off, on = model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers

    def walk() -> list[bool]:
        return [isinstance(module, BaseTunerLayer) for module in model.base_model.model.modules()]

    return {
        "off": median_time(off, on, rounds),
        "on": median_time(on, off, rounds),
        "bare loop": median_time(bare_loop(model), walk, rounds),
        "PEFT's walk": median_time(walk, on, rounds),
    }


def main() -> None:
    """Build, load, switch, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="switches each way (default 20)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        build_base(base)
        patch = build_patch(base, Path(folder) / "patch")
        entries = sum(record.count for record in read_metadata(patch).tensors.values())
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), patch)
        for name, seconds in measure(model, options.rounds).items():
            per_million = 1000 * seconds / entries * 1e6
            print(f"{name}: {1000 * seconds:.2f} ms, {per_million:.2f} ms per million entries")


if __name__ == "__main__":
    main()
