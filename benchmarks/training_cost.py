"""Memory and CPU time of one training step: safety patches against PEFT's LoRA, SHIRA, SUPERTUNING.

    python benchmarks/training_cost.py [--model DIR] [--rounds 9]

Peak memory is what one forward and backward pass needs on top of the built model: the high-water
mark of the resident set minus what is resident after building, each in a process of its own, with
freed blocks handed back to the system at once. CPU time is the median over rounds that take each
method in turn, on one thread, with values that change between rounds as in training. All methods
train the same linear layers, with LoRA's number of parameters unless a density is named.
Without ``--model``, a Llama of 34 million weights is built from a config.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from safeweights_peft import create_adapter
from safeweights_peft.patch.groups import spread_groups
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord

RANK = 3
TOKENS = (64, 512)
METHODS = ("lora", "patch", "patch of rows", "patch 1%", "shira", "supertuning")


def build_base(path: str | None) -> LlamaForCausalLM:
    """Build the base model in float32."""
    torch.manual_seed(0)
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """List the linear layers that every method trains, by name; lm_head is left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def build_patch(model: LlamaForCausalLM, density: float, by_rows: bool = False) -> PeftModel:
    """Wrap a model with a patch of random entries, or of as many in whole rows."""
    random = np.random.default_rng(0)
    records, indices = {}, {}
    for name, module in linears(model).items():
        parameter, shape = f"{name}.weight", tuple(module.weight.shape)
        total = shape[0] if by_rows else module.weight.numel()
        chosen = np.sort(random.choice(total, max(1, round(total * density)), replace=False))
        indices[parameter] = spread_groups(chosen, "row", shape) if by_rows else chosen
        block = Block.dense(parameter, shape)
        records[parameter] = TensorRecord(shape=shape, dtype="float32", blocks=(block,))
    return create_adapter(model, AdapterMetadata(mode=Mode.SET, tensors=records), indices)


def build(method: str, path: str | None) -> PeftModel:
    """Build a model that is ready to train with a method."""
    model = build_base(path)
    layers = linears(model)
    numel = sum(module.weight.numel() for module in layers.values())
    equal = RANK * sum(m.in_features + m.out_features for m in layers.values()) / numel
    names = sorted({name.rpartition(".")[2] for name in layers})
    match method:
        case "lora":
            return get_peft_model(model, LoraConfig(r=RANK, target_modules=names))
        case "shira":
            return get_peft_model(model, ShiraConfig(r=RANK, target_modules=names))
        case "supertuning":
            config = SupertuningConfig(sparsity=1 - equal, target_modules=names)
            return get_peft_model(model, config)
        case "patch":
            return build_patch(model, equal)
        case "patch of rows":
            return build_patch(model, equal, by_rows=True)
        case "patch 1%":
            return build_patch(model, 0.01)
    raise ValueError(method)


def batch(model: nn.Module, tokens: int) -> dict[str, torch.Tensor]:
    """Make four equal rows of random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (4, tokens // 4))
    return {"input_ids": ids, "labels": ids}


def status_kib(field: str) -> int:
    """Read a size from this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def measure_memory(method: str, path: str | None, tokens: int) -> int:
    """Measure what a forward and backward pass needs on top of the model, in KiB."""
    model = build(method, path).train()
    inputs = batch(model, tokens)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    resident = status_kib("VmRSS")
    model(**inputs).loss.backward()
    return status_kib("VmHWM") - resident


def measure_time(path: str | None, tokens: int, rounds: int) -> dict[str, float]:
    """Measure the CPU time of a forward and backward pass by method, in seconds."""
    models = {method: build(method, path).train() for method in METHODS}
    steps = {
        method: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
        for method, model in models.items()
    }
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 1):  # the first round warms up
        for method, model in models.items():
            inputs = batch(model, tokens)
            start = time.process_time()
            model(**inputs).loss.backward()
            seconds = time.process_time() - start
            steps[method].step()
            steps[method].zero_grad()
            if number:
                times[method].append(seconds)
    return {method: statistics.median(seconds) for method, seconds in times.items()}


def in_new_process(arguments: list[str], script: str = __file__, **environment: str) -> object:
    """Run a measurement of a script in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def print_table(title: str, unit: str, results: dict[int, dict[str, float]]) -> None:
    """Print a table of one quantity, with ratios to LoRA."""
    print(f"\n{title}\n")
    heads = [f"{tokens} tokens, {unit} | ratio to LoRA" for tokens in results]
    print(f"| method | {' | '.join(heads)} |")
    print("|---" * (1 + 2 * len(results)) + "|")
    for method in METHODS:
        cells = [
            f"{figures[method]:.1f} | {figures[method] / figures['lora']:.2f}"
            for figures in results.values()
        ]
        print(f"| {method} | {' | '.join(cells)} |")


def main() -> None:
    """Measure everything, or, as a child process, one thing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a Llama; otherwise one is built")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--measure", choices=("memory", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.measure == "memory":
        print(json.dumps(measure_memory(options.method, options.model, options.tokens)))
        return
    if options.measure == "time":
        print(json.dumps(measure_time(options.model, options.tokens, options.rounds)))
        return
    model = ["--model", options.model] if options.model else []
    memory: dict[int, dict[str, float]] = {}
    seconds: dict[int, dict[str, float]] = {}
    for tokens in TOKENS:
        common = [*model, "--tokens", str(tokens)]
        for method in METHODS:
            arguments = [*common, "--measure", "memory", "--method", method]
            kib = in_new_process(arguments, MALLOC_MMAP_THRESHOLD_="65536")
            memory.setdefault(tokens, {})[method] = kib / 1024
        rounds = ["--rounds", str(options.rounds)]
        times = in_new_process([*common, *rounds, "--measure", "time"])
        seconds[tokens] = {method: 1000 * value for method, value in times.items()}
    print_table("Peak memory of a forward and backward pass, above the built model", "MiB", memory)
    print_table("CPU time of a forward and backward pass, one thread, median", "ms", seconds)


if __name__ == "__main__":
    main()
