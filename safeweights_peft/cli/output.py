"""What commands print: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import click

from safeweights_peft.errors import ReportError
from safeweights_peft.progress import LineProgress, RichProgress
from safeweights_peft.rates import Outcome
from safeweights_peft.settings import ComputeSettings
from safeweights_peft.tables import (
    chat_rows,
    field_rows,
    judged_rows,
    lay_out,
    short_digest,
    size_text,
)

COLUMNS = 80

INCONCLUSIVE = 3
"""Exit code of a command whose answer is neither yes nor an error, or that missed a threshold."""


def show_progress() -> RichProgress | LineProgress:
    """Show progress on stderr while the context lasts: bars on a terminal, lines in a log."""
    _quiet_transformers()
    return RichProgress() if _is_terminal(sys.stderr) else LineProgress()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None where a shell closed it, as by `>&-`


def _quiet_transformers() -> None:
    """Keep transformers' own bars out of ours."""
    # Not imported for that: what needs no torch shows progress too.
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        set_verbosity_error()  # what it warns of, such as missing tensors, is refused in one line
        # PEFT 0.21 asks transformers for a name that it calls old; no user can help that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def show(result: Mapping[str, Any], *tables: Sequence[tuple[str, ...]]) -> None:
    """Print a result: as JSON, or as tables of rows, by default one of all fields."""
    if click.get_current_context().meta["json"]:
        click.echo(json.dumps(result, indent=2))
        return
    for place, rows in enumerate(filter(None, tables or [field_rows(result)])):
        if place:
            click.echo()
        cells = [tuple(printable(cell).replace("\n", r"\n") for cell in row) for row in rows]
        click.echo("\n".join(lay_out(cells, _terminal_width())))


def _terminal_width() -> int | None:
    """Return the width of the terminal; None where stdout is piped, into a file or a program."""
    # There a row stays one line, for `grep` and `cut`, unless COLUMNS asks for a width.
    if not _is_terminal(sys.stdout) and not os.environ.get("COLUMNS"):
        return None
    return shutil.get_terminal_size().columns


def show_answers(answers: Mapping[str, Any]) -> None:
    """Print how some answers begin, before and after, side by side; nothing with --json."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if click.get_current_context().meta["json"] or not any(answers.values()):
        return
    # Wrapped, never cut; as wide on every terminal that has the room, and in a file.
    console = Console(file=sys.stdout, width=min(COLUMNS, _terminal_width() or COLUMNS))
    for kind, title in (("harmful", "Harmful requests"), ("benign", "Harmless requests")):
        table = Table(title=title, title_justify="left", show_lines=True, expand=True)
        for heading in ("request", "before", "after"):
            table.add_column(heading, ratio=1, overflow="fold")
        for sample in answers[kind]:
            cells = [sample["request"]]
            cells += [
                f"[{sample[s]['verdict']}] {sample[s]['answer']}" for s in ("before", "after")
            ]
            table.add_row(*(Text(printable(cell)) for cell in cells))
        if answers[kind]:
            console.print(table)


def show_outcome(outcome: Outcome) -> None:
    """Print in a line what figures say together."""
    click.echo(f"\n{outcome.word.capitalize()}: {outcome.reason}.", err=True)


def draw(plot: Callable[..., None], *arguments: Any) -> None:
    """Draw a picture of a finished job, or say why there is none."""
    try:
        plot(*arguments)
    except ReportError as missing:  # the picture's library is an extra; the job is done without
        click.echo(f"No {arguments[-1].name}: {missing}", err=True)


def printable(text: str) -> str:
    """Spell out what would move the cursor: names and paths may be a stranger's."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def merge_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lay out a merge or its plan: a line for each patch, and for every two that overlap."""
    rows: list[tuple[str, ...]] = [
        (f"patch {number}", f"{patch['adapter']} at scale {patch['scale']:g}")
        for number, patch in enumerate(result.get("patches", ()), 1)
    ]
    shared: Counter[tuple[str, str]] = Counter()
    for overlap in result["overlap"]:  # one a tensor
        shared[overlap["left"], overlap["right"]] += overlap["entries"]
    rows += [("overlap", f"{n:,} entries of {a} and {b}") for (a, b), n in shared.items()]
    others = ("patches", "overlap", "was_merged")
    return rows + field_rows({k: v for k, v in result.items() if k not in others})


