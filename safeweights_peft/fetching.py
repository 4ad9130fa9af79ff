"""Find base models; fetch files from the Hub into its cache; retry, and explain what went wrong."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from safeweights_peft.errors import FormatError, ModelError, SafeWeightsError
from safeweights_peft.files import read_json
from safeweights_peft.patch.io import CONFIG_FILE, read_metadata
from safeweights_peft.patch.metadata import PEFT_TYPE

Result = TypeVar("Result")

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Files of a model's repository to fetch, as patterns."""

CODE_FILES = ("*.py",)
"""What is fetched as well where the code of a repository is trusted."""

BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 8.0)
"""Waits between tries, where the server doesn't say how long."""

MAX_WAIT_SECONDS = 300.0
"""A server that asks for more is reported to the user instead."""

TRANSIENT = (408, 429, 500, 502, 503, 504)
"""Statuses that another try may not get."""

_ABSENT = (OfflineModeIsEnabled, LocalEntryNotFoundError, RepositoryNotFoundError)
"""What says that a name is nothing, or nothing yet, to the Hub or its cache."""

HUB_ERRORS = (HTTPError, XetDownloadError, OSError, ValueError, RuntimeError)
"""What huggingface_hub raises when the Hub, the network or a name is at fault."""


@dataclass(frozen=True)
class BaseModel:
    """A base model on this disk."""

    name: str  # Hub id or path as the user gave it; adapters record it
    path: Path
    revision: str | None  # commit on the Hub; None for a plain directory
    trust_remote_code: bool = False  # whether code that comes with it may run


def public_name(source: str) -> str:
    """Name a source or a model without its place."""
    return Path(os.path.realpath(source)).name if Path(source).exists() else source


def find_base(
    base: str | os.PathLike[str] | None,
    adapters: Sequence[Path] = (),
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
) -> BaseModel:
    """Find the base that is given, or else named by adapters, at the commit that they record."""
    is_here = base is not None and Path(base).is_dir()
    name, commit = (str(base), None) if is_here else name_base(base, adapters)
    # A directory may bear the name of a recorded base, but it has no commits: digests will tell.
    return resolve_base(name, revision if Path(name).is_dir() else revision or commit, files)


def name_base(
    base: str | os.PathLike[str] | None, adapters: Sequence[Path]
) -> tuple[str, str | None]:
    """Return the name of a base, and the commit that adapters record for it, if one does."""
    recorded = [_recorded_base(adapter) for adapter in adapters]
    name = str(base) if base is not None else next((name for name, _ in recorded if name), None)
    if name is None:
        raise ModelError(
            f"{', '.join(map(str, adapters))}: base_model_name_or_path: expected the name of its "
            "base, found none; give the base"
        )
    return name, next((commit for other, commit in recorded if other == name and commit), None)


def _recorded_base(adapter: Path) -> tuple[str | None, str | None]:
    if not (adapter / CONFIG_FILE).is_file():
        read_metadata(adapter)  # says what is there instead, such as a run
    config = read_json(adapter / CONFIG_FILE, FormatError)
    if config.get("peft_type") == PEFT_TYPE:
        read_metadata(adapter)  # a broken patch is refused before gigabytes are fetched for it
    name, commit = config.get("base_model_name_or_path"), config.get("revision")
    for key, value in (("base_model_name_or_path", name), ("revision", commit)):
        if not isinstance(value, str | None):
            raise FormatError(
                f"{adapter / CONFIG_FILE}: {key}: expected text or null, found {str(value)[:80]}; "
                "do not use this adapter"
            )
    return name or None, commit or None


def resolve_base(
    base: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES
) -> BaseModel:
    """Find a base by name: a directory, or a Hub id whose files are downloaded into the cache."""
    path = Path(base)
    commit = None
    if path.is_dir() and revision is not None:
        raise ModelError(
            f"--revision {revision}: expected a base on the Hub, found the directory {base}, which "
            "has no revisions; leave it out"
        )
    if not path.is_dir():
        path = download(base, files, "a model directory or a Hub id", revision)
        commit = path.name
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{base}: expected a Hugging Face model with config.json, found none; "
            "give the directory that save_pretrained wrote, or a Hub id"
        )
    return BaseModel(base, path, commit)


def download(
    source: str,
    patterns: Sequence[str],
    expected: str,
    revision: str | None = None,
    error: type[SafeWeightsError] = ModelError,
) -> Path:
    """Download files of a Hub repository into the cache, unless they are there."""

    if not Path(source).exists() and _is_path(source):  # no hub is asked for it
        nearest = _find_nearest(source)
        hint = f"did you mean {nearest}?" if nearest else "check the spelling"
        raise error(f"{source}: expected {expected}, found no such directory; {hint}")

    def fetch() -> str:
        folder: str = huggingface_hub.snapshot_download(
            source, revision=revision, allow_patterns=list(patterns)
        )
        return folder

    try:
        return Path(retry(fetch))
    except HUB_ERRORS as reason:
        at = f" at revision {revision}" if revision else ""
        explained = explain(reason, source)
        cause = _cause(reason)
        if isinstance(cause, _ABSENT) and not isinstance(cause, GatedRepoError):
            nearest = _find_nearest(source)
            found = explained.removeprefix("found ")
            explained = f"found no such directory here, and {found}"
            explained += f"; did you mean {nearest}?" if nearest else ""
        raise error(f"{source}: expected {expected}{at}, {explained}") from reason


