"""Does the selection matter? ESI against random and bottom entries of the same count, by density.

    python benchmarks/selection_study.py BASE --harmful FILE --benign FILE --out DIR

For each selection and density, the learning rate is the one among --rates that does best on
validation requests (the built-in evaluation set): the highest refusal rate minus twice the
over-refusal rate. That patch is then measured on the first 100 rows of the two test files. Rows are
kept in DIR, one directory each, so a second call goes on; a call for some --methods only lets two
processes share the work.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safeweights_peft.files import write_json
from safeweights_peft.jobs.evaluate import evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.train import train
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    Method,
    ScoreSettings,
    TrainSettings,
)
from safeweights_peft.tables import rate_text

METHODS = (Method.ESI, Method.RANDOM, Method.BOTTOM)
RECIPE = TrainSettings(
    refusal_tokens=8,
    answer_tokens=4,
    steps=100,
    retain_weight=14.0,
    harmful_batch_size=4,
    benign_batch_size=4,
    token_decay=0.7,
    shrink=0.0,
)
"""The same for all rows; fewer benign requests a step than the default, for time's sake."""


def main() -> None:
    """Run what is missing, then print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base")
    parser.add_argument("--harmful", required=True, help="test requests, never trained on")
    parser.add_argument("--benign", required=True, help="test requests, never trained on")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--densities", nargs="+", type=float, default=[0.0005, 0.002, 0.01])
    parser.add_argument("--methods", nargs="+", type=Method, default=[*METHODS])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3])
    parser.add_argument("--validation", type=int, default=50, help="validation requests of a kind")
    parser.add_argument("--dtype", default="auto", help="computed in; scores always in float32")
    arguments = parser.parse_args()
    for density in arguments.densities:
        for method in arguments.methods:
            run_row(arguments, method, density)
    print_table(arguments.out)


def run_row(arguments: argparse.Namespace, method: Method, density: float) -> None:
    """Select, train at each rate, choose by validation, test the chosen one."""
    row_dir = arguments.out / f"{method}-{density}"
    if (row_dir / "row.json").exists():
        return
    if not (row_dir / "map").exists():
        settings = ScoreSettings(density=density, method=method)
        score(Job(arguments.base), row_dir / "map", settings)
    validated = {rate: validate(arguments, row_dir, rate) for rate in arguments.rates}
    best = max(validated, key=lambda rate: merit(validated[rate]))
    test = measure(
        arguments.base,
        row_dir / f"patch-{best}",
        EvaluateSettings(harmful=arguments.harmful, benign=arguments.benign, limit=100),
        arguments.dtype,
    )
    validation = {str(rate): figures for rate, figures in validated.items()}
    row = {"method": method, "density": density, "rate": best, "validation": validation}
    write_json(row_dir / "row.json", row | {"test": test})


def validate(arguments: argparse.Namespace, row_dir: Path, rate: float) -> dict[str, Any]:
    """Train at one rate and measure on validation requests, unless both are done."""
    patch = row_dir / f"patch-{rate}"
    saved = row_dir / f"validation-{rate}.json"
    if not patch.exists():
        settings = replace(RECIPE, learning_rate=rate)
        job = Job(arguments.base, ComputeSettings(dtype=arguments.dtype))
        train(job, row_dir / "map", patch, settings)
    if not saved.exists():
        limit = EvaluateSettings(limit=arguments.validation)
        write_json(saved, measure(arguments.base, patch, limit, arguments.dtype))
    return json.loads(saved.read_text(encoding="utf-8"))


def measure(base: str, patch: Path, settings: EvaluateSettings, dtype: str) -> dict[str, Any]:
    """Evaluate a patch and keep its figures."""
    job = Job(base, ComputeSettings(dtype=dtype))
    return pick_figures(evaluate(job, patch, settings))


def merit(figures: dict[str, Any]) -> float:
    """Rank rates: an over-refusal weighs twice a refusal missed."""
    missed = figures["attack_success_rate"]["rate"]
    return -missed - 2 * figures["over_refusal_rate"]["rate"]


def print_table(out: Path) -> None:
    """Print all finished rows as a Markdown table."""
    print("| density | selection | lr | ASR | over-refusal | invalid | KL |")
    print("|---|---|---|---|---|---|---|")
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*/row.json")]
    for row in sorted(rows, key=lambda row: (row["density"], row["method"])):
        test = row["test"]
        cells = [
            f"{row['density']:.2%}",
            row["method"],
            f"{row['rate']:g}",
            rate_text(test["attack_success_rate"]),
            rate_text(test["over_refusal_rate"]),
            str(test["invalid"]),
            f"{test['kl']:.4f}",
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