def kept_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lay out what stayed while a model was fine-tuned, and how well."""
    rows = []
    if record["frozen_entries"]:
        rows = [("frozen", f"{record['frozen_entries']:,} entries of a {record['artifact']}")]
    if anchor := record["anchor"]:
        last = record["drift"][-1]
        rows += [
            ("held", f"{anchor['refusals']:,} refusals, {anchor['answers']:,} benign answers"),
            ("drift", f"{last['drifted']:.1%} of them begin otherwise than before"),
        ]
    return rows


def show_estimate(base: str, compute: ComputeSettings, **steps: Any) -> None:
    """Print what the steps of a job will need."""
    from safeweights_peft.jobs.estimate import estimate
    from safeweights_peft.jobs.job import Job

    needs = estimate(Job(base, compute), **steps)
    rows = [
        ("parameters", f"{needs.parameters:,}"),
        ("memory", f"about {size_text(needs.memory_bytes)}"),
        *([("patch", f"about {size_text(needs.patch_bytes)}")] if needs.patch_bytes else []),
    ]
    show(asdict(needs), rows)


def show_adapter(content: dict[str, Any], path: Path) -> None:
    """Print what an adapter's headers say."""
    from safeweights_peft.patch.metadata import read_chat
    from safeweights_peft.patch.records import Mode

    unknown = "not in the headers; `safeweights verify` computes it"
    mode = Mode(content["mode"])
    encodings = sorted({tensor["encoding"] for tensor in content["tensors"].values()})
    total = content["selection"].get("total_parameters")
    share = content["entries"] / total if isinstance(total, int) and total else content["density"]
    whole = "the model" if share != content["density"] else "these tensors"
    rows = [
        ("path", str(path)),
        ("kind", f"{mode.artifact}, format {content['format_version']}"),
        ("encoding", f"{' and '.join(encodings)}, {mode.content} in {content['values_dtype']}"),
        ("content id", short_digest(content["content_id"] or unknown)),
        ("base", str(content["base_model_name_or_path"])),
        *([("revision", str(content["revision"]))] if content["revision"] else []),
        ("weights", f"{content['entries']:,} in {content['parameters']} tensors"),
        *_find_lines(content),
        ("share", f"{share:.3%} of {whole}"),
        *([("scale", f"{content['scale']:g}")] if content["scale"] != 1 else []),
        *chat_rows(read_chat(content["selection"])),
        ("size", size_text(content["size_bytes"])),
        *_find_figures(content, path),
    ]
    show(content, rows)


def _find_lines(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lay out the whole rows and columns, where headers tell of any."""
    found = [(f"whole {kind}", f"{content[kind]:,}") for kind in ("rows", "columns")]
    granularity = content["selection"].get("granularity")
    is_coded = any(tensor["encoding"] == "compact" for tensor in content["tensors"].values())
    if is_coded and granularity in ("row", "column", "auto"):
        return [
            ("whole rows or columns", "not in compact headers; `safeweights report` counts them")
        ]
    return [row for row in found if row[1] != "0"]


def _find_figures(content: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    """Find what a run measured of its patch, which lies in the run's directory."""
    from safeweights_peft.errors import DataError
    from safeweights_peft.files import read_json

    source = path.absolute().parent / "result.json"
    result = read_json(source, DataError) if source.is_file() else {}
    if result.get("content_id") != content["content_id"] or "after" not in result:
        return []
    rates = judged_rows(result["before"], result["after"])[:2]
    return [(title, f"{before} -> {after}") for title, before, after in rates]
