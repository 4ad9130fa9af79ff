"""Commands on patches as files: merge, unmerge, convert, export, diff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from safeweights_peft.cli import options, output
from safeweights_peft.progress import percent
from safeweights_peft.schema import Setting


def find_base_directory(base: str, adapters: Sequence[Path], revision: str | None = None) -> Path:
    """Find a base's directory, or fetch it from the Hub at the commit that the adapters name."""
    # Also the answer of find_base, but without the Hub's client, whose import takes longer.
    if Path(base).is_dir() and revision is None:
        return Path(base)
    from safeweights_peft.fetching import find_base

    return find_base(base, adapters, revision).path


@options.command("merge")
@options.base
@click.argument(
    "adapters",
    metavar="ADAPTER[@SCALE]...",
    type=options.PATCH,
    nargs=-1,
    required=True,
    help="Safety patches, each a directory or Hub id; @0.5 halves the values of one.",
)
@click.option("--out", type=options.NEW, help="Directory to write.")
@click.option("--in-place", is_flag=True, help="Change BASE itself; `unmerge` undoes it.")
@click.option(
    "--on-overlap",
    type=click.Choice(["add", "error"]),
    default="add",
    show_default=True,
    help="Where patches change the same weights: add them in the order given, or refuse.",
)
@click.option(
    "--revision",
    help="Branch, tag or commit of BASE on the Hub.  [default: the one that the patches name]",
)
@options.overwrite
@options.dry_run
def merge_command(
    base: str,
    adapters: tuple[tuple[Path, float], ...],
    out: Path | None,
    in_place: bool,
    on_overlap: Literal["add", "error"],
    revision: str | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Merge patches into BASE, without torch.

    Writes a new checkpoint to --out, or changes BASE with --in-place. If a merge in place is
    interrupted, call it again to finish it, or `safeweights unmerge` to undo it.
    """
    from safeweights_peft.merging.in_place import merge_in_place
    from safeweights_peft.merging.merge import merge, plan

    if (out is None) != in_place or (in_place and not Path(base).is_dir()):
        raise click.UsageError("Give --out, or --in-place and a directory.")
    directory = find_base_directory(base, [path for path, _ in adapters], revision)
    with output.show_progress() as progress, percent(progress, "Merge") as on_bytes:
        if dry_run:
            report = plan(directory, adapters, out, on_overlap=on_overlap)
        elif out is None:
            report = asdict(merge_in_place(directory, adapters, on_overlap=on_overlap))
            if report["was_merged"] and not click.get_current_context().meta["json"]:
                click.echo(f"{base}: already merged with these patches; nothing was changed")
                return
        else:
            done = merge(
                *(directory, adapters, out),
                on_overlap=on_overlap,
                overwrite=overwrite,
                progress=on_bytes,
            )
            report = asdict(done)
    output.show(report, output.merge_rows(report))


@options.command("unmerge")
@click.argument("directory", type=options.DIRECTORY, help="Model with patches merged in place.")
def unmerge_command(directory: Path) -> None:
    """Undo `merge --in-place` in DIRECTORY.

    Every bit is restored from the journal that the merge left in DIRECTORY.
    """
    from safeweights_peft.merging.in_place import unmerge

    report = asdict(unmerge(directory))
    output.show(report)


@options.command("convert")
@options.adapter
@click.option(
    "--encoding",
    type=click.Choice(["plain", "compact"]),
    required=True,
    help="plain: values as they are, and whole rows or columns by number, which readers of format "
    "1.0 and 1.1 refuse; compact: a quarter of the size, rows and columns too for readers of 1.1.",
)
@options.base_of_adapter
@options.out
@options.overwrite
def convert_command(
    adapter: Path, encoding: str, base: str | None, out: Path, overwrite: bool
) -> None:
    """Rewrite ADAPTER in another encoding, without torch.

    It stays the same adapter: same content id, and for a patch the same merged weights, bit for
    bit. A compact patch stores differences to its base's weights, so reading it needs the base. If
    ADAPTER names no base, or has a scale other than 1, its values are stored, which takes more
    space.
    """
    from safeweights_peft.merging.convert import convert
    from safeweights_peft.patch.io import read_metadata

    metadata = read_metadata(adapter)
    name = base or metadata.base_model_name_or_path
    needs_base = metadata.needs_base or (encoding == "compact" and metadata.may_need_base)
    directory = find_base_directory(name, [adapter]) if name and needs_base else None
    report = asdict(convert(adapter, encoding, out, directory, overwrite=overwrite))
    output.show(report)


@options.command("export")
@options.patch
@click.option(
    "--to",
    type=click.Choice(["supertuning", "lora"]),
    required=True,
    help="supertuning: PEFT's sparse method, exact in float32; lora: exact, for whole rows or "
    "columns. Linear layers only.",
)
@options.base_of_adapter
@options.out
@options.overwrite
def export_command(
    patch: tuple[Path, float], to: str, base: str | None, out: Path, overwrite: bool
) -> None:
    """Write a patch in a form that PEFT alone can load.

    To get a checkpoint, use `safeweights merge`.
    """
    from safeweights_peft.jobs.export import export_lora, export_supertuning

    adapter, scale = patch
    export = export_lora if to == "lora" else export_supertuning
    record = export(adapter, out, base, scale=scale, overwrite=overwrite)
    output.show(record)


@options.command("diff")
@options.base
@click.argument("tuned", help="Model of the same architecture: directory or Hub id.")
@options.option(
    Setting(
        "Fraction of all weights to keep: those that changed most.",
        flag="--density",
        kind=float,
        above=0,
        most=1,
        unset="all that changed",
    )
)
@options.safety_map(
    "Keep only the weights of this map of BASE: directory or Hub id.", required=False
)
@options.out
@options.overwrite
def diff_command(base: str, tuned: str, out: Path, **values: Any) -> None:
    """Store the change from BASE to TUNED as a safety patch.

    Merged into BASE, the patch gives the bits of TUNED; with --density or --map only some of them,
    and the report says how much of the change is lost. A change that no float32 value gives exactly
    is refused; --density 1 keeps every change, the nearest value of such ones, and counts them as
    lost.

    Tensors that only BASE has, and that transformers doesn't load, stay as they are; the result
    lists them.
    """
    from safeweights_peft.jobs.diff import diff
    from safeweights_peft.jobs.job import Job

    with output.show_progress() as progress:
        maps = [values["map_dir"]] if values["map_dir"] else []
        job = Job(base, progress=progress, adapters=maps)
        output.show(diff(job, tuned, out, **values))
