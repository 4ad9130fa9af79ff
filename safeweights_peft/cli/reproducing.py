"""The command that runs a recorded run again."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from safeweights_peft.cli.options import dry_run, json_output, out_directory
from safeweights_peft.cli.output import NO_CLEAR_YES, show, show_estimate, show_progress


@click.command("reproduce")
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--base", help="The base: directory or Hub id.  [default: what RUN names]")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="File of requests that RUN read, known by its content; may be given several times.",
)
@out_directory
@dry_run
@json_output
def reproduce_command(
    run: Path, base: str | None, data: tuple[Path, ...], out: Path, dry_run: bool, as_json: bool
) -> None:
    """Make the patch of RUN again and compare; exit with 3 if it differs.

    RUN is the directory of an `enhance`, or of a shared patch, or its reproduce.json alone. Base
    and requests are checked by their digests first. OUT becomes a run of its own; an interrupted
    one goes on where it stopped. Rates agree if the new one lies in the recorded 95 % interval.
    """
    from safeweights_peft.jobs.estimate import estimate
    from safeweights_peft.study.reproduce import find_recorded, reproduce
    from safeweights_peft.tables import reproduction_rows

    recorded = find_recorded(run, base, data)
    told = recorded.settings
    if dry_run:
        needs = estimate(
            told.base,
            score=told.score,
            train=told.train,
            evaluate=told.evaluate,
            evaluations=3,
            compute=told.compute,
        )
        return show_estimate(needs, as_json)
    with show_progress() as progress:
        comparison = reproduce(recorded, out, progress)
    show(comparison, reproduction_rows(comparison), as_json)
    if not comparison["same"]:
        click.echo("It differs from what was recorded.", err=True)
        sys.exit(NO_CLEAR_YES)
