"""The commands that share patches and maps on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from safeweights_peft.cli.options import existing, json_output, new, overwrite
from safeweights_peft.cli.output import printable, show


@click.command("push")
@click.argument("directory", type=existing)
@click.argument("repo")
@click.option("--base", help="Hub id of its base, for one made of a directory: ID[@REVISION].")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="Branch to push to.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--commit-message", help="First line of the commit.")
@json_output
def push_command(
    directory: Path,
    repo: str,
    base: str | None,
    private: bool,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    as_json: bool,
) -> None:
    """Push a patch or a map to the Hub, with card, results, map and pictures, in one commit.

    DIRECTORY is a run of `enhance`, or a patch or a map. REPO is USER/NAME; it is made if it isn't
    there. Nothing is sent that holds a local path or a token, or was measured on another patch. An
    interrupted push leaves REPO as it was; call it again.
    """
    from safeweights_peft.hub.push import push_to_hub

    pushed = push_to_hub(
        directory,
        repo,
        base=base,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=commit_message,
    )
    if pushed.pull_request:
        rows = [("pull request", pushed.pull_request)]
    else:
        rows = [("commit", pushed.commit if pushed.changed else f"{pushed.commit}, as it was")]
    rows = [
        ("repository", pushed.repo_id),
        *rows,
        ("base", f"{pushed.base} at {pushed.base_commit}"),
        *(("file", name) for name in pushed.files),
    ]
    show(asdict(pushed), rows, as_json)


@click.command("pull")
@click.argument("source", metavar="REPO")
@click.option("--out", type=new, help="Directory to be written.  [default: the Hub's cache]")
@overwrite
@json_output
def pull_command(source: str, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Fetch a patch or a map from the Hub, with card, results and map, and check it.

    REPO is USER/NAME, perhaps with @REVISION, a branch, tag or commit. Only files that belong to a
    patch are fetched.
    """
    from safeweights_peft.hub.pull import pull_from_hub

    pulled = pull_from_hub(source, out, overwrite=overwrite)
    rows = [
        ("path", pulled.path),
        ("repository", f"{pulled.repo_id} at {pulled.commit}"),
        ("kind", pulled.artifact),
        ("base", f"{pulled.base} at {pulled.base_commit}"),
    ]
    show(asdict(pulled), rows, as_json)
    for name in pulled.unsafe:
        click.echo(f"Not fetched: {printable(name)}, which can run code.", err=True)
    if pulled.base_moved_on:
        base, commit = printable(str(pulled.base)), printable(str(pulled.base_commit))
        click.echo(
            f"{base} has moved on: this was made for commit {commit}, its main branch is at "
            f"{pulled.base_latest}. The former is loaded unless you give another.",
            err=True,
        )


@click.command("list")
@click.option("--base", required=True, help="Hub id of the base.")
@json_output
def list_command(base: str, as_json: bool) -> None:
    """Find patches and maps for a base on the Hub, with the results that their cards tell."""
    from safeweights_peft.hub.pull import find_on_hub

    found = find_on_hub(base)
    rows = [("repository", "kind", "date", "result", "on", "value")]
    for each in found:
        about = (each.repo_id, each.artifact, each.date[:10])
        told = [(r.metric, r.dataset, _figure(r.value)) for r in each.results]
        rows += [(*about, *result) for result in told or [("none", "", "")]]
    show({"base": base, "found": [asdict(each) for each in found]}, rows, as_json)


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else value
