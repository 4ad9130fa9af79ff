"""What must not be published: places on a machine, and secrets.

Here live the patterns, and the search for them in the files that are about to be sent. What is
found is refused, not repaired: only whoever wrote it knows what should stand there.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from safeweights_peft.errors import HubError
from safeweights_peft.patch.io import TENSORS_FILE

_SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abeprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_SECRET = re.compile("|".join(f"({pattern})" for pattern in _SECRETS.values()))

_END = r"[^\s\"'`<>|)]*"
# Under these a path tells of a machine or its user, wherever it stands.
_ROOTS = "home|Users|root|tmp|var/folders|mnt|media|scratch|Volumes|data|work|workspace|srv|opt"
_ROOTED = rf"(?<![\w.:/-])(?:file://|/(?:{_ROOTS})/)" + _END
_IN_PICTURE = re.compile(_ROOTED)  # the shorter ones come about by chance there
_IN_TEXT = re.compile(rf"{_ROOTED}|(?<![\w.:/-])~/{_END}|\b[A-Za-z]:\\{_END}")
# As a whole value, each absolute path is one.
_VALUE = re.compile(rf"\A(?:/[^/\s].*|[A-Za-z]:[\\/].*|\\\\.*)\Z|{_IN_TEXT.pattern}")


def check_shareable(folder: Path) -> None:
    """Refuse files that hold a local path or a secret; says which one and where."""
    own = {str(each) for each in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()))}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = path.relative_to(folder).as_posix()
        for where, text, pattern in _texts(path, name):
            _check(where, text, pattern, own)


def _texts(path: Path, name: str) -> Iterator[tuple[str, str, re.Pattern[str]]]:
    """Take a file apart: where, what stands there, and what a local path looks like there."""
    if path.name == TENSORS_FILE:
        # Numbers, under names that the config has as well; but the header has room for texts.
        with safe_open(path, "numpy") as file:
            yield from _strings(file.metadata() or {}, f"{name}: __metadata__")
    elif path.suffix == ".json":
        yield from _strings(json.loads(path.read_text(encoding="utf-8")), name)
    elif path.suffix == ".png":
        for text in re.findall(rb"[ -~]{12,}", path.read_bytes()):
            yield name, text.decode(), _IN_PICTURE
    else:
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            yield f"{name}: line {number}", line, _IN_TEXT


def _strings(value: Any, where: str) -> Iterator[tuple[str, str, re.Pattern[str]]]:
    if isinstance(value, str):
        yield where, value, _VALUE
    elif isinstance(value, dict):
        for key, each in value.items():
            yield f"{where}: key", key, _IN_TEXT
            yield from _strings(each, f"{where}: {key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _strings(each, f"{where}: {number}")


def _check(where: str, text: str, pattern: re.Pattern[str], own: set[str]) -> None:
    secret = _SECRET.search(text)
    if secret is not None:
        kind = list(_SECRETS)[(secret.lastindex or 1) - 1]
        raise HubError(
            f"{where}: expected nothing secret, found {kind} ({secret[0][:6]}…); take it out of "
            "the file, and revoke it if others have seen the file"
        )
    match = pattern.search(text)
    mine = (each for each in own if len(each) > 1 and f"{each}/" in text)
    place = match[0] if match else next(mine, None)
    if place is not None:
        raise HubError(
            f"{where}: expected nothing of this machine, found the path {place[:200]}; put a name "
            "there that others know it by"
        )
