"""The commands that read what is on disk already: maps, patches, checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from safeweights_peft.cli.options import (
    FiniteRange,
    dry_run,
    existing,
    json_output,
    out_directory,
    overwrite,
)
from safeweights_peft.cli.output import (
    percent,
    rows_of,
    show,
    show_adapter,
    show_overlap,
    show_progress,
)

CHECK_FAILED = 3


@click.command("merge")
@click.argument("base", type=existing)
@click.argument("adapter", type=existing)
@out_directory
@click.option(
    "--scale",
    type=FiniteRange(),
    default=1.0,
    show_default=True,
    help="Factor on the patch's values.",
)
@overwrite
@dry_run
@json_output
def merge_command(
    base: Path,
    adapter: Path,
    out: Path,
    scale: float,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write BASE with the patch ADAPTER merged in, as a new checkpoint; needs no torch."""
    from dataclasses import asdict

    from safeweights_peft.merge import merge, plan

    if dry_run:
        planned = plan(base, adapter, out)
        return show(planned, rows_of(planned), as_json)
    with show_progress() as progress, progress.task("Copying the base", 100) as advance:
        report = merge(
            base, adapter, out, scale=scale, overwrite=overwrite, progress=percent(advance)
        )
    show(asdict(report), rows_of(asdict(report)), as_json)


@click.command("inspect")
@click.argument("adapter", type=existing)
@json_output
def inspect_command(adapter: Path, as_json: bool) -> None:
    """Describe ADAPTER, a safety patch or map, from its headers; needs no torch."""
    from safeweights_peft.format import inspect

    show_adapter(inspect(adapter), adapter, as_json)


@click.command("report")
@click.argument("map_dir", metavar="MAP", type=existing)
@click.option("--base", help="Its base: directory or Hub id.  [default: what MAP names]")
@out_directory
@overwrite
@json_output
def report_command(
    map_dir: Path, base: str | None, out: Path, overwrite: bool, as_json: bool
) -> None:
    """Show in which layers, components and experts the weights of MAP lie.

    MAP is a safety map or a safety patch; of its base only the config is read. OUT gets report.html
    with tables and pictures, the pictures by themselves, and all figures in report.json.
    """
    from safeweights_peft.pipeline import report_map
    from safeweights_peft.report import pattern_rows

    record = report_map(map_dir, out, base, overwrite=overwrite)
    show(record, pattern_rows(record), as_json)


@click.command("compare")
@click.argument("map_dir", metavar="MAP", type=existing)
@click.argument("others", type=existing, nargs=-1, required=True)
@json_output
def compare_command(map_dir: Path, others: tuple[Path, ...], as_json: bool) -> None:
    """Measure the overlap of MAP and OTHERS, safety maps or patches of one model.

    For every two: the weights that both have, IoU, and the IoU by chance: of random selections of
    the same sizes, from all tensors that are named or tensor by tensor. Needs no torch.
    """
    from safeweights_peft.overlap import compare

    show_overlap(compare([map_dir, *others]), as_json)


@click.command("verify")
@click.argument("adapter", type=existing)
@click.option("--base", type=existing, help="Checkpoint to be its base or merged.")
@json_output
def verify_command(adapter: Path, base: Path | None, as_json: bool) -> None:
    """Check ADAPTER by the rules of the format, and its fit to --base; exit with 3 if not."""
    from safeweights_peft.merge import verify

    report = verify(adapter, base)
    checks = [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in report.checks]
    rows = [(c.name, f"{'ok' if c.ok else 'FAILED'}: {c.detail}") for c in report.checks]
    show({"ok": report.ok, "checks": checks}, rows, as_json)
    if not report.ok:
        sys.exit(CHECK_FAILED)
