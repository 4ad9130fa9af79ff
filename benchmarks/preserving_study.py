"""What keeps a model safe while it learns something else? ASR, over-refusal and task loss, by row.

    python benchmarks/preserving_study.py BASE --patch PATCH --deep DIR --problems FILE \\
        --instructions FILE --mix FILE --harmful FILE --benign FILE --out DIR [--device cuda]

Two start models are fine-tuned on a task, in full or by LoRA: "patch", BASE with PATCH merged, and
"deep", all of whose weights learned to refuse (`safer_start.py` makes it). A row freezes the safety
weights ("frozen": the patch's, or 1 % by ESI), others, or as good as none ("nothing"); holds the
model's own answers ("anchor"); trains on rows of which one in twenty is harmful ("mixed"), on raw
text ("raw"), or with the weights in bfloat16 ("bf16"); or changes what "nothing" trained: repairs
it ("repair-30", by 30 steps), puts the safety weights back ("protect"), or adds a part of what made
the start model safe ("add-0.5"). "time" is what a step takes with an anchor, to one without.

The task are the first rows of --problems (GSM8K's train.jsonl) and of --instructions (LLaMA-
Factory's alpaca_en_demo.json, less those of --benign); the rows after them measure the task loss.
Harmful rows are requests of --mix, none of --harmful, answered by --mix-base, a model that
complies; its answers stay in DIR. What is done is kept in DIR, a JSON a row, named by all that its
figures depend on: a second call goes on, and two calls for other --rows can share the work. The
model that "nothing" trained stays in DIR as well. --tiny makes everything small, to see it run.
"""

import argparse
import fnmatch
import json
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from patch_figures import DRAWS, Estimate
from patch_study import print_row, rate_text, text
from preserving_rows import (
    MIXED_FRACTION,
    ROWS,
    TIMES,
    Data,
    Plan,
    Start,
    Study,
    digest_files,
    short_digest,
    write_rows,
)
from transformers.utils import logging

from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.merge import merge
from safeweights_peft.rates import wilson_interval
from safeweights_peft.settings import ComputeSettings
from safeweights_peft.sources import Row, data_digest, read_rows

TINY_ROWS = 4  # asked, of each kind
STARTS = ("patch", "deep")
COMPARED: Sequence[tuple[str, str]] = (
    ("frozen", "nothing"),
    ("frozen", "random"),
    ("anchor-frozen", "anchor"),
    ("lora-frozen", "lora-nothing"),
    ("lora-anchor-frozen", "lora-anchor"),
    ("mixed-anchor-frozen", "mixed-anchor"),
)
"""Rows of which the table says what the first has over the second."""

Figures = Mapping[str, Any]


def main() -> None:
    """Run what is missing, then print the tables of what is there."""
    # PEFT asks transformers by an old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    logging.disable_progress_bar()
    arguments = parse_arguments()
    rows = find_rows(arguments.rows)
    plan = Plan.tiny(arguments.steps or 3) if arguments.tiny else Plan(arguments.steps or 1000)
    compute = ComputeSettings(device=arguments.device, dtype=arguments.dtype)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = read_data(arguments, plan, compute)
    studies = [Study(start, plan, data, arguments.out, compute) for start in find_starts(arguments)]
    for study in studies:
        for row in rows:
            study.run(row)
    for study in studies:
        print_tables(study)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base", help="before it was made safe")
    parser.add_argument("--patch", type=Path, help="of the base")
    parser.add_argument("--deep", type=Path, help="what safer_start.py made of the base")
    parser.add_argument("--problems", required=True, type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--instructions", required=True, type=Path, help="Alpaca's fields")
    parser.add_argument("--mix", required=True, help="harmful requests")
    parser.add_argument("--mix-base", help="the model that answers them (default: the base)")
    parser.add_argument("--harmful", required=True, help="test requests, never trained on")
    parser.add_argument("--benign", required=True, help="test requests, never trained on")
    parser.add_argument("--harmful-rows", type=int, help="the first N (default: all)")
    parser.add_argument("--benign-rows", type=int, default=200, help="the first N (default: 200)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--start", nargs="+", choices=STARTS, help="default: those given")
    parser.add_argument(
        "--rows", default=",".join(ROWS), metavar="NAME,...", help="names or patterns"
    )
    parser.add_argument("--steps", type=int, help="of each training (default: 1000)")
    parser.add_argument("--tiny", action="store_true", help="to see whether everything runs")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="auto", help="computed in; trained weights are float32")
    return parser.parse_args()


