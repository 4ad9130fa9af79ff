"""Time to switch a safety patch on or off on a loaded model.

    python benchmarks/switching_cost.py [--rounds 20]

A bfloat16 Llama of 135 million weights is built from a config, with a patch of 1 % of its linear
layers. Times are medians of CPU time on one thread, per switch and per million entries.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from load_time import build_base, build_patch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from safeweights_peft.patch.io import read_metadata


def measure(model: PeftModel, rounds: int) -> dict[str, float]:
    """Switch off and on by turns; return the median CPU time of each, in seconds."""
    times: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(rounds):
        for name, switch in (
            ("off", model.base_model.disable_adapter_layers),
            ("on", model.base_model.enable_adapter_layers),
        ):
            start = time.process_time()
            switch()
            times[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in times.items()}


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
