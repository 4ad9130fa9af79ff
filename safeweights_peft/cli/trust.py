"""The commands that say whether an adapter is what it claims to be, and whose it is."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from safeweights_peft.cli.artifacts import find_base
from safeweights_peft.cli.options import adapter as adapter_type
from safeweights_peft.cli.options import existing, existing_file, json_output, new_file, overwrite
from safeweights_peft.cli.output import percent, rows_of, show, show_progress
from safeweights_peft.errors import SafeWeightsError

EXIT_CODES = {"verified": 0, "failed": 1, "unreadable": 2, "unknown": 3}


@click.command("verify")
@click.argument("adapter")
@click.option("--base", help="Its base: directory or Hub id.")
@click.option(
    "--revision", help="Commit, tag or branch of --base on the Hub.  [default: what ADAPTER names]"
)
@click.option(
    "--merged", type=existing, help="Model that is to be the base with ADAPTER and nothing else."
)
@json_output
def verify_command(
    adapter: str, base: str | None, revision: str | None, merged: Path | None, as_json: bool
) -> None:
    """Check ADAPTER, its fit to --base, and that --merged is just the two.

    Every tensor of --merged is compared, and every file that loading reads. Exit codes: 0 verified,
    1 failed, 2 unreadable, 3 can't tell, as without --base: an adapter is only verified with it.
    Needs no torch.
    """
    from safeweights_peft.merging.verify import verify

    folder = _fetch(adapter)
    found, why_none = _look_for_base(base, folder, revision)
    if merged and found:
        with show_progress() as progress, progress.task("Comparing", 100) as advance:
            report = verify(folder, found, merged, progress=percent(advance))
    else:
        report = verify(folder, found, merged, why_no_base=why_none)
    checks = [{"name": c.name, "verdict": c.verdict, "detail": c.detail} for c in report.checks]
    result = {"verdict": report.verdict, "content_id": report.content_id, "checks": checks}
    words = {"verified": "ok", "failed": "FAILED", "unreadable": "UNREADABLE", "unknown": "UNKNOWN"}
    rows = [(c.name, f"{words[c.verdict]}: {c.detail}") for c in report.checks]
    rows += [("content id", str(report.content_id)), ("verdict", report.verdict)]
    show(result, rows, as_json)
    sys.exit(EXIT_CODES[report.verdict])


def _fetch(adapter: str) -> Path:
    """Find the adapter's directory; one that can't be had is unreadable, and no failed check."""
    try:
        return adapter_type.convert(adapter, None, None)
    except SafeWeightsError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(EXIT_CODES["unreadable"])


def _look_for_base(
    base: str | None, adapter: Path, revision: str | None
) -> tuple[Path | None, str]:
    """Find the base's directory, or tells why there is none."""
    if base is None:
        if revision:
            raise click.UsageError("--revision belongs to --base.")
        return None, "no base was given"
    try:
        return find_base(base, adapter, revision), ""
    except SafeWeightsError as error:  # it can't be had; or ADAPTER is broken, as verify will tell
        return None, str(error)


@click.command("sign")
@click.argument("adapter", type=existing)
@click.option(
    "--key", required=True, type=existing_file, help="Private elliptic-curve key, a PEM file."
)
@click.option("--out", type=new_file, help="Signature to be written.  [default: ADAPTER/model.sig]")
@overwrite
@json_output
def sign_command(
    adapter: Path, key: Path, out: Path | None, overwrite: bool, as_json: bool
) -> None:
    """Sign ADAPTER, a safety patch or map, with a private key of your own.

    Signed, by OpenSSF's model_signing, are the two files that decide what it does; a card or
    results may be added later.
    """
    from safeweights_peft.signing import sign

    record = sign(adapter, key, out, overwrite=overwrite)
    show(record, rows_of(record), as_json)


@click.command("verify-signature")
@click.argument("adapter", type=adapter_type)
@click.option("--key", required=True, type=existing_file, help="The signer's public key, PEM.")
@click.option(
    "--signature", type=existing_file, help="The signature.  [default: ADAPTER/model.sig]"
)
@json_output
def verify_signature_command(
    adapter: Path, key: Path, signature: Path | None, as_json: bool
) -> None:
    """Check that ADAPTER is as the owner of --key has signed it; exit with 1 if it is not."""
    from safeweights_peft.signing import verify_signature

    record = verify_signature(adapter, key, signature)
    show(record, rows_of(record), as_json)