def find_rows(names: str) -> list[str]:
    """Find the rows that names and patterns mean, after the one that all compare with."""
    found = {"before": None}
    for pattern in names.split(","):
        matching = fnmatch.filter(ROWS, pattern)
        if not matching:
            raise SystemExit(f"--rows: expected some of {', '.join(ROWS)}, found {pattern}")
        found |= dict.fromkeys(matching)
    return list(found)


def find_starts(arguments: argparse.Namespace) -> list[Start]:
    """Find the start models, and merge the patch unless that is done."""
    base = resolve_base(arguments.base, None).path
    wanted = arguments.start or [name for name in STARTS if getattr(arguments, name)]
    if not wanted or not all(getattr(arguments, name) for name in wanted):
        raise SystemExit("--start: expected --patch or --deep with it, found none; give them")
    starts = []
    for name in wanted:
        if name == "deep":
            starts.append(Start(name, arguments.deep, base))
            continue
        identity = {"base": digest_files(base), "patch": digest_files(arguments.patch)}
        merged = arguments.out / name / f"start-{short_digest(identity)}"
        if not merged.exists():
            merged.parent.mkdir(exist_ok=True)
            merge(base, [arguments.patch], merged)
        starts.append(Start(name, merged, base, arguments.patch))
    return starts


def read_data(arguments: argparse.Namespace, plan: Plan, compute: ComputeSettings) -> Data:
    """Read what is learned, and what measures it."""
    harmful, benign = read_rows(arguments.harmful), read_rows(arguments.benign)
    measured = {row.instruction for row in (*harmful, *benign)}
    harmful = harmful[: TINY_ROWS if arguments.tiny else arguments.harmful_rows]
    benign = benign[: TINY_ROWS if arguments.tiny else arguments.benign_rows]
    lines = arguments.problems.read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines]
    instructions = json.loads(arguments.instructions.read_text(encoding="utf-8"))
    sources = {
        "problems": [Row(row["question"], row["answer"]) for row in problems],
        "instructions": [
            Row(f"{row['instruction']}\n{row.get('input', '')}".strip(), row["output"])
            for row in instructions
            if row["instruction"] not in measured
        ],
    }
    task: list[Row] = []
    tests: list[Row] = []
    for name, rows in sources.items():
        count = getattr(plan, name)
        needed = count + plan.tests
        if len(rows) < needed:
            raise SystemExit(f"--{name}: expected {needed} usable rows, found {len(rows)}")
        task += rows[:count]
        tests += rows[count:needed]
    mix = [row for row in read_rows(arguments.mix) if row.instruction not in measured]
    count = math.ceil(len(task) * MIXED_FRACTION / (1 - MIXED_FRACTION))
    if len(mix) < count:
        raise SystemExit(f"--mix: expected {count} requests not measured on, found {len(mix)}")
    base = resolve_base(arguments.mix_base or arguments.base, None).path
    identity = [data_digest(task), data_digest(mix[:count]), digest_files(base), plan.answer_tokens]
    mixed_id = short_digest(identity)
    path = arguments.out / f"mixed-{mixed_id}.json"
    mixed = partial(mix_rows, path, task, mix[:count], Job(base, compute), plan.answer_tokens)
    return Data(task, tests, harmful, benign, mixed, mixed_id)


def mix_rows(path: Path, task: list[Row], mix: list[Row], job: Job, tokens: int) -> list[Row]:
    """Add harmful requests with a complying model's answers to a task, unless that is done."""
    if not path.exists():
        answers = job.ask("the complying model", mix, tokens)
        job.take_model()  # its memory is another's now
        answered = [
            Row(row.instruction, text_of)
            for row, answer in zip(mix, answers, strict=True)
            # Nothing can be learned from an empty one.
            if (text_of := job.read(answer).strip())
        ]
        write_rows(path, [*task, *answered])
    return read_rows(str(path), needs_output=True)


# --- tables ---


def count_rate(bits: str, counted: str) -> Estimate:
    """Compute a rate with its interval of Wilson."""
    rate = bits.count(counted) / len(bits)
    return Estimate(rate, *wilson_interval(rate, len(bits)), np.empty(0))


