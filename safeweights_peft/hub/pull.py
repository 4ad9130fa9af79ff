"""Find patches and maps on the Hub, and fetch the files that belong to one, checked."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.utils import validate_repo_id

from safeweights_peft.cards import HUB_ID
from safeweights_peft.errors import HubError
from safeweights_peft.fetching import (
    HUB_ERRORS,
    download,
    explain,
    latest_commit,
    retry,
    split_revision,
)
from safeweights_peft.files import check_target, publish
from safeweights_peft.hub.layout import MAP, PATTERNS, belongs, check_adapter, is_unsafe
from safeweights_peft.patch.io import ADAPTER_FILES, CONFIG_FILE
from safeweights_peft.signing import SIGNATURE_FILE

TAG = "safeweights"
ARTIFACTS = {"safety-patch": "safety patch", "safety-map": "safety map"}
"""What a repository is, by its tags."""

_SOURCE = re.compile(rf"{HUB_ID.pattern}(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class Claim:
    """One result as a card claims it."""

    metric: str
    dataset: str
    value: float | str


@dataclass(frozen=True)
class Shared:
    """A patch or a map on the Hub."""

    repo_id: str
    artifact: str  # "safety patch" or "safety map"
    commit: str  # at the tip of its main branch
    date: str  # when that was pushed, in ISO 8601
    results: tuple[Claim, ...]


@dataclass(frozen=True)
class Pulled:
    """What a pull has fetched."""

    path: str
    repo_id: str
    commit: str
    artifact: str  # "safety patch" or "safety map"
    content_id: str | None
    base: str | None  # as it is recorded, with its commit
    base_commit: str | None
    base_latest: str | None  # the tip of the base's main branch; None if it can't be asked
    unsafe: tuple[str, ...]  # files in the repository that could run code, and were not fetched

    @property
    def base_moved_on(self) -> bool:
        """Whether the base has another commit by now than the one that this was made for."""
        return self.base_latest is not None and self.base_latest != self.base_commit


def find_on_hub(base: str) -> list[Shared]:
    """Find patches and maps for a base, with the results that their cards claim.

    Args:
        base: The base's Hub id.

    Returns:
        Repositories in alphabetical order, with artifact, commit, date and results. Anyone can
        write a card; a malformed one is listed without results.

    Raises:
        HubError: ``base`` is no Hub id, or the Hub can't be asked.

    Example:
        >>> from safeweights_peft import find_on_hub
        >>> [(shared.repo_id, shared.artifact) for shared in find_on_hub("someone/tiny")]
        [('ann/patch', 'safety patch')]
    """
    tags = [TAG, f"base_model:adapter:{base}"]
    properties: list[Any] = ["tags", "sha", "lastModified", "model-index"]
    try:
        validate_repo_id(base)
        models = retry(lambda: list(HfApi().list_models(filter=tags, expand=properties)))
    except HUB_ERRORS as error:
        raise HubError(f"{base}: expected to search for it, {explain(error, base)}") from error
    shared = filter(None, map(_describe, models))
    return sorted(shared, key=lambda repository: repository.repo_id)


def _describe(info: ModelInfo) -> Shared | None:
    artifact = next((name for tag, name in ARTIFACTS.items() if tag in (info.tags or ())), None)
    if artifact is None:
        return None
    date = info.last_modified.isoformat(timespec="seconds") if info.last_modified else ""
    return Shared(info.id, artifact, info.sha or "", date, tuple(_read_claims(info.model_index)))


def _read_claims(index: Any) -> list[Claim]:
    """Read a card's model-index; nothing of one that hasn't the right form."""
    claims = []
    try:
        for entry in index or ():
            for result in entry["results"]:
                dataset = str(result["dataset"]["name"])
                for metric in result["metrics"]:
                    name, value = str(metric.get("name") or metric["type"]), metric["value"]
                    value = value if type(value) in (int, float) else str(value)
                    claims.append(Claim(name, dataset, value))
    except (KeyError, TypeError, AttributeError):
        return []
    return claims


def is_hub_id(source: str) -> bool:
    """Tell whether a text can name a repository, perhaps at a revision."""
    return _SOURCE.fullmatch(source) is not None


def fetch_adapter(source: str, patterns: Sequence[str] = (*ADAPTER_FILES, SIGNATURE_FILE)) -> Path:
    """Fetch the files of an adapter into the Hub's cache, unless they are there."""
    repo_id, revision = split_revision(source)
    folder = download(repo_id, patterns, "an adapter's directory or Hub id", revision, HubError)
    missing = next((name for name in ADAPTER_FILES if not (folder / name).is_file()), None)
    if missing is not None:
        names = _list_files(repo_id, folder.name)
        found = next(filter(is_unsafe, names), None)
        if found is not None:
            found = f"{found}, which can run code"
        elif "config.json" in names:
            found = "config.json"
        raise HubError(
            f"{source}: expected a safety patch or map with {missing}, found {found or 'none'}; "
            "give another repository, or ask its author for one"
        )
    return folder


def pull_from_hub(source: str, out: str | Path | None = None, *, overwrite: bool = False) -> Pulled:
    """Fetch a patch or a map with its card, results, map and pictures, and check it.

    Args:
        source: ``USER/NAME``, perhaps ``@REVISION``.
        out: Directory for the files; they stay in the Hub's cache alone if None.
        overwrite: Replace an existing directory there.

    Returns:
        Where it is, its commit, content id and base, and which files were left out as unsafe.

    Raises:
        HubError: It can't be fetched, or is something else.
        FormatError: It breaks a rule of the format.

    Example:
        >>> from safeweights_peft import pull_from_hub
        >>> pulled = pull_from_hub("ann/patch", "pulled")
        >>> pulled.path, pulled.artifact, pulled.base
        ('pulled', 'safety patch', 'someone/tiny')
    """
    if out is not None:
        check_target(Path(out), overwrite, HubError)
    folder = fetch_adapter(source, PATTERNS)
    repo_id, commit = split_revision(source)[0], folder.name
    name = f"{repo_id}@{commit[:8]}"
    metadata = check_adapter(folder, name)
    if (folder / MAP / CONFIG_FILE).is_file():
        check_adapter(folder / MAP, f"{name}/{MAP}")
    if out is not None:
        with publish(Path(out), overwrite, HubError) as draft:
            _copy(folder, draft)
    base, base_commit = metadata.base_model_name_or_path, metadata.revision
    return Pulled(
        path=str(folder if out is None else out),
        repo_id=repo_id,
        commit=commit,
        artifact=metadata.mode.artifact,
        content_id=metadata.content_id,
        base=base,
        base_commit=base_commit,
        base_latest=latest_commit(base) if base and base_commit else None,
        unsafe=tuple(filter(is_unsafe, _list_files(repo_id, commit))),
    )


def _copy(folder: Path, out: Path) -> None:
    """Copy what belongs out of the cache, where more of the repository may lie, as links."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and belongs(name.as_posix()):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)


def _list_files(repo_id: str, commit: str) -> list[str]:
    """List all files of a repository; none where the Hub can't be asked, such as offline."""
    try:
        return sorted(retry(lambda: HfApi().list_repo_files(repo_id, revision=commit)))
    except HUB_ERRORS:
        return []
