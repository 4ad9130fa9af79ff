"""The commands that read what is on disk already: maps, patches, checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from safeweights_peft.cli.options import (
    FiniteRange,
    adapter,
    dry_run,
    existing,
    json_output,
    new,
    out_directory,
    overwrite,
)
from safeweights_peft.cli.output import (
    merge_rows,
    percent,
    rows_of,
    show,
    show_adapter,
    show_overlap,
    show_progress,
)


class _Scaled(click.ParamType):
    """A patch's directory or Hub id, perhaps with a factor on its values: PATCH or PATCH@FACTOR."""

    name = "patch"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, float]:
        """Split at the last @, unless the whole names a directory, or a revision follows it."""
        path, at, factor = str(value).rpartition("@")
        of_hub = not Path(path).is_dir() and not _is_number(factor)
        if not at or Path(value).is_dir() or of_hub:
            return adapter.convert(value, param, ctx), 1.0
        return adapter.convert(path, param, ctx), FiniteRange().convert(factor, param, ctx)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@click.command("merge")
@click.argument("base")
@click.argument("adapters", metavar="ADAPTER[@SCALE]...", type=_Scaled(), nargs=-1, required=True)
@click.option("--out", type=new, help="Directory to be written.")
@click.option(
    "--in-place", is_flag=True, help="Change BASE itself; `safeweights unmerge` takes it back."
)
@click.option(
    "--on-overlap",
    type=click.Choice(["add", "error"]),
    default="add",
    show_default=True,
    help="Where patches change the same weights: add them up in the order given, or refuse.",
)
@click.option(
    "--revision", help="Commit, tag or branch of BASE on the Hub.  [default: what ADAPTER names]"
)
@overwrite
@dry_run
@json_output
def merge_command(
    base: str,
    adapters: tuple[tuple[Path, float], ...],
    out: Path | None,
    in_place: bool,
    on_overlap: Literal["add", "error"],
    revision: str | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge patches into BASE, as a new checkpoint or in place; needs no torch.

    BASE is a model's directory or Hub id. ADAPTER[@SCALE]... are one patch or several, each with a
    factor on its values if you want: patch@0.5. An interrupted merge in place is finished when
    called again, or undone by `safeweights unmerge`.
    """
    from safeweights_peft.merging.in_place import merge_in_place
    from safeweights_peft.merging.merge import merge, plan

    _check_place(base, out, in_place)
    found = find_base(base, adapters[0][0], revision)
    if dry_run:
        planned = plan(found, adapters, out, on_overlap=on_overlap)
        return show(planned, merge_rows(planned), as_json)
    with show_progress() as progress, progress.task("Merging", 100) as advance:
        if out is None:
            report = merge_in_place(found, adapters, on_overlap=on_overlap)
        else:
            report = merge(
                *(found, adapters, out),
                on_overlap=on_overlap,
                overwrite=overwrite,
                progress=percent(advance),
            )
    show(asdict(report), merge_rows(asdict(report)), as_json)


def _check_place(base: str, out: Path | None, in_place: bool) -> None:
    """Refuse two places for the result, or none, or one that is not here."""
    if (out is None) != in_place or (in_place and not Path(base).is_dir()):
        raise click.UsageError("Give --out, or --in-place and a directory.")


def find_base(base: str, adapter: Path, revision: str | None) -> Path:
    """Find a base's directory; of a Hub id, by default at the commit that the patch names."""
    if Path(base).is_dir() and revision is None:
        return Path(base)
    from safeweights_peft.fetching import resolve_base
    from safeweights_peft.patch.io import read_metadata

    made_for = read_metadata(adapter)
    if made_for.base_model_name_or_path == base:
        revision = revision or made_for.revision
    return resolve_base(base, revision).path


@click.command("unmerge")
@click.argument("directory", type=existing)
@json_output
def unmerge_command(directory: Path, as_json: bool) -> None:
    """Take what `merge --in-place` has merged into DIRECTORY back out, bit for bit."""
    from safeweights_peft.merging.in_place import unmerge

    report = asdict(unmerge(directory))
    show(report, rows_of(report), as_json)


@click.command("inspect")
@click.argument("adapter", type=adapter)
@json_output
def inspect_command(adapter: Path, as_json: bool) -> None:
    """Describe ADAPTER, a safety patch or map, from its headers; needs no torch."""
    from safeweights_peft.patch.io import inspect

    show_adapter(inspect(adapter), adapter, as_json)


@click.command("report")
@click.argument("map_dir", metavar="MAP", type=adapter)
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
    from safeweights_peft.study.report import report_map
    from safeweights_peft.tables import pattern_rows

    record = report_map(map_dir, out, base, overwrite=overwrite)
    show(record, pattern_rows(record), as_json)


@click.command("compare")
@click.argument("map_dir", metavar="MAP", type=adapter)
@click.argument("others", type=adapter, nargs=-1, required=True)
@json_output
def compare_command(map_dir: Path, others: tuple[Path, ...], as_json: bool) -> None:
    """Measure the overlap of MAP and OTHERS, safety maps or patches of one model.

    For every two: the weights that both have, IoU, and the IoU by chance: of random selections of
    the same sizes, from all tensors that are named or tensor by tensor. Needs no torch.
    """
    from safeweights_peft.study.compare import compare

    show_overlap(compare([map_dir, *others]), as_json)