def compare_rates(first: str, second: str, counted: str) -> Estimate:
    """Compute the difference of two rates of the same requests, with Newcombe's interval."""
    # Method 10 of Newcombe (1998): from both intervals of Wilson and how the two go together.
    one, other = (np.array([bit == counted for bit in bits]) for bits in (first, second))
    n, (p, q) = len(one), (float(one.mean()), float(other.mean()))
    (low_p, high_p), (low_q, high_q) = wilson_interval(p, n), wilson_interval(q, n)
    product = float((one & other).sum() * (~one & ~other).sum())
    product -= float((one & ~other).sum() * (~one & other).sum())
    spread = n * n * math.sqrt(p * (1 - p) * q * (1 - q))
    if product > 0:
        product = max(product - n / 2, 0.0)
    phi = product / spread if spread else 0.0

    def combine(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    low = p - q - combine(p - low_p, high_q - q)
    return Estimate(p - q, low, p - q + combine(high_p - p, q - low_q), np.empty(0))


def find_loss(figures: Figures) -> Estimate:
    """Compute the task loss per token, with an interval of bootstrap draws of answers."""
    losses, tokens = np.array(figures["losses"]), np.array(figures["tokens"])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(DRAWS, len(tokens)))
    draws = losses[drawn].sum(1) / tokens[drawn].sum(1)  # the same answers for all rows
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(losses.sum() / tokens.sum()), float(low), float(high), draws)


def compare_losses(first: Figures, second: Figures) -> Estimate:
    """Compute by which fraction one row's task loss is above another's."""
    one, other = find_loss(first), find_loss(second)
    draws = one.draws / other.draws - 1
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(one.value / other.value - 1, float(low), float(high), draws)


def print_tables(study: Study) -> None:
    """Print all finished rows of a start model, and what some have over others."""
    found = {
        row: json.loads(path.read_text(encoding="utf-8"))
        for row in ROWS
        if (path := study.find_path(row)).exists()
    }
    timed = {row: found.pop(row) for row in TIMES if row in found}
    print(f"\nStart model: {study.start.name}. In bold where the interval holds no equality.\n")
    titles = ["row", "ASR", "to before, points", "over-refusal", "to before, points"]
    titles += ["task loss", "to nothing kept", "garbage", "frozen that moved", "others"]
    print_row(titles)
    print_row(["---"] * len(titles))
    for row, figures in found.items():
        cells = [row]
        for kind, counted in (("harmful", "0"), ("benign", "1")):
            bits = figures["refused"][kind]
            cells.append(rate_text(count_rate(bits, counted)))
            cells.append(
                ""
                if row == "before"
                else write_points(bits, found["before"]["refused"][kind], counted)
            )
        cells.append(text(find_loss(figures), "{:.3f}"))
        is_last = row in ("before", "nothing") or "nothing" not in found
        cells.append("" if is_last else write_loss(figures, found["nothing"]))
        cells.append(str(figures["invalid"]))
        if "frozen" in figures:
            moved = figures["frozen_moved"]
            cells += [f"{moved:,} of {figures['frozen']:,}", f"{figures['moved'] - moved:,}"]
        else:
            cells += ["", ""]
        print_row(cells)
    pairs = [pair for pair in COMPARED if {*pair} <= found.keys()]
    if pairs:
        print()
    for first, second in pairs:
        one, other = found[first], found[second]
        asr, refused = (
            write_points(one["refused"][kind], other["refused"][kind], counted)
            for kind, counted in (("harmful", "0"), ("benign", "1"))
        )
        print(
            f"- {first} against {second}: ASR {asr}, over-refusal {refused}, task loss "
            f"{write_loss(one, other)}"
        )
    if timed:
        print_times(timed)


def print_times(timed: Mapping[str, Figures]) -> None:
    """Print what a step takes with an anchor and without."""
    print("\nMedian time per step, and of the ratios, with the least and the largest:\n")
    print_row(["row", "rows per step", "plain", "with anchor", "ratio"])
    print_row(["---"] * 5)
    for row, figures in timed.items():
        for size, times in figures["times"].items():
            ratios = times["ratios"]
            ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            seconds = [f"{1000 * times[key]:.0f} ms" for key in ("plain", "kept")]
            print_row([f"{row}, {figures['device']}", size, *seconds, ratio])


def write_points(first: str, second: str, counted: str) -> str:
    """Write how many points one rate is above another."""
    return text(compare_rates(first, second, counted), "{:+.1f}", factor=100, equal=0)


def write_loss(first: Figures, second: Figures) -> str:
    """Write how many per cent one row's task loss is above another's."""
    return text(compare_losses(first, second), "{:+.1f}", factor=100, equal=0) + " %"


if __name__ == "__main__":
    main()
