"""What is to be pushed, laid out in a folder of its own, with names that others know.

Here live the way from a run's directory to a repository's layout, and the checks that need no
network. The files that it starts from are read and never written. Where they go is ``pushing``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeweights_peft.errors import HubError
from safeweights_peft.files import read_json
from safeweights_peft.hub.checking import check_adapter
from safeweights_peft.hub.layout import IMAGES, MAP, RESULTS
from safeweights_peft.hub.results import base_text
from safeweights_peft.patch.io import ADAPTER_FILES, CONFIG_FILE, read_metadata
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.signing import SIGNATURE_FILE

_Named = tuple[str | None, str | None]  # a base's name and commit, as an adapter records them
_OWN = ("adapter", "map", "path")  # what results call the run's own parts, by their paths


@dataclass(frozen=True)
class Base:
    """The base that is published with a patch.

    Attributes:
        repo_id: its Hub id.
        commit: its commit.
    """

    repo_id: str
    commit: str


def find_adapter(source: Path) -> Path:
    """Find the adapter in what is to be pushed."""
    found = source if (source / CONFIG_FILE).is_file() else source / "patch"
    if not (found / CONFIG_FILE).is_file():
        raise HubError(
            f"{source}: expected {CONFIG_FILE}, or the patch of a finished `safeweights enhance`, "
            "found neither; give the directory of one"
        )
    return found


def stage(source: Path, folder: Path, base: Base) -> AdapterMetadata:
    """Lay out a patch or a map, and all that is beside it, as a repository holds it."""
    adapter = find_adapter(source)
    named = _named(read_metadata(adapter))
    for target, path in dict(_files(source, adapter)).items():
        place = folder / target
        place.parent.mkdir(exist_ok=True)
        if path.suffix == ".json":
            content = _rename(read_json(path, HubError), named, base)
            place.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, place)
    _stage_adapter(adapter, folder, named, base)
    beside = source / MAP
    if beside != adapter and (beside / CONFIG_FILE).is_file():
        _stage_adapter(beside, folder / MAP, named, base)
    return read_metadata(folder)


def _files(source: Path, adapter: Path) -> Iterator[tuple[str, Path]]:
    """List the results and pictures of a run; of one name, the last one counts."""
    for folder in (adapter, source / RESULTS, source / "report", source):
        for path in sorted(folder.glob("*.json")):
            if path.name != CONFIG_FILE:
                yield f"{RESULTS}/{path.name}", path
    for folder in (source / IMAGES, source / "report", source):
        for path in sorted(folder.glob("*.png")):
            yield f"{IMAGES}/{path.name}", path


def _named(metadata: AdapterMetadata) -> _Named:
    return metadata.base_model_name_or_path, metadata.revision


def _rename(content: Any, named: _Named, base: Base) -> Any:
    """Give the base its Hub id, and a run's own parts their bare names; drops answers.

    Another commit of the base is another base, and keeps its name.
    """
    if isinstance(content, list):
        return [_rename(each, named, base) for each in content]
    if not isinstance(content, dict):
        return content
    renamed = {key: _rename(each, named, base) for key, each in content.items() if key != "answer"}
    for key, value in renamed.items():
        if key in _OWN and isinstance(value, str):
            renamed[key] = Path(value).name
    told = renamed.get("base")
    if told is not None and told == named[0]:
        renamed["base"] = base.repo_id
    elif told == {"name": named[0], "revision": named[1]}:
        renamed["base"] = {"name": base.repo_id, "revision": base.commit}
    return renamed


def _stage_adapter(adapter: Path, folder: Path, named: _Named, base: Base) -> None:
    """Copy an adapter, checks the copy, and has it name the published base."""
    read_metadata(adapter)  # both files are there
    folder.mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)
    found = _named(check_adapter(folder, str(adapter)))
    if found != named:
        raise HubError(
            f"{adapter}: expected a map of the patch's base {base_text(*named)}, found one of "
            f"{base_text(*found)}; take it away, or put the right one there"
        )
    config = read_json(folder / CONFIG_FILE, HubError)
    public = config | {
        "selection": _rename(config["selection"], named, base),
        "base_model_name_or_path": base.repo_id,
        "revision": base.commit,
    }
    signature = adapter / SIGNATURE_FILE
    if public != config:
        if signature.exists():
            raise HubError(
                f"{signature}: expected the config to be pushed as it was signed, found that it "
                f"has to name the base {base.repo_id} at {base.commit}, or leave a path out; "
                "write that into it, and sign it again"
            )
        text = json.dumps(public, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    elif signature.exists():
        shutil.copyfile(signature, folder / SIGNATURE_FILE)