def _is_path(source: str) -> bool:
    """Tell whether a name is written as a path, as no repository's is."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _find_nearest(source: str) -> Path | None:
    """Find the path beside one that isn't there whose name is most alike."""
    path = Path(source)
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(path.name, names, 1)
    return path.with_name(nearest[0]) if nearest else None


def split_revision(source: str) -> tuple[str, str | None]:
    """Split ``NAME@REVISION``; the revision is None if there is none."""
    name, _, revision = source.partition("@")
    return name, revision or None


def latest_commit(repo_id: str) -> str | None:
    """Return the commit at the tip of a model's main branch; None if the Hub can't be asked."""
    try:
        return huggingface_hub.HfApi().model_info(repo_id, timeout=10).sha
    except HUB_ERRORS:
        return None


def retry(call: Callable[[], Result]) -> Result:
    """Call the Hub, and again after transient errors."""
    # huggingface_hub itself retries uploads and listings, but few other requests.
    waits = iter(BACKOFF_SECONDS)
    while True:
        try:
            return call()
        except HUB_ERRORS as error:
            if not wait_to_retry(error, waits):
                raise


def wait_to_retry(
    error: BaseException, waits: Iterator[float], transient: Sequence[int] = TRANSIENT
) -> bool:
    """Wait as long as the server asks, or else the next of ``waits``; False if that won't help."""
    if not _is_transient(_cause(error), transient) or (wait := next(waits, None)) is None:
        return False
    requested = _requested_wait(_cause(error))
    if requested is not None and requested > MAX_WAIT_SECONDS:
        return False
    time.sleep(wait if requested is None else requested)
    return True


def _is_transient(cause: BaseException, transient: Sequence[int]) -> bool:
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in transient
    if isinstance(cause, json.JSONDecodeError):
        return True  # the page of some proxy in place of the Hub's answer
    # A connection that is refused stays refused: offline, a user shouldn't wait for half a minute.
    return isinstance(cause, HTTPError) and type(cause).__name__ != "ConnectError"


def explain(error: BaseException, repo_id: str) -> str:
    """Say what went wrong at the Hub, and what to do."""
    found, advice = _describe(_cause(error), repo_id)
    return f"found {found}; {advice}"


def _describe(error: BaseException, repo_id: str) -> tuple[str, str]:
    if isinstance(error, OfflineModeIsEnabled):
        found = "not all of it in the cache, and HF_HUB_OFFLINE set"
        return found, "unset it to ask the Hub"
    if isinstance(error, GatedRepoError):
        page = f"{huggingface_hub.constants.ENDPOINT}/{repo_id}"
        return "a gated repository", f"ask for access at {page}, and log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision", "check the name of the branch or tag, or the whole commit"
    if isinstance(error, RepositoryNotFoundError):
        found = "no such repository that you can see"
        return found, "check the spelling; if it is private, log in with `hf auth login`"
    if isinstance(error, HfHubHTTPError):
        return _describe_status(error)
    if isinstance(error, HTTPError):
        found = f"no answer from {huggingface_hub.constants.ENDPOINT} ({type(error).__name__})"
        return found, "check the network, and call again"
    if isinstance(error, HFValidationError):
        return "a name that no repository can have", "check the spelling"
    if isinstance(error, LocalEntryNotFoundError):
        return "not all of it in the cache", "check the network, and call again"
    return f"{type(error).__name__}: {_line(str(error))}", "see the message, and call again"


def _describe_status(error: HfHubHTTPError) -> tuple[str, str]:
    status = error.response.status_code
    if status == 401:
        if huggingface_hub.get_token() is None:
            return "no token", "log in with `hf auth login`, or set HF_TOKEN"
        return "a token that the Hub doesn't accept, or no longer", "log in with `hf auth login`"
    if status == 403:
        return "that your token has no right to it", "use a token with the right, or ask for it"
    if status == 429:
        requested = _requested_wait(error)
        wait = "some minutes" if requested is None else f"{requested:.0f} seconds"
        return "too many requests (429)", f"wait {wait}, and call again"
    if status in TRANSIENT:
        return f"an error of the server ({status})", "call again later"
    return f"the answer {status}: {_line(error.server_message or '')}", "see the message"


def _cause(error: BaseException) -> BaseException:
    """Find the response or the lost connection that huggingface_hub wraps in errors of its own."""
    while not isinstance(error, HTTPError | OfflineModeIsEnabled) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _requested_wait(cause: BaseException) -> float | None:
    """Read how many seconds the server asks to wait, if it does."""
    if not isinstance(cause, HfHubHTTPError):
        return None
    limits = parse_ratelimit_headers(cause.response.headers)
    if limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    seconds = cause.response.headers.get("Retry-After", "").strip()
    return float(seconds) if seconds.isdigit() else None


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
