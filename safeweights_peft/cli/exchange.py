"""The commands that make patches of models, and other forms of patches."""

from __future__ import annotations

from pathlib import Path

import click

from safeweights_peft.cli.artifacts import find_base
from safeweights_peft.cli.options import FiniteRange, adapter, json_output, out_directory, overwrite
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
    "--map", "map_dir", type=adapter, help="Safety map of BASE; only its weights are kept."
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
    from safeweights_peft.jobs.diff import diff
    from safeweights_peft.jobs.job import Job

    with show_progress() as progress:
        job = Job(base, progress=progress)
        report = diff(job, tuned, out, density=density, map_dir=map_dir, overwrite=overwrite)
    show(report, rows_of(report), as_json)


@click.command("convert")
@click.argument("adapter", type=adapter)
@click.option(
    "--encoding",
    type=click.Choice(["plain", "compact"]),
    required=True,
    help="What every reader knows, or about a quarter of its bytes.",
)
@click.option("--base", help="Its base: directory or Hub id.  [default: what ADAPTER names]")
@out_directory
@overwrite
@json_output
def convert_command(
    adapter: Path, encoding: str, base: str | None, out: Path, overwrite: bool, as_json: bool
) -> None:
    """Write ADAPTER, a safety patch or map, again in another encoding; needs no torch.

    It stays the same adapter, with the same content id and, for a patch, the same merged weights
    bit for bit; both are checked. A compact patch holds the steps from its base's weights to the
    merged ones, so it needs its base. A base without a name, or a scale other than 1, makes it keep
    its values themselves, which takes more bytes.
    """
    from dataclasses import asdict

    from safeweights_peft.merging.convert import convert
    from safeweights_peft.patch.io import read_metadata

    metadata = read_metadata(adapter)
    named = base or metadata.base_model_name_or_path
    wanted = metadata.needs_base or (encoding == "compact" and metadata.may_need_base)
    found = find_base(named, adapter, None) if named and wanted else None
    report = asdict(convert(adapter, encoding, out, found, overwrite=overwrite))
    show(report, rows_of(report), as_json)


@click.command("export")
@click.argument("adapter", type=adapter)
@click.option(
    "--to",
    "form",
    type=click.Choice(["supertuning"]),
    required=True,
    help="PEFT's own sparse method.",
)
@click.option("--base", help="Its base: directory or Hub id.  [default: what ADAPTER names]")
@out_directory
@overwrite
@json_output
def export_command(
    adapter: Path, form: str, base: str | None, out: Path, overwrite: bool, as_json: bool
) -> None:
    """Write the patch ADAPTER in another form, for programs without this package.

    To supertuning: plain PEFT loads it; linear layers only, exact in float32. A checkpoint needs no
    export: `safeweights merge` writes one.
    """
    from safeweights_peft.jobs.export import export_supertuning

    record = export_supertuning(adapter, out, base, overwrite=overwrite)
    show(record, rows_of(record), as_json)
