"""Fetches patches and maps from the Hub: only the files that belong, checked before they are used.

They stay in the Hub's cache, where they are found again without a network, or go to a directory of
the user's. Loading them into a model is the matter of ``pipeline``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from safeweights_peft.cards import HUB_ID
from safeweights_peft.errors import HubError
from safeweights_peft.fetching import HUB_ERRORS, download, latest_commit, patiently, split_revision
from safeweights_peft.files import check_target, publish
from safeweights_peft.hub.checking import check_adapter
from safeweights_peft.hub.layout import MAP, PATTERNS, belongs, is_unsafe
from safeweights_peft.patch.io import ADAPTER_FILES, CONFIG_FILE
from safeweights_peft.signing import SIGNATURE_FILE

_ID = re.compile(rf"{HUB_ID.pattern}(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class Pulled:
    """What a pull has fetched.

    Attributes:
        path: the directory, in the Hub's cache or where it was asked for.
        repo_id: the repository.
        commit: its commit.
        artifact: "safety patch" or "safety map".
        content_id: the digest of what it stores.
        base: the base's Hub id or path, as it is recorded.
        base_commit: the base's commit, as it is recorded.
        base_latest: the commit at the tip of the base's main branch; None if it can't be asked.
        unsafe: files in the repository that could run code, and were not fetched.
    """

    path: str
    repo_id: str
    commit: str
    artifact: str
    content_id: str | None
    base: str | None
    base_commit: str | None
    base_latest: str | None
    unsafe: tuple[str, ...]

    @property
    def base_moved_on(self) -> bool:
        """Whether the base has another commit by now than the one that this was made for."""
        return self.base_latest is not None and self.base_latest != self.base_commit


def is_hub_id(source: str) -> bool:
    """Tell whether a text can name a repository, perhaps at a revision."""
    return _ID.fullmatch(source) is not None


def fetch_adapter(source: str, patterns: Sequence[str] = (*ADAPTER_FILES, SIGNATURE_FILE)) -> Path:
    """Fetch the files of an adapter into the Hub's cache, unless they are there."""
    repo_id, revision = split_revision(source)
    wanted = "an adapter's directory or Hub id"
    folder = download(repo_id, patterns, wanted, revision, HubError)
    missing = next((each for each in ADAPTER_FILES if not (folder / each).is_file()), None)
    if missing is not None:
        names = _names(repo_id, folder.name)
        found = next(filter(is_unsafe, names), "config.json" if "config.json" in names else None)
        told = f"{found}, which can run code" if found and is_unsafe(found) else found or "none"
        raise HubError(
            f"{source}: expected a safety patch or map with {missing}, found {told}; give another "
            "repository, or ask its author for one"
        )
    return folder


def pull_from_hub(source: str, out: str | Path | None = None, *, overwrite: bool = False) -> Pulled:
    """Fetch a patch or a map with its card, results, map and pictures, and checks it.

    Args:
        source: ``USER/NAME``, perhaps ``@REVISION``.
        out: where to put the files; into the Hub's cache alone if None.
        overwrite: replace an existing directory there.

    Returns:
        Where it is, and what is to be said about it.

    Raises:
        HubError: it can't be fetched, or is something else.
    """
    if out is not None:
        check_target(Path(out), overwrite, HubError)
    folder = fetch_adapter(source, PATTERNS)
    repo_id, commit = split_revision(source)[0], folder.name
    known_as = f"{repo_id}@{commit[:8]}"
    metadata = check_adapter(folder, known_as)
    if (folder / MAP / CONFIG_FILE).is_file():
        check_adapter(folder / MAP, f"{known_as}/{MAP}")
    if out is not None:
        with publish(Path(out), overwrite, HubError) as draft:
            _copy(folder, draft)
    base, made_for = metadata.base_model_name_or_path, metadata.revision
    return Pulled(
        path=str(folder if out is None else out),
        repo_id=repo_id,
        commit=commit,
        artifact=metadata.mode.artifact,
        content_id=metadata.content_id,
        base=base,
        base_commit=made_for,
        base_latest=latest_commit(base) if base and made_for else None,
        unsafe=tuple(filter(is_unsafe, _names(repo_id, commit))),
    )


def _copy(folder: Path, out: Path) -> None:
    """Copy what belongs out of the cache, where more of the repository may lie, as links."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and belongs(name.as_posix()):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)


def _names(repo_id: str, commit: str) -> list[str]:
    """List all files of a repository; none where that can't be asked, such as offline."""
    try:
        return sorted(patiently(lambda: HfApi().list_repo_files(repo_id, revision=commit)))
    except HUB_ERRORS:
        return []
