"""Time to load a model with a safety patch of 1 % of its weights, against the model alone.

    python benchmarks/load_time.py [--model DIR [--patch DIR]] [--rounds 7]

The patch is loaded plain, and in the compact encoding, which is decoded with the base's entries.
Each load runs in a process of its own, the kinds in turn; imports, and collecting their garbage,
come before the clock starts. Files are warm in the system's cache. Times are medians of wall-clock
and CPU time on one thread. Three kinds show what takes the time: a patch of one parameter is what
PEFT takes for any adapter, a LoRA of the same modules what it takes to walk through them, and a
bare loop reads the patch's file and writes its entries, without a check. On a CPU, transformers
only maps a base's weights into memory, and a forward pass is the first to read them; so there is a
second table of loading and one forward pass.
Without ``--model``, a bfloat16 Llama of 135 million weights is built from a config; without
``--patch``, a patch of random entries of its linear layers.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from safeweights_peft import Adapter, SparseDelta, convert, read_adapter, write_adapter
from safeweights_peft.delta import add_rounded, digest, index_dtype
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.io import TENSORS_FILE
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Encoding, Mode, TensorRecord, indices_key, values_key

DENSITY = 0.01
TOKENS = 16
KINDS = (
    "base alone",
    "base and one parameter",
    "base and bare loop",
    "base and patch",
    "base and compact patch",
    "base and LoRA",
)


def build_base(path: Path) -> None:
    """Save a random Llama with 210 linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def build_patch(base: Path, out: Path) -> Path:
    """Write a patch of random entries of all linear layers."""
    random = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    records, deltas = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or "embed" in name or "lm_head" in name:
            continue
        weight, shape = to_numpy(parameter), tuple(parameter.shape)
        chosen = random.choice(weight.size, round(weight.size * DENSITY), replace=False)
        indices = np.sort(chosen).astype(index_dtype(weight.size))
        values = random.normal(0, 1e-3, indices.size).astype(np.float32)
        deltas[name] = SparseDelta(shape, indices, values)
        entries = deltas[name].gather(weight)
        records[name] = TensorRecord(
            shape=shape,
            dtype=str(parameter.dtype).removeprefix("torch."),
            blocks=(Block.dense(name, shape),),
            base_digest=digest(entries),
            merged_digest=digest(add_rounded(entries, values)),
        )
    write_adapter(out, Adapter(AdapterMetadata(mode=Mode.SET, tensors=records), deltas))
    return out


def pack(base: Path, patch: Path, out: Path) -> None:
    """Write a patch again in the compact encoding, and print what both take."""
    report = convert(patch, Encoding.COMPACT, out, base)
    plain, compact = report.before_bytes_per_entry, report.after_bytes_per_entry
    print(f"{report.entries:,} entries: {plain:.2f} bytes each, compact {compact:.2f}")


def cut(patch: Path, out: Path) -> None:
    """Write a patch again with its first parameter alone."""
    adapter = read_adapter(patch)
    name, delta = next(iter(adapter.deltas.items()))
    metadata = replace(adapter.metadata, tensors={name: adapter.metadata.tensors[name]})
    write_adapter(out, Adapter(metadata, {name: delta}))


def build_lora(base: Path, out: Path) -> None:
    """Save a LoRA of rank 3 of the same layers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=3, target_modules="all-linear")).save_pretrained(out)


def clocks() -> np.ndarray:
    """Read the wall clock and the CPU time, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


@torch.no_grad()
def write_bare(model: torch.nn.Module, patch: str) -> None:
    """Write a patch's entries into a model, without a check or a way back."""
    stored = load_file(Path(patch, TENSORS_FILE))
    for name, parameter in model.named_parameters():
        if (indices := stored.get(indices_key(name))) is not None:
            flat, indices = parameter.view(-1), indices.long()
            entries = flat[indices].float() + stored[values_key(name)]
            flat.index_copy_(0, indices, entries.to(flat.dtype))


def load(kind: str, base: str, adapter: str) -> list[list[float]]:
    """Load once; measure wall-clock and CPU time, without and with a first forward pass."""
    gc.collect()  # or one pass through all that was imported, as long as the load, may fall into it
    start = clocks()
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind == "base and bare loop":
        write_bare(model, adapter)
    elif kind != "base alone":
        model = PeftModel.from_pretrained(model, adapter)
    loaded = clocks()
    with torch.no_grad():
        model(input_ids=torch.arange(TOKENS)[None])
    return [(loaded - start).tolist(), (clocks() - start).tolist()]


def load_in_new_process(kind: str, base: Path, adapter: Path) -> list[list[float]]:
    """Load once in a process of its own."""
    command = [sys.executable, __file__, "--load", kind]
    command += ["--model", str(base), "--adapter", str(adapter)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def compare(base: Path, patch: Path | None, rounds: int) -> None:
    """Measure all kinds in turn, and print a table."""
    times: dict[str, list[list[list[float]]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        adapters = {kind: Path(folder) / kind for kind in KINDS}
        adapters["base and patch"] = patch or build_patch(base, adapters["base and patch"])
        adapters["base and bare loop"] = adapters["base and patch"]
        cut(adapters["base and patch"], adapters["base and one parameter"])
        pack(base, adapters["base and patch"], adapters["base and compact patch"])
        build_lora(base, adapters["base and LoRA"])
        for number in range(rounds + 1):  # the first round warms the system's cache
            for kind in KINDS:
                measured = load_in_new_process(kind, base, adapters[kind])
                if number:
                    times[kind].append(measured)
    medians = {kind: 1000 * np.median(values, axis=0) for kind, values in times.items()}
    for row, title in enumerate(("Loading", f"Loading and a forward pass of {TOKENS} tokens")):
        print(f"\n{title}\n\n| | wall, ms | ratio | CPU, ms | ratio |\n|---|---|---|---|---|")
        for kind, median in medians.items():
            (wall, cpu), (wall_ratio, cpu_ratio) = median[row], median[row] / medians[KINDS[0]][row]
            print(f"| {kind} | {wall:.0f} | {wall_ratio:.2f} | {cpu:.0f} | {cpu_ratio:.2f} |")


def main() -> None:
    """Measure everything, or, as a child process, one load."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a Llama; otherwise one is built")
    parser.add_argument("--patch", type=Path, help="directory of a patch of it, stored plain")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--load", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.load:
        print(json.dumps(load(options.load, options.model, options.adapter)))
    elif options.model:
        compare(options.model, options.patch, options.rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            build_base(Path(folder))
            compare(Path(folder), None, options.rounds)


if __name__ == "__main__":
    main()
