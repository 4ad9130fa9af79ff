"""Fine-tune all weights of a model except those of a safety map.

    safeweights score demo/base --out demo/map --examples 8
    python examples/preserve.py demo/base demo/map demo/taught

The task here is a toy. Use your own data and arguments: the callback is all that it takes to
protect the entries, also in the trainers of TRL.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from safeweights_peft import SafetyPreservingCallback, read_map

LESSONS = [f"User: What comes after {n}?\nAssistant: {n + 1}, of course!" for n in range(16)]


def main(base: str, safety_map: str, out: str) -> None:
    """Train, save, and count what has moved."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lessons = [tokenizer(text).input_ids for text in LESSONS]
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=16,
        per_device_train_batch_size=1,
        learning_rate=2e-5,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in lessons],
        callbacks=[SafetyPreservingCallback(safety_map)],
    ).train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    compare(base, safety_map, out)


def compare(base: str, safety_map: str, out: str) -> None:
    """Count the entries that differ between two saved models, inside and outside the map."""
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    total = frozen = 0
    indices = read_map(safety_map).indices
    for name, parameter in after.named_parameters():
        moved = (parameter != before.get_parameter(name)).flatten()
        total += int(moved.sum())
        if name in indices:
            frozen += int(moved[torch.from_numpy(indices[name])].sum())
    count = sum(entries.size for entries in indices.values())
    print(f"moved {frozen:,} of the map's {count:,} entries, and {total - frozen:,} others")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} BASE MAP OUT")
    main(*sys.argv[1:])
