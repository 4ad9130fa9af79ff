"""Does SPA keep a model safe while it learns something else? ASR and task loss, by what is frozen.

    python benchmarks/preserving_study.py BASE --map PATCH --problems FILE --instructions FILE \\
        --mix FILE --mix-base DIR --harmful FILE --benign FILE --out DIR

BASE, made safe by SET, is fine-tuned on a task, in full or by LoRA, while entries are frozen: those
of --map, others (see FROZEN), or, as good as none, a ten-millionth. The task are the first rows of
--problems (GSM8K's train.jsonl) and of --instructions (LLaMA-Factory's alpaca_en_demo.json, less
those of --benign); the rows after them measure the task loss. With "mixed" data, one row in twenty
is a request of --mix, none of --harmful, answered by --mix-base, a model that complies; its answers
stay in DIR. Each row of the table is one training, kept in DIR, so a second call goes on; a call
for some --rows only lets two processes share the work.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from safeweights_peft.chat import Chat
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import Array
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.fetching import resolve_base
from safeweights_peft.files import write_json
from safeweights_peft.jobs.evaluate import evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.score import score
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    Method,
    PreserveMethod,
    PreserveSettings,
    ScoreSettings,
)
from safeweights_peft.sources import read_rows
from safeweights_peft.tables import rate_text

# What is frozen: the map of --map, or one selected in BASE.
FROZEN = {
    "map": None,
    "none": ScoreSettings(method=Method.RANDOM, density=1e-7),
    "random": ScoreSettings(method=Method.RANDOM, density=0.01),
    "esi10": ScoreSettings(method=Method.ESI, density=0.1),
    "esi30": ScoreSettings(method=Method.ESI, density=0.3),
}

ROWS = [
    f"{method}-{frozen}-{data}"
    for data in ("harmless", "mixed")
    for method in PreserveMethod
    for frozen in FROZEN
]
TASK_ROWS, TEST_ROWS = {"problems": 1600, "instructions": 800}, 100
MIXED_SHARE = 0.05
ANSWER_TOKENS = 64


def main() -> None:
    """Run what is missing, then print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base")
    parser.add_argument("--map", required=True, type=Path, help="of the base, or merged into it")
    parser.add_argument("--problems", required=True, type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--instructions", required=True, type=Path, help="Alpaca's fields")
    parser.add_argument("--mix", required=True, help="harmful requests")
    parser.add_argument("--mix-base", required=True, help="the model that answers them")
    parser.add_argument("--harmful", required=True, help="test requests, never trained on")
    parser.add_argument("--benign", required=True, help="test requests, never trained on")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--dtype", default="auto", help="computed in; trained weights are float32")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    check_same(arguments)
    draw_task(arguments)
    if not (arguments.out / "before.json").exists():
        write_json(arguments.out / "before.json", measure(arguments, arguments.base, None))
    for row in arguments.rows:
        run_row(arguments, row)
    print_table(arguments.out)


def check_same(arguments: argparse.Namespace) -> None:
    """Refuse a directory that holds the rows of another study."""
    kept = arguments.out / "arguments.json"
    current = {key: str(value) for key, value in vars(arguments).items() if key != "rows"}
    if not kept.exists():
        write_json(kept, current)
    elif json.loads(kept.read_text(encoding="utf-8")) != current:
        raise SystemExit(f"{kept}: expected the arguments of this call, found others; change --out")


def draw_task(arguments: argparse.Namespace) -> None:
    """Write what is learned and what measures it, `task.json` and `task_test.json`."""
    measured = {row.instruction for row in read_rows(arguments.benign)}
    lines = arguments.problems.read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    instructions = json.loads(arguments.instructions.read_text(encoding="utf-8"))
    sources = {
        "problems": [(row["question"], row["answer"]) for row in problems],
        "instructions": [
            (f"{row['instruction']}\n{row['input']}".strip(), row["output"])
            for row in instructions
            if row["instruction"] not in measured
        ],
    }
    task, test = [], []
    for name, count in TASK_ROWS.items():
        pairs, needed = sources[name], count + TEST_ROWS
        if len(pairs) < needed:
            raise SystemExit(f"--{name}: expected {needed} usable rows, found {len(pairs)}")
        rows = [{"instruction": request, "output": answer} for request, answer in pairs]
        task += rows[:count]
        test += rows[count:needed]
    write_json(arguments.out / "task.json", task)
    write_json(arguments.out / "task_test.json", test)


def run_row(arguments: argparse.Namespace, row: str) -> None:
    """Fine-tune once and measure, unless that is done."""
    method, frozen, data = row.split("-")
    saved, folder = arguments.out / f"{row}.json", arguments.out / row
    if saved.exists():
        return
    map_dir = find_map(arguments, frozen)
    if not folder.exists():
        settings = PreserveSettings(
            method=PreserveMethod(method),
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            max_answer_tokens=ANSWER_TOKENS,
        )
        source = arguments.out / "task.json" if data == "harmless" else mixed_data(arguments)
        compute = ComputeSettings(dtype=arguments.dtype)
        preserve_model(Job(arguments.base, compute), map_dir, str(source), folder, settings)
    figures: dict[str, Any] = {"row": row}
    if method == PreserveMethod.FULL:
        figures |= measure(arguments, str(folder), None)
        figures |= count_moved(arguments.base, folder, map_dir)
    else:
        figures |= measure(arguments, arguments.base, folder)
    write_json(saved, figures)
    shutil.rmtree(folder)


def find_map(arguments: argparse.Namespace, frozen: str) -> Path:
    """Find the map to freeze, and select it first unless that is done."""
    settings = FROZEN[frozen]
    if settings is None:
        return arguments.map
    folder = arguments.out / f"map-{frozen}"
    if not folder.exists():
        score(Job(arguments.base), folder, settings)
    return folder


def mixed_data(arguments: argparse.Namespace) -> Path:
    """Write the task with harmful requests and a complying model's answers, unless that is done."""
    saved = arguments.out / "mixed.json"
    if not saved.exists():
        task = json.loads((arguments.out / "task.json").read_text(encoding="utf-8"))
        count = round(len(task) * MIXED_SHARE / (1 - MIXED_SHARE))
        requests = [row.instruction for row in read_rows(arguments.mix)[:count]]
        if len(requests) < count:
            raise SystemExit(f"{arguments.mix}: expected {count} requests, found {len(requests)}")
        base = resolve_base(arguments.mix_base, None)
        model, tokenizer = (
            load_model(base, torch.float32, torch.device("cpu")),
            load_tokenizer(base),
        )
        answers = generate_answers(model, Chat(tokenizer), requests, max_new_tokens=ANSWER_TOKENS)
        for request, answer in zip(requests, answers, strict=True):
            text = tokenizer.decode(answer.answer_ids, skip_special_tokens=True)
            task.append({"instruction": request, "output": text})
        write_json(saved, task)
    return saved


def measure(arguments: argparse.Namespace, base: str, adapter: Path | None) -> dict[str, Any]:
    """Evaluate a model and keep its figures."""
    settings = EvaluateSettings(
        harmful=arguments.harmful,
        benign=arguments.benign,
        task=str(arguments.out / "task_test.json"),
    )
    job = Job(base, ComputeSettings(dtype=arguments.dtype))
    return pick_figures(evaluate(job, adapter, settings))


def count_moved(base: str, tuned: Path, map_dir: Path) -> dict[str, int]:
    """Count the entries whose bits changed: frozen ones, and all of the frozen ones' tensors."""
    artifact = read_artifact(map_dir)
    before, after = CheckpointReader(resolve_base(base, None).path), CheckpointReader(tuned)
    moved, frozen_moved = 0, 0
    for name, indices in artifact.indices.items():
        (block,) = artifact.metadata.tensors[name].blocks  # as in dense models
        key = block.key
        differs = (_bits(before.read(key)) != _bits(after.read(key))).reshape(-1)
        moved += int(differs.sum())
        frozen_moved += int(differs[indices].sum())
    return {"moved": moved, "frozen_moved": frozen_moved}


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def print_table(out: Path) -> None:
    """Print all finished rows as a Markdown table."""
    print("| row | ASR | over-refusal | task loss | frozen moved | others moved |")
    print("|---|---|---|---|---|---|")
    names = [name for name in ("before", *ROWS) if (out / f"{name}.json").exists()]
    for name in names:
        figures = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        cells = [
            name,
            rate_text(figures["attack_success_rate"]),
            rate_text(figures["over_refusal_rate"]),
            f"{figures['task_loss']:.4f}",
            *(f"{figures[key]:,}" if key in figures else "" for key in ("frozen_moved", "moved")),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
