"""What commands print: results on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

NO_CLEAR_YES = 3
"""Exit code of a command that was asked a question, and its answer is not yes."""


class _Bars:
    """The pipeline's progress, shown by rich on stderr."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self._bars.add_task(description, total=total)
        yield lambda done: self._bars.advance(task, done)


@contextmanager
def show_progress() -> Iterator[_Bars]:
    """Show progress bars on stderr while the context lasts."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
    )
    _quiet_transformers()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)


def _quiet_transformers() -> None:
    """Keep transformers' own bars out of ours, where it is loaded at all."""
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        # PEFT 0.21 asks transformers for a name that it calls old; no user can help that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)


def percent(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    """Turn a bar of 100 units into a function of the bytes done and the bytes in all."""
    shown = 0

    def copied(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        advance(percent - shown)
        shown = percent

    return copied


def show(result: dict[str, Any], rows: Sequence[tuple[str, ...]], as_json: bool) -> None:
    """Print a result: as JSON, or its rows as a table."""
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(printable("  ".join(cells).rstrip()))


def printable(text: str) -> str:
    """Spell out what would move the cursor: names and paths may be a stranger's."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def rows_of(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lay out a flat result, with its sizes made readable."""
    from safeweights_peft.tables import size_text

    return [
        (name.removesuffix("_bytes"), size_text(value) if name.endswith("_bytes") else str(value))
        for name, value in result.items()
    ]


def merge_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lay out a merge or its plan: a line for each patch, and for every two that overlap."""
    rows = [
        (f"patch {number}", f"{each['adapter']} at scale {each['scale']:g}")
        for number, each in enumerate(result.get("patches", ()), 1)
    ]
    shared: dict[tuple[str, str], int] = {}
    for each in result["overlap"]:
        pair = each["left"], each["right"]
        shared[pair] = shared.get(pair, 0) + each["entries"]
    rows += [("overlap", f"{n:,} entries of {a} and {b}") for (a, b), n in shared.items()]
    return rows + rows_of({k: v for k, v in result.items() if k not in ("patches", "overlap")})


def show_estimate(needs: Any, as_json: bool) -> None:
    """Print what a job will need."""
    from dataclasses import asdict

    from safeweights_peft.tables import size_text

    rows = [
        ("parameters", f"{needs.parameters:,}"),
        ("memory", f"about {size_text(needs.memory_bytes)}"),
        ("patch", f"about {size_text(needs.patch_bytes)}"),
        *((f"time to {step}", f"about {s / 60:.1f} min") for step, s in needs.seconds.items()),
    ]
    show(asdict(needs), rows, as_json)


def show_adapter(content: dict[str, Any], path: Path, as_json: bool) -> None:
    """Print what an adapter's headers say."""
    from safeweights_peft.patch.records import Mode
    from safeweights_peft.tables import size_text

    rows = [
        ("path", str(path)),
        ("kind", f"{Mode(content['mode']).artifact}, format {content['format_version']}"),
        (
            "content id",
            content["content_id"] or "not in the headers; `safeweights verify` tells it",
        ),
        ("base", str(content["base_model_name_or_path"])),
        ("revision", str(content["revision"])),
        ("parameters", str(content["parameters"])),
        ("entries", f"{content['entries']:,} ({content['density']:.3%} of these parameters)"),
        ("size", size_text(content["size_bytes"])),
    ]
    show(content, rows, as_json)


def show_overlap(result: dict[str, Any], as_json: bool) -> None:
    """Print how much safety maps share; says on stderr if they name different bases."""
    from safeweights_peft.tables import overlap_rows

    show(result, overlap_rows(result), as_json)
    if not result["same_base"]:
        click.echo("Note: they name different bases, though no shape differs.", err=True)


def show_preserved(record: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print what a preserving job did, its losses summed up."""
    losses = record["losses"]
    summary = {"path": str(out), **record, "first_loss": losses[0], "last_loss": losses[-1]}
    del summary["losses"]
    rows = [
        ("path", str(out)),
        ("base", record["base"]["name"]),
        ("frozen", f"{record['frozen_entries']:,} entries of a {record['artifact']}"),
        ("steps", str(len(losses))),
        ("loss", f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last"),
    ]
    show(summary, rows, as_json)


def show_protected(record: dict[str, Any], as_json: bool) -> None:
    """Print what a protecting job put back, and what that did where it was measured."""
    from safeweights_peft.tables import judged_rows

    moved = (
        f"{record['changed']:,} of {record['entries']:,}, by {record['largest_change']:g} at most"
    )
    source = record["lora"] if "lora" in record else record["tuned"]
    rows: list[tuple[str, ...]] = [
        ("", "before", "after"),
        ("path", source, record["out_dir"]),
    ]
    rows.append(("weights put back", "0", moved))
    if "before" in record:
        rows += judged_rows(record["before"], record["after"])
    show(record, rows, as_json)


def show_probe(result: dict[str, Any], as_json: bool) -> None:
    """Print a probe's table, and under it the verdicts."""
    from safeweights_peft.tables import probe_rows, verdict_lines

    show(result, probe_rows(result), as_json)
    if not as_json:
        click.echo("\n" + "\n".join(verdict_lines(result)))


def show_run(result: dict[str, Any], out: Path, as_json: bool) -> None:
    """Draw and print a finished run, and say on stderr what can be done next."""
    from safeweights_peft.errors import ReportError
    from safeweights_peft.study.pictures import plot_run
    from safeweights_peft.tables import comparison_rows

    losses = json.loads((out / "patch" / "training.json").read_text(encoding="utf-8"))["losses"]
    try:
        plot_run(result, losses, out / "result.png")
    except ReportError as missing:
        click.echo(f"No result.png: {missing}", err=True)
    show(result, [("", "before", "after"), *comparison_rows(result)], as_json)
    click.echo(f"\nPatch in {out / 'patch'}. Next: safeweights merge, or in Python:", err=True)
    click.echo("  import safeweights_peft; from peft import PeftModel", err=True)
    click.echo(f"  model = PeftModel.from_pretrained(base, {str(out / 'patch')!r})", err=True)
