"""Lay out what is to be pushed in a folder of its own, and refuse what must not be published."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from safeweights_peft.errors import HubError
from safeweights_peft.files import read_json, write_json
from safeweights_peft.hub.layout import IMAGES, MAP, RESULTS, Base, check_adapter
from safeweights_peft.patch.io import ADAPTER_FILES, CONFIG_FILE, TENSORS_FILE, read_metadata
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.signing import SIGNATURE_FILE

_OWN = ("adapter", "map", "path")  # keys of results whose values are paths of the run's own parts
_TEXTS = ("system_prompt", "answer_prefix")

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
_IN_PICTURE = re.compile(_ROOTED)  # a picture's bytes hold ~/ and C:\ by chance
_IN_TEXT = re.compile(rf"{_ROOTED}|(?<![\w.:/-])~/{_END}|\b[A-Za-z]:\\{_END}")
# As a whole value, each absolute path is one.
_VALUE = re.compile(rf"\A(?:/[^/\s].*|[A-Za-z]:[\\/].*|\\\\.*)\Z|{_IN_TEXT.pattern}")


def find_adapter(source: Path) -> Path:
    """Find the adapter in what is to be pushed: the directory itself, or the patch of a run."""
    adapter = source if (source / CONFIG_FILE).is_file() else source / "patch"
    if not (adapter / CONFIG_FILE).is_file():
        raise HubError(
            f"{source}: expected {CONFIG_FILE}, or the patch of a finished `safeweights enhance`, "
            "found neither; give the directory of one"
        )
    return adapter


def stage(source: Path, folder: Path, base: Base) -> AdapterMetadata:
    """Copy a patch or a map, with all that lies beside it, to where a repository holds it."""
    adapter = find_adapter(source)
    recorded = Base.of(read_metadata(adapter))
    # Of several files of one name the last one counts.
    for target, path in dict(_files(source, adapter)).items():
        (folder / target).parent.mkdir(exist_ok=True)
        if path.suffix == ".json":
            write_json(folder / target, _rename(read_json(path, HubError), recorded, base))
        else:
            shutil.copyfile(path, folder / target)
    _stage_adapter(adapter, folder, recorded, base)
    beside = source / MAP
    if beside != adapter and (beside / CONFIG_FILE).is_file():
        _stage_adapter(beside, folder / MAP, recorded, base)
    return read_metadata(folder)


def _files(source: Path, adapter: Path) -> Iterator[tuple[str, Path]]:
    """List the results and pictures of a run, each with its place in the repository."""
    for folder in (adapter, source / RESULTS, source / "report", source):
        for path in sorted(folder.glob("*.json")):
            if path.name != CONFIG_FILE:
                yield f"{RESULTS}/{path.name}", path
    for folder in (source / IMAGES, source / "report", source):
        for path in sorted(folder.glob("*.png")):
            yield f"{IMAGES}/{path.name}", path


def _rename(content: Any, recorded: Base, base: Base) -> Any:
    """Give the base its Hub id and a run's own parts their bare names; drop models' answers."""
    if isinstance(content, list):
        return [_rename(item, recorded, base) for item in content]
    if not isinstance(content, dict):
        return content
    renamed = {
        key: _rename(value, recorded, base) for key, value in content.items() if key != "answer"
    }
    for key, value in renamed.items():
        if key in _OWN and isinstance(value, str):
            renamed[key] = Path(value).name
    # Another commit of the base is another base, and keeps its name: it is refused by it later.
    named = renamed.get("base")
    if named is not None and named == recorded.name:
        renamed["base"] = base.name
    elif named == {"name": recorded.name, "revision": recorded.commit}:
        renamed["base"] = {"name": base.name, "revision": base.commit}
    return renamed


def _stage_adapter(adapter: Path, folder: Path, recorded: Base, base: Base) -> None:
    """Copy an adapter, check the copy, and let it name the published base."""
    read_metadata(adapter)  # both files are there
    folder.mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)
    own = Base.of(check_adapter(folder, str(adapter)))
    if own != recorded:
        raise HubError(
            f"{adapter}: expected a map of the patch's base {recorded}, found one of {own}; take "
            "it away, or put the right one there"
        )
    config = read_json(folder / CONFIG_FILE, HubError)
    public = config | {
        "selection": _rename(config["selection"], recorded, base),
        "base_model_name_or_path": base.name,
        "revision": base.commit,
    }
    signature = adapter / SIGNATURE_FILE
    if public != config:
        if signature.exists():
            raise HubError(
                f"{signature}: expected the config to be pushed as it was signed, found that it "
                f"has to name the base {base}, or leave a path out; write that into it, and sign "
                "it again"
            )
        write_json(folder / CONFIG_FILE, public)
    elif signature.exists():
        shutil.copyfile(signature, folder / SIGNATURE_FILE)


def check_private(folder: Path) -> None:
    """Refuse files that hold a local path or a secret, naming it and its place."""
    here = {f"{path}/" for path in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()))} - {"//"}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for where, text, pattern in _texts(path, path.relative_to(folder).as_posix()):
            _check_text(where, text, pattern, here)


def _texts(path: Path, name: str) -> Iterator[tuple[str, str, re.Pattern[str]]]:
    """Yield the texts of a file: where, what stands there, and what a local path is there."""
    if path.name == TENSORS_FILE:
        # Numbers, under names that the config has as well; but the header has room for texts.
        with safe_open(path, "numpy") as file:
            yield from _strings(file.metadata() or {}, f"{name}: __metadata__")
    elif path.suffix == ".json":
        yield from _strings(json.loads(path.read_text(encoding="utf-8")), name)
    else:
        pattern = _IN_PICTURE if path.suffix == ".png" else _IN_TEXT
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            yield f"{name}: line {number}", line, pattern


def _strings(value: Any, where: str) -> Iterator[tuple[str, str, re.Pattern[str]]]:
    if isinstance(value, str):
        # A prompt is a text, and may begin with a command such as "/no_think".
        yield where, value, _IN_TEXT if where.endswith(_TEXTS) else _VALUE
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{where}: key", key, _IN_TEXT
            yield from _strings(item, f"{where}: {key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _strings(item, f"{where}: {number}")


def _check_text(where: str, text: str, pattern: re.Pattern[str], here: set[str]) -> None:
    secret = _SECRET.search(text)
    if secret is not None:
        kind = list(_SECRETS)[(secret.lastindex or 1) - 1]
        raise HubError(
            f"{where}: expected nothing secret, found {kind} ({secret[0][:6]}…); take it out of "
            "the file, and revoke it if others have seen the file"
        )
    match = pattern.search(text)
    path = match[0] if match else next((place for place in here if place in text), None)
    # Refused and not repaired: only whoever wrote it knows what should stand there.
    if path is not None:
        raise HubError(
            f"{where}: expected nothing of this machine, found the path {path[:200]}; put a name "
            "there that others know it by"
        )
