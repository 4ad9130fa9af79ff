"""Hold the refusal judge to answers that people labelled, half by half and model by model.

    python benchmarks/judge_labels.py --labels FILE

FILE is JSON: a list of objects with an `answer`, its `model`, and a `label`: refused, partial or
complied. An answer is in the learning half if the last byte of its text's sha256 is even; the
judge's wordings were written with the learning half in sight, and the other half was kept for the
end. One text may stand for many answers ("I can't help with that."), so figures over distinct
texts are printed too.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safeweights_peft.evaluation.judges import Verdict, judge_opening
from safeweights_peft.rates import cohen_kappa, wilson

Row = dict[str, str]
EXPECTED = {"refused": Verdict.REFUSED, "complied": Verdict.COMPLIED}


def main() -> None:
    """Print the figures of both halves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--labels", required=True, type=Path)
    parser.add_argument("--half", choices=("learning", "other"), help="print one half alone")
    arguments = parser.parse_args()
    rows = json.loads(arguments.labels.read_text(encoding="utf-8"))
    for name in ("learning", "other"):
        if arguments.half in (None, name):
            half = [row for row in rows if find_half(row["answer"]) == name]
            print_half(f"{name} half", half)


def find_half(answer: str) -> str:
    """Tell which half an answer is in."""
    return "other" if hashlib.sha256(answer.encode()).digest()[-1] % 2 else "learning"


def print_half(title: str, rows: Sequence[Row]) -> None:
    """Print a half's figures: all answers, distinct texts, each model."""
    distinct = list({(row["answer"], row["label"]): row for row in rows}.values())
    print(
        f"{title}\n{'':<24}{'refusals missed':<30}{'false among complied':<30}{'kappa':<16}partial"
    )
    print_line("all answers", rows)
    print_line("distinct texts", distinct)
    for model in sorted({row["model"] for row in rows}):
        print_line(model, [row for row in rows if row["model"] == model])
    print()


def print_line(title: str, rows: Sequence[Row]) -> None:
    """Print one line of figures; partial refusals stand apart."""
    verdicts = [judge_opening("", row["answer"]) for row in rows]
    by_label = {
        label: [v for row, v in zip(rows, verdicts, strict=True) if row["label"] == label]
        for label in ("refused", "complied", "partial")
    }
    missed = sum(verdict is not Verdict.REFUSED for verdict in by_label["refused"])
    false = by_label["complied"].count(Verdict.REFUSED)
    pairs = [
        (EXPECTED[row["label"]], verdict)
        for row, verdict in zip(rows, verdicts, strict=True)
        if row["label"] in EXPECTED
    ]
    kappa = cohen_kappa([people for people, _ in pairs], [judge for _, judge in pairs])
    partial = f"{by_label['partial'].count(Verdict.REFUSED)} of {len(by_label['partial'])} refused"
    agreement = "none" if kappa is None else f"{kappa:.3f} (n {len(pairs)})"
    print(
        f"{title:<24}{rate_text(missed, len(by_label['refused'])):<30}"
        f"{rate_text(false, len(by_label['complied'])):<30}{agreement:<16}{partial}"
    )


def rate_text(count: int, n: int) -> str:
    """Write a rate with its Wilson interval and counts."""
    if not n:
        return "none to judge"
    rate = wilson(count, n)
    return f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}] ({count}/{n})"


if __name__ == "__main__":
    main()
