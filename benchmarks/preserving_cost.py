"""What SPA costs: time of a training step, and memory held, in full fine-tuning and under LoRA.

    python benchmarks/preserving_cost.py [--model DIR] [--map DIR] [--rounds 9]

The time of a step (forward, backward, AdamW) of one row is CPU time on one thread: the median over
rounds that take each training in turn, protected and not, each on a model of its own. LoRA has rank
8 on all linear layers. Memory is what protection holds in tensors, per entry that it protects.
Without ``--model``, a Llama of 34 million weights is built from a config, and without ``--map``,
1 % of its weights is frozen, chosen at random.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training_cost import build_base, linears
from transformers import LlamaForCausalLM
from transformers.utils import logging

from safeweights_peft import SafetyMap, preserve, read_map
from safeweights_peft.delta import digest, index_dtype
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord

RANK = 8
DENSITY = 0.01
TOKENS = (64, 512)
KINDS = ("full fine-tuning", "LoRA")


def random_map(model: LlamaForCausalLM) -> SafetyMap:
    """Choose entries of every matrix at random."""
    random = np.random.default_rng(0)
    records, indices, scores = {}, {}, {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            count = round(parameter.numel() * DENSITY)
            chosen = np.sort(random.choice(parameter.numel(), count, replace=False))
            indices[name] = chosen.astype(index_dtype(parameter.numel()))
            scores[name] = np.ones(count, np.float32)
            shape = tuple(parameter.shape)
            records[name] = TensorRecord(
                shape=shape,
                dtype="float32",
                count=count,
                blocks=(Block.dense(name, shape),),
                base_digest=digest(to_numpy(parameter).reshape(-1)[chosen]),
            )
    return SafetyMap(AdapterMetadata(mode=Mode.SPA, tensors=records), indices, scores)


@dataclass
class Training:
    """A model to train, with AdamW over all that it trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, kind: str, path: str | None) -> "Training":
        """Build a model that is ready to train."""
        model: nn.Module = build_base(path)
        if kind == "LoRA":
            names = sorted({name.rpartition(".")[2] for name in linears(model)})
            # B starts at random, not at zero, as later in a training.
            config = LoraConfig(r=RANK, target_modules=names, init_lora_weights=False)
            model = get_peft_model(model, config)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return cls(model.train(), torch.optim.AdamW(trained, lr=1e-6))

    def step(self, ids: Tensor) -> float:
        """Train one step, and give its time in seconds."""
        start = time.process_time()
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def measure_time(path: str | None, safety_map: SafetyMap, kind: str, rounds: int) -> Iterator[str]:
    """Yield a training's row of the table, cell by cell."""
    for tokens in TOKENS:
        trainings = [Training.of(kind, path) for _ in range(2)]
        times: list[list[float]] = [[], []]
        with preserve(trainings[1].model, safety_map):
            for number in range(rounds + 1):  # the first round warms up
                ids = torch.randint(0, trainings[0].model.config.vocab_size, (1, tokens))
                for training, seconds in zip(trainings, times, strict=True):
                    taken = training.step(ids)
                    if number:
                        seconds.append(taken)
        plain, protected = (statistics.median(seconds) for seconds in times)
        yield f"{1000 * plain:.1f} ms"
        yield f"{1000 * protected:.1f} ms"
        yield f"{protected / plain:.3f}"


def find_storages() -> dict[int, int]:
    """Find the memory of all tensors: bytes by address."""
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, Tensor):
            parts = [item]
            if item.layout is torch.sparse_csr:
                parts = [item.crow_indices(), item.col_indices(), item.values()]
            for part in parts:
                storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return storages


def measure_memory(path: str | None, safety_map: SafetyMap, kind: str) -> float:
    """Measure what protection holds, in bytes per entry that it protects."""
    training = Training.of(kind, path)
    names = safety_map.indices.keys()
    if kind == "LoRA":
        names &= {f"{name}.weight" for name in linears(build_base(path))}
    count = sum(len(safety_map.indices[name]) for name in names)
    gc.collect()
    before = find_storages()
    with preserve(training.model, safety_map):
        training.step(torch.zeros(1, 8, dtype=torch.long))
        training.optimizer.state.clear()
        gc.collect()
        added = find_storages().items() - before.items()
    return sum(size for _, size in added) / count


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory of a Llama; otherwise one is built")
    parser.add_argument("--map", help="directory of the model's safety map; otherwise at random")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    safety_map = read_map(options.map) if options.map else random_map(build_base(options.model))
    heads = [f"{n} tokens | protected | ratio" for n in TOKENS]
    print(f"| training | {' | '.join(heads)} | bytes held per protected entry |")
    print("|---" * (2 + 3 * len(TOKENS)) + "|")
    for kind in KINDS:
        cells = list(measure_time(options.model, safety_map, kind, options.rounds))
        memory = measure_memory(options.model, safety_map, kind)
        print(f"| {kind} | {' | '.join(cells)} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
