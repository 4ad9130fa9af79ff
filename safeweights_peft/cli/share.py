"""Commands that share adapters on the Hub, and those that say whether to trust one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from safeweights_peft.cli import options, output
from safeweights_peft.cli.use import find_base_directory
from safeweights_peft.errors import HubError, SafeWeightsError
from safeweights_peft.progress import percent
from safeweights_peft.tables import short_digest

_EXIT_CODES = {"verified": 0, "failed": 1, "unreadable": 2, "unknown": output.INCONCLUSIVE}
_WORDS = {"verified": "ok", "failed": "FAILED", "unreadable": "UNREADABLE", "unknown": "UNKNOWN"}


@options.command("push", resumes=True)
@click.argument("directory", type=options.DIRECTORY, help="Run of `enhance`, patch or map.")
@click.argument("repo", help="Repository on the Hub, USER/NAME; it is created if missing.")
@click.option("--base", help="Hub id[@REVISION] of the base, if DIRECTORY names a local one.")
@click.option("--public", is_flag=True, help="Let anyone see a new repository; else it is private.")
@click.option("--revision", help="Branch to push to.  [default: main]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--commit-message", "message", help="First line of the commit message.")
@click.option("--dry-run", is_flag=True, help="Write the card, list the files, push nothing.")
def push_command(directory: Path, repo: str, **values: Any) -> None:
    """Push a patch or map to the Hub, with its results.

    Card, results, map and pictures go in one commit. Files that hold a local path or a token, and
    results of another patch, are refused. An interrupted push leaves REPO as it was; call it again.
    """
    from safeweights_peft.hub.push import push_to_hub

    pushed = push_to_hub(directory, repo, **values)
    done = ("commit", f"{pushed.commit}" if pushed.changed else f"{pushed.commit}, as it was")
    if pushed.pull_request:
        done = ("pull request", pushed.pull_request)
    rows = [
        ("repository", pushed.url),
        ("not pushed; look at", f"{pushed.draft}/README.md") if pushed.draft else done,
        ("base", f"{pushed.base} at {pushed.base_commit}"),
        *(("file", name) for name in pushed.files),
    ]
    output.show(asdict(pushed), rows)


@options.command("pull")
@click.argument("repo", help="Repository on the Hub, USER/NAME, or USER/NAME@REVISION.")
@click.option("--out", type=options.NEW, help="Directory to write.  [default: the Hub's cache]")
@options.overwrite
def pull_command(repo: str, out: Path | None, overwrite: bool) -> None:
    """Fetch a patch or map from the Hub, and check it.

    Card, results and map come along; files that don't belong to a patch are left out.
    """
    from safeweights_peft.hub.pull import pull_from_hub

    pulled = pull_from_hub(repo, out, overwrite=overwrite)
    rows = [
        ("path", pulled.path),
        ("repository", f"{pulled.repo_id} at {pulled.commit}"),
        ("kind", pulled.artifact),
        ("base", f"{pulled.base} at {pulled.base_commit}"),
    ]
    output.show(asdict(pulled), rows)
    for name in pulled.unsafe:
        click.echo(f"Not fetched: {output.printable(name)}, which can run code.", err=True)
    if pulled.base_moved_on:
        base, commit = output.printable(str(pulled.base)), output.printable(str(pulled.base_commit))
        click.echo(
            f"{base} has moved on: this was made for commit {commit}, its main branch is at "
            f"{pulled.base_latest}. The former is loaded unless you give another.",
            err=True,
        )


@options.command("list")
@click.option("--base", required=True, help="Hub id of the base model.")
def list_command(base: str) -> None:
    """List patches and maps for a base on the Hub, with results.

    The results are what their cards claim.
    """
    from safeweights_peft.hub.pull import find_on_hub

    if Path(base).is_dir():  # its name is no business of the Hub's
        raise HubError(
            f"{base}: expected the Hub id of a base, as patches name it, found a directory; give "
            "the id that it was downloaded from"
        )
    shared = find_on_hub(base)
    rows: list[tuple[str, ...]] = [("repository", "kind", "date")]
    for repo in shared:
        rows.append((repo.repo_id, repo.artifact, repo.date[:10]))
        # Below, not beside: names of data sets are long.
        for claim in repo.results:
            rows.append((f"  {claim.metric}", claim.dataset, _figure(claim.value)))
    if not shared:
        rows = [(f"No patch or map for {base} found.",)]
    output.show({"base": base, "found": [asdict(repo) for repo in shared]}, rows)


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else value


@options.command("verify")
@click.argument("adapter", help="Safety patch or map: directory or Hub id[@REVISION].")
@click.option("--base", help="Base model: directory or Hub id; without it the verdict is unknown.")
@click.option(
    "--revision",
    help="Branch, tag or commit of --base on the Hub.  [default: the one that ADAPTER names]",
)
@click.option("--merged", type=options.DIRECTORY, help="Model merged of the two: directory.")
def verify_command(
    adapter: str, base: str | None, revision: str | None, merged: Path | None
) -> None:
    """Check ADAPTER, its base, and a model merged of the two.

    Every tensor of --merged is compared, and every file that loading it reads. Exit codes:
    0 verified, 1 failed, 2 unreadable, 3 can't tell. Needs no torch.
    """
    from safeweights_peft.merging.verify import verify

    if revision and base is None:
        raise click.UsageError("--revision belongs to --base.")
    try:
        folder = options.ADAPTER.convert(adapter, None, None)
    except SafeWeightsError as error:  # what can't be fetched is unreadable, not a failed check
        click.echo(f"Error: {error}", err=True)
        sys.exit(_EXIT_CODES["unreadable"])
    directory, why_none = None, "no base was given"
    try:
        directory = find_base_directory(base, [folder], revision) if base else None
    except SafeWeightsError as error:  # it can't be had; or ADAPTER is broken, as verify will say
        why_none = str(error)
    if merged and directory:
        with output.show_progress() as progress, percent(progress, "Compare") as on_bytes:
            report = verify(folder, directory, merged, progress=on_bytes)
    else:
        report = verify(folder, directory, merged, why_no_base=why_none)
    checks = [{"name": c.name, "verdict": c.verdict, "detail": c.detail} for c in report.checks]
    result = {"verdict": report.verdict, "content_id": report.content_id, "checks": checks}
    rows = [(check.name, f"{_WORDS[check.verdict]}: {check.detail}") for check in report.checks]
    rows += [("content id", short_digest(str(report.content_id))), ("verdict", report.verdict)]
    output.show(result, rows)
    sys.exit(_EXIT_CODES[report.verdict])


@options.command("sign")
@click.argument("adapter", type=options.DIRECTORY, help="Safety patch or map: directory.")
@click.option(
    "--key", required=True, type=options.FILE, help="Elliptic-curve private key: PEM file."
)
@click.option("--out", type=options.NEW_FILE, help="Signature file.  [default: ADAPTER/model.sig]")
@options.overwrite
def sign_command(adapter: Path, key: Path, out: Path | None, overwrite: bool) -> None:
    """Sign ADAPTER with your private key.

    The signature, by OpenSSF's model_signing, covers the two files that decide what ADAPTER does;
    a card or results may be added later.
    """
    from safeweights_peft.signing import sign

    record = sign(adapter, key, out, overwrite=overwrite)
    output.show(record)


@options.command("verify-signature")
@options.adapter
@click.option("--key", required=True, type=options.FILE, help="Public key of the signer: PEM file.")
@click.option(
    "--signature", type=options.FILE, help="Signature file.  [default: ADAPTER/model.sig]"
)
def verify_signature_command(adapter: Path, key: Path, signature: Path | None) -> None:
    """Check that ADAPTER is as the owner of --key signed it.

    Exits with 1 if it is not.
    """
    from safeweights_peft.signing import verify_signature

    record = verify_signature(adapter, key, signature)
    output.show(record)


@options.command("reproduce", resumes=True)
@click.argument(
    "run",
    type=click.Path(exists=True, path_type=Path),
    help="Run of `enhance`, shared patch, or its reproduce.json.",
)
@click.option("--base", help="Base model: directory or Hub id.  [default: the one that RUN names]")
@click.option(
    "--data",
    type=options.FILE,
    multiple=True,
    help="Requests that RUN read: a file, recognised by content; repeatable.",
)
@options.out
@options.dry_run
def reproduce_command(
    run: Path, base: str | None, data: tuple[Path, ...], out: Path, dry_run: bool
) -> None:
    """Repeat RUN and compare; exit with 3 if it differs.

    Base and requests are checked by their digests first. A rate agrees if the new one is in the
    recorded 95 % interval. OUT becomes a run of its own; interrupted runs resume where they
    stopped.
    """
    from safeweights_peft.study.reproduce import find_recorded, reproduce
    from safeweights_peft.tables import reproduction_rows

    recorded = find_recorded(run, base, data)
    settings = recorded.settings
    if dry_run:
        steps = {"score": settings.score, "train": settings.train}
        return output.show_estimate(settings.base, settings.compute, **steps)
    with output.show_progress() as progress:
        comparison = reproduce(recorded, out, progress)
    output.show(comparison, reproduction_rows(comparison))
    if not comparison["same"]:
        click.echo("It differs from what was recorded.", err=True)
        sys.exit(output.INCONCLUSIVE)
