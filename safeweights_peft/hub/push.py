"""Push a patch or a map to the Hub: everything that belongs to it, in one commit."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from safeweights_peft.errors import HubError
from safeweights_peft.fetching import (
    BACKOFF_SECONDS,
    HUB_ERRORS,
    TRANSIENT,
    download,
    explain,
    name_base,
    retry,
    split_revision,
    wait_to_retry,
)
from safeweights_peft.files import read_json
from safeweights_peft.hub.card import write_card
from safeweights_peft.hub.layout import Base, belongs, is_foreign
from safeweights_peft.hub.stage import check_private, find_adapter, stage
from safeweights_peft.patch.io import CONFIG_FILE
from safeweights_peft.patch.metadata import PEFT_TYPE

TIP_MOVED = 412
"""The Hub's answer to a commit on top of one that isn't the tip, or for a while isn't yet."""


@dataclass(frozen=True)
class Pushed:
    """What a push has done, or would do."""

    repo_id: str
    url: str
    commit: str | None  # None after a dry run
    changed: bool  # False if the repository held all of it before
    pull_request: str | None  # its address
    files: tuple[str, ...]
    base: str
    base_commit: str
    draft: str | None = None  # directory that a dry run has left, with the card


def push_to_hub(
    source: str | Path,
    repo_id: str,
    *,
    base: str | None = None,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Push a patch or a map, with its card, results, map and pictures, in one commit.

    A repository that isn't there is made, private unless ``public``. In one that is, files of an
    earlier push that are no longer there are deleted in the same commit; files of others are left
    alone.

    Args:
        source: Directory of a run of `enhance`, or of a patch or a map; nothing in it is changed.
        repo_id: The repository, as ``USER/NAME``.
        base: The base's Hub id, perhaps ``@REVISION``, where the files name a directory.
        public: Whether anyone may see a new repository.
        revision: Branch to push to; the main branch if None.
        create_pr: Open a pull request instead, to which no right to write is needed.
        message: The commit's message.
        dry_run: Push nothing: write all that would be pushed to a new temporary directory.

    Returns:
        What was done: repository, commit, whether that is new, files, base and its commit.

    Raises:
        HubError: Something must not be published, the repository holds something else or has
            changed meanwhile, or the Hub refuses.
        FormatError: The patch or the map breaks a rule of the format.
        ModelError: The patch or the map names no base, and neither does ``base``.

    Example:
        >>> from safeweights_peft import push_to_hub
        >>> pushed = push_to_hub("demo/run", "ann/patch", base="someone/tiny")
        >>> pushed.files[:3]
        ('README.md', 'adapter_config.json', 'adapter_model.safetensors')
    """
    source = Path(source)
    _check_name(repo_id)
    if not dry_run:
        _check_login(repo_id)
    folder = Path(tempfile.mkdtemp(prefix="safeweights-push-"))
    try:
        public_base = _find_base(find_adapter(source), base)
        artifact = stage(source, folder, public_base).mode.artifact
        write_card(folder, repo_id)
        check_private(folder)
        change = _Change(folder, repo_id, revision, create_pr, message or f"Push {artifact}")
        pushed = partial(
            Pushed,
            repo_id,
            f"{change.api.endpoint}/{repo_id}",
            files=tuple(change.files),
            base=str(public_base.name),
            base_commit=str(public_base.commit),
        )
        if dry_run:
            return pushed(None, changed=False, pull_request=None, draft=str(folder))
        commit, changed, pull_request = _push(change, public)
    except BaseException:
        dry_run = False  # and its draft goes too
        raise
    finally:
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    return pushed(commit, changed=changed, pull_request=pull_request)


def _push(change: _Change, public: bool) -> tuple[str, bool, str | None]:
    try:
        return change.push(public)
    except HUB_ERRORS as error:
        advice = ""
        if change.create_pr:
            advice = "; look first whether the pull request is there"
        elif isinstance(error, HfHubHTTPError) and error.response.status_code == 403:
            advice = "; or propose the push by --create-pr"
        problem = f"expected to push to it, {explain(error, change.repo_id)}{advice}"
        raise HubError(f"{change.repo_id}: {problem}") from error


def _check_name(repo_id: str) -> None:
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id}: expected USER/NAME, found another form; name the repository so")


def _check_login(repo_id: str) -> None:
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"{repo_id}: expected to push to it, found no token; log in with `hf auth login`, or "
            "set HF_TOKEN"
        )


def _find_base(adapter: Path, public: str | None) -> Base:
    """Find the Hub id and the commit of the base, and that both are there."""
    name, revision = split_revision(public) if public else (None, None)
    name, recorded = name_base(name, [adapter])
    if public is None and recorded is None:
        raise HubError(
            f"{adapter}: base_model_name_or_path: expected a Hub id and its commit, found {name} "
            "without a commit, a directory; say by --base USER/MODEL[@REVISION] where others find "
            "this base"
        )
    revision = revision or recorded
    try:
        info = retry(lambda: HfApi().model_info(name, revision=revision))
    except HUB_ERRORS as error:
        at = f" at revision {revision}" if revision else ""
        problem = f"expected the base as a model on the Hub{at}, {explain(error, name)}"
        raise HubError(f"{name}: {problem}") from error
    if public is not None and recorded not in (None, info.sha):
        raise HubError(
            f"{adapter}: expected --base {name}@{recorded}, the commit that it was made for, found "
            f"commit {info.sha}; leave the revision out"
        )
    return Base(info.id, info.sha)


@dataclass(frozen=True)
class _Remote:
    """What a repository holds at the tip of a branch."""

    commit: str
    private: bool
    files: dict[str, RepoFile]

    def holds(self, files: dict[str, Path]) -> bool:
        """Tell whether it has these files of the layout with this content, and no others of it."""
        theirs = {name for name in self.files if belongs(name)}
        return theirs == files.keys() and all(
            _is_same(self.files[name], path) for name, path in files.items()
        )


class _Change:
    """One commit on top of what a repository holds."""

    # Large files go ahead into the Hub's storage, where nobody sees them; the commit that names
    # them is one request, on top of the commit that was looked at. So whatever fails on the way,
    # the repository is as it was or complete, and the next push resumes with what the storage has.
    # upload_folder would split it into several commits at 250 files or after 5 minutes.

    def __init__(
        self, folder: Path, repo_id: str, revision: str | None, create_pr: bool, message: str
    ) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path for path in paths}
        self.repo_id = repo_id
        self.revision = revision
        self.create_pr = create_pr
        self.message = message
        self.api = HfApi()

    def push(self, public: bool) -> tuple[str, bool, str | None]:
        """Commit what changes; return the commit, whether it is new, and the pull request."""
        remote = self._look()
        if remote is None:
            remote = self._create(public)
        elif public and remote.private:
            raise HubError(
                f"{self.repo_id}: expected a public repository, found a private one; make it "
                "public on the Hub first, or leave out --public"
            )
        self._check_ours(remote)
        if remote.holds(self.files):
            return remote.commit, False, None
        return self._commit(remote)

    def _create(self, public: bool) -> _Remote:
        if self.revision not in (None, "main"):
            raise HubError(
                f"{self.repo_id}: expected a repository with the branch {self.revision}, found "
                "none that you can see; push to its main branch first"
            )
        # Where public is asked for, None: an organization's own rule may be private.
        private = None if public else True
        retry(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
        remote = self._look()
        if remote is None:
            raise HubError(
                f"{self.repo_id}: expected the repository that was just made, found none yet; "
                "call again"
            )
        return remote

    def _look(self) -> _Remote | None:
        """List what the repository holds; None if it isn't there."""
        try:
            info = retry(lambda: self.api.model_info(self.repo_id, revision=self.revision))
        except RepositoryNotFoundError as error:
            if self.create_pr or isinstance(error, GatedRepoError):
                raise
            return None
        assert info.sha is not None
        commit = info.sha
        entries = retry(
            lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit))
        )
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return _Remote(commit, bool(info.private), files)

    def _check_ours(self, remote: _Remote) -> None:
        """Refuse a repository that holds something else, which the push would spoil."""
        foreign = sorted(filter(is_foreign, remote.files))
        if not foreign and CONFIG_FILE in remote.files:
            expected = f"its {CONFIG_FILE}"
            folder = download(self.repo_id, [CONFIG_FILE], expected, remote.commit, HubError)
            kind = read_json(folder / CONFIG_FILE, HubError).get("peft_type")
            foreign = [] if kind == PEFT_TYPE else [f"a {str(kind)[:40]} adapter"]
        if foreign:
            raise HubError(
                f"{self.repo_id}: expected an empty repository or one of a safety patch or map, "
                f"found {foreign[0]} in it; give another name"
            )

    def _commit(self, remote: _Remote) -> tuple[str, bool, str | None]:
        additions = [CommitOperationAdd(name, str(path)) for name, path in self.files.items()]
        gone = [name for name in remote.files if belongs(name) and name not in self.files]
        waits = iter(BACKOFF_SECONDS)
        while True:
            try:
                made = self.api.create_commit(
                    self.repo_id,
                    [*additions, *map(CommitOperationDelete, gone)],
                    commit_message=self.message,
                    revision=self.revision,
                    create_pr=self.create_pr,
                    parent_commit=remote.commit,
                )
                return made.oid, True, made.pr_url
            except HUB_ERRORS as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if self.create_pr and status != 429:
                    raise  # it may have been opened, and another try would open a second one
                if not wait_to_retry(error, waits, (*TRANSIENT, TIP_MOVED)):
                    raise
            # The answer may have been lost and the commit made: look it up rather than guess.
            now = self._look()
            if now is not None and now.holds(self.files):
                return now.commit, True, None
            if now is None or now.commit != remote.commit:
                raise HubError(
                    f"{self.repo_id}: expected commit {remote.commit[:8]} at the tip, found "
                    "another, pushed meanwhile; look at it, and push again"
                )


def _is_same(remote: RepoFile, path: Path) -> bool:
    """Compare by the names that the Hub gives contents: sha256, or git's own hash."""
    if remote.lfs is not None:
        with path.open("rb") as file:
            return remote.lfs.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    content = path.read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
