"""The commands that make patches of models, and other forms of patches."""

from __future__ import annotations

from pathlib import Path

import click

from safeweights_peft.cli.options import (
    FiniteRange,
    existing,
    json_output,
    out_directory,
    overwrite,
)
from safeweights_peft.cli.output import rows_of, show, show_progress


@click.command("diff")
@click.argument("base")
@click.argument("tuned")
@out_directory
@click.option(
    "--density",
    type=FiniteRange(0, 1, min_open=True),
    help="Share of all weights to keep: those that changed most.  [default: all that changed]",
)
@click.option(
    "--map", "map_dir", type=existing, help="Safety map of BASE; only its weights are kept."
)
@overwrite
@json_output
def diff_command(
    base: str,
    tuned: str,
    out: Path,
    density: float | None,
    map_dir: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the change from BASE to TUNED, models of one architecture, as a safety patch.

    Merged into BASE it gives the bits of TUNED: all of them, or with --density or --map those that
    are kept, and then it says what is lost. An entry that no float32 value leads to exactly is
    refused; with --density it gets the nearest, and counts as lost.
    """
    from dataclasses import asdict

    from safeweights_peft.pipeline import diff

    with show_progress() as progress:
        report = diff(
            *(base, tuned, out),
            density=density,
            map_dir=map_dir,
            progress=progress,
            overwrite=overwrite,
        )
    show(asdict(report), rows_of(asdict(report)), as_json)
