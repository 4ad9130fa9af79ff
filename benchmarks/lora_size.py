"""How large is a LoRA that refuses as well as a safety patch? File size, by rank, at equal ASR.

    python benchmarks/lora_size.py BASE --patch PATCH --harmful FILE --benign FILE --out DIR

A LoRA of all linear layers learns with SET's loss, data and schedule at its defaults, for each of
--ranks and --rates. The rate of a rank is the one that does best on validation requests (the
built-in evaluation set), by the merit of `selection_study.py`. It is then measured on the first 100
rows of the two test files, as the patch is. Sizes are those of `adapter_model.safetensors`: PEFT
writes a LoRA in float32, and in 16 bits it would be half of that. What is done is kept in DIR, so a
second call goes on.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from selection_study import measure, merit

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.fetching import resolve_base
from safeweights_peft.files import write_json
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.patch.io import file_bytes
from safeweights_peft.settings import EvaluateSettings, PreserveSettings, TrainSettings
from safeweights_peft.sources import read_rows, with_refusals
from safeweights_peft.tables import rate_text
from safeweights_peft.training.finetune import add_lora
from safeweights_peft.training.refuse import train_steps

RECIPE = TrainSettings()


def main() -> None:
    """Run what is missing, then print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base")
    parser.add_argument("--patch", required=True, type=Path, help="what the LoRAs compare with")
    parser.add_argument("--harmful", required=True, help="test requests, never trained on")
    parser.add_argument("--benign", required=True, help="test requests, never trained on")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    saved = arguments.out / "patch.json"
    if not saved.exists():
        write_json(saved, {"name": "patch"} | test(arguments, arguments.patch))
    for rank in arguments.ranks:
        run_rank(arguments, rank)
    print_table(arguments.out)


def run_rank(arguments: argparse.Namespace, rank: int) -> None:
    """Train at each rate, choose by validation, test the chosen one; unless that is done."""
    saved = arguments.out / f"rank-{rank}.json"
    if saved.exists():
        return
    validated = {rate: validate(arguments, rank, rate) for rate in arguments.rates}
    best = max(validated, key=lambda rate: merit(validated[rate]))
    row = {"name": f"LoRA, rank {rank}", "rate": best, "validation": validated}
    write_json(saved, row | test(arguments, arguments.out / f"lora-{rank}-{best}"))


def validate(arguments: argparse.Namespace, rank: int, rate: float) -> dict[str, Any]:
    """Train a LoRA and measure it on validation requests, unless both are done."""
    lora, saved = arguments.out / f"lora-{rank}-{rate}", arguments.out / f"lora-{rank}-{rate}.json"
    if not lora.exists():
        train(arguments, rank, rate).save_pretrained(lora)
    if not saved.exists():
        write_json(saved, measure(arguments.base, lora, EvaluateSettings(), arguments.dtype))
    return json.loads(saved.read_text(encoding="utf-8"))


def train(arguments: argparse.Namespace, rank: int, rate: float) -> PeftModel:
    """Train a LoRA with SET's loss, at the batch sizes and on the schedule of its defaults."""
    base = resolve_base(arguments.base, None)
    tokenizer = load_tokenizer(base)
    model = load_model(base, getattr(torch, arguments.dtype), torch.device("cpu"))
    harmful, benign = read_examples(model, tokenizer)
    wrapped = add_lora(model, PreserveSettings(rank=rank, seed=RECIPE.seed))
    # Nothing shrinks: a LoRA's factors start at random values.
    settings = replace(RECIPE, learning_rate=rate, shrink=0.0)
    with tempfile.TemporaryDirectory() as work_dir:
        train_steps(wrapped, tokenizer, harmful, benign, settings, Path(work_dir))
    return wrapped


def read_examples(model: Any, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """Encode harmful requests with refusals, and benign ones with the base's own answers."""
    refusals = Chat(tokenizer).encode_rows(
        with_refusals(read_rows(RECIPE.harmful)), RECIPE.refusal_tokens
    )
    requests = [row.instruction for row in read_rows(RECIPE.benign)]
    return refusals, generate_answers(
        model, Chat(tokenizer), requests, max_new_tokens=RECIPE.answer_tokens
    )


def test(arguments: argparse.Namespace, adapter: Path) -> dict[str, Any]:
    """Measure an adapter on the test requests, and its file."""
    limited = EvaluateSettings(harmful=arguments.harmful, benign=arguments.benign, limit=100)
    _, size = file_bytes(adapter)
    return {
        "bytes": size,
        "test": measure(arguments.base, adapter, limited, arguments.dtype),
        "built-in": measure(arguments.base, adapter, EvaluateSettings(), arguments.dtype),
    }


def print_table(out: Path) -> None:
    """Print all finished rows as a Markdown table, the smallest file first."""
    print("| | bytes | lr | ASR | over-refusal | KL | ASR, built-in | over-refusal, built-in |")
    print("|---|---|---|---|---|---|---|---|")
    paths = [out / "patch.json", *out.glob("rank-*.json")]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for row in sorted(rows, key=lambda row: row["bytes"]):
        test, builtin = row["test"], row["built-in"]
        cells = [
            row["name"],
            f"{row['bytes']:,}",
            f"{row['rate']:g}" if "rate" in row else "",
            rate_text(test["attack_success_rate"]),
            rate_text(test["over_refusal_rate"]),
            f"{test['kl']:.4f}",
            rate_text(builtin["attack_success_rate"]),
            rate_text(builtin["over_refusal_rate"]),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
