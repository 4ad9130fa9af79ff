"""This command line as an extension of Hugging Face's `hf`.

`hf NAME` runs what the manifest in ``~/.local/share/hf/extensions/hf-NAME/`` points to; the script
``hf-safeweights`` is that. `hf extensions install OWNER/hf-safeweights` writes the manifest for a
repository of that name on GitHub; the command here writes it for what pip has installed.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from sysconfig import get_path

import click

from safeweights_peft.cli.options import json_output
from safeweights_peft.cli.output import rows_of, show
from safeweights_peft.errors import HubError

SHORT_NAME = "safeweights"
SCRIPT = f"hf-{SHORT_NAME}"
OWNER = "pip:"
"""No owner on GitHub can be called so: `hf extensions update` finds nothing to put in its place."""


@click.command("extend-hf")
@json_output
def extend_hf_command(as_json: bool) -> None:
    """Let `hf safeweights` run this command line, for this user.

    Writes hf's manifest; `hf extensions remove safeweights` takes it back.
    """
    from huggingface_hub.cli.extensions import EXTENSIONS_ROOT, ExtensionManifest

    script, folder = _find_script(), EXTENSIONS_ROOT.expanduser() / SCRIPT
    ExtensionManifest(
        owner=OWNER,
        repo="safeweights-peft",
        repo_id="safeweights-peft",
        short_name=SHORT_NAME,
        executable_path=str(script),
        type="python",
        installed_at=datetime.now(UTC),
        description="Safety patches for language models",
    ).save(folder)
    result = {"command": f"hf {SHORT_NAME}", "runs": str(script), "manifest": str(folder)}
    show(result, rows_of(result), as_json)


def _find_script() -> Path:
    script = Path(get_path("scripts"), SCRIPT + (".exe" if os.name == "nt" else ""))
    if not script.is_file():
        raise HubError(
            f"{script}: expected the script that comes with safeweights-peft, found none; install "
            "the package with pip, in the environment of this Python"
        )
    return script
