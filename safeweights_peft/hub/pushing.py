"""Pushes a patch or a map to the Hub: everything that belongs to it, in one commit.

All is laid out in a folder of its own and checked before anything is sent. Large files go ahead
into the Hub's storage, where nobody sees them; the commit that names them is one request, made on
top of the commit that was looked at. So whatever happens on the way, the repository is as it was or
complete, and a push that is called again goes on with what the storage has.

huggingface_hub's upload_folder may make several commits, and so isn't used here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from safeweights_peft.errors import HubError
from safeweights_peft.fetching import (
    HUB_ERRORS,
    PASSING,
    WAITS_SECONDS,
    download,
    explain,
    named_base,
    patiently,
    split_revision,
    wait_out,
)
from safeweights_peft.files import read_json
from safeweights_peft.hub.card import write_card
from safeweights_peft.hub.layout import belongs, is_foreign
from safeweights_peft.hub.leaks import check_shareable
from safeweights_peft.hub.staging import Base, find_adapter, stage
from safeweights_peft.patch.io import CONFIG_FILE
from safeweights_peft.patch.metadata import PEFT_TYPE

TIP_MOVED = 412
"""The Hub's answer to a commit on top of one that isn't the tip, or for a while isn't yet."""


@dataclass(frozen=True)
class Pushed:
    """What a push has done.

    Attributes:
        repo_id: the repository.
        commit: the commit that holds it all.
        changed: whether it is a new one; False if the repository held it all before.
        pull_request: the address of the pull request, if one was opened.
        files: the files of the patch or map there.
        base: the Hub id of its base.
        base_commit: the base's commit.
    """

    repo_id: str
    commit: str
    changed: bool
    pull_request: str | None
    files: tuple[str, ...]
    base: str
    base_commit: str


def push_to_hub(
    source: str | Path,
    repo_id: str,
    *,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> Pushed:
    """Push a patch or a map, with its card, results, map and pictures, in one commit.

    A repository that isn't there is made. In one that is, files of an earlier push that are no
    longer there are deleted in the same commit; files of others are left alone.

    Args:
        source: directory of a run of `enhance`, or of a patch or a map; nothing in it is changed.
        repo_id: where to, as ``USER/NAME``.
        base: the base's Hub id, perhaps ``@REVISION``, where the files name a directory.
        private: whether a new repository is private.
        revision: branch to push to; the main branch if None.
        create_pr: open a pull request instead, to which no right to write is needed.
        message: the commit's message.

    Returns:
        What was done.

    Raises:
        HubError: something must not be published, the repository holds something else or has
            changed meanwhile, or the Hub refuses.
        FormatError: the patch or the map breaks a rule of the format.
    """
    source = Path(source)
    _check_login(repo_id)
    with TemporaryDirectory() as folder:
        found = _find_base(find_adapter(source), base)
        artifact = stage(source, Path(folder), found).mode.artifact
        write_card(Path(folder), repo_id)
        check_shareable(Path(folder))
        change = _Change(Path(folder), repo_id, revision, create_pr, message or f"Push {artifact}")
        with _saying(repo_id, create_pr):
            commit, changed, pull_request = change.push(private)
        files = tuple(change.files)
    return Pushed(repo_id, commit, changed, pull_request, files, found.repo_id, found.commit)


def _check_login(repo_id: str) -> None:
    if repo_id.count("/") != 1:
        raise HubError(f"{repo_id}: expected USER/NAME, found another form; name the repository so")
    if huggingface_hub.get_token() is None:
        raise HubError(
            f"{repo_id}: expected to push to it, found no token; log in with `hf auth login`, or "
            "set HF_TOKEN"
        )


def _find_base(adapter: Path, given: str | None) -> Base:
    """Find the Hub id and the commit of the base, and that both are there."""
    name, revision = split_revision(given) if given else (None, None)
    name, recorded = named_base(name, [adapter])
    if given is None and recorded is None:
        raise HubError(
            f"{adapter}: base_model_name_or_path: expected a Hub id and its commit, found {name} "
            "without a commit, a directory; say by --base USER/MODEL[@REVISION] where others find "
            "this base"
        )
    revision = revision or recorded
    at = f" at revision {revision}" if revision else ""
    try:
        info = patiently(lambda: HfApi().model_info(name, revision=revision))
    except HUB_ERRORS as error:
        wanted = f"the base as a model on the Hub{at}"
        raise HubError(f"{name}: expected {wanted}, {explain(error, name)}") from error
    assert info.sha is not None
    if given is not None and recorded not in (None, info.sha):
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
        """Tell whether these are the files of the layout, each with this content."""
        theirs = {name for name in self.files if belongs(name)}
        return theirs == files.keys() and all(
            _is_same(self.files[name], path) for name, path in files.items()
        )


class _Change:
    """One commit on top of what a repository holds."""

    def __init__(
        self, folder: Path, repo_id: str, revision: str | None, create_pr: bool, message: str
    ) -> None:
        paths = sorted(each for each in folder.rglob("*") if each.is_file())
        self.files = {path.relative_to(folder).as_posix(): path for path in paths}
        self.repo_id = repo_id
        self.revision = revision
        self.create_pr = create_pr
        self.message = message
        self.api = HfApi()

    def push(self, private: bool) -> tuple[str, bool, str | None]:
        """Look at the repository, or makes it, and commits what is to change."""
        remote = self._look()
        if remote is None:
            if self.revision not in (None, "main"):
                raise HubError(
                    f"{self.repo_id}: expected a repository with the branch {self.revision}, found "
                    "none that you can see; push to its main branch first"
                )
            patiently(
                lambda: self.api.create_repo(self.repo_id, private=private or None, exist_ok=True)
            )
            remote = self._look()
            if remote is None:
                raise HubError(
                    f"{self.repo_id}: expected the repository that was just made, found none yet; "
                    "call again"
                )
        elif private and not remote.private:
            raise HubError(
                f"{self.repo_id}: expected a private repository, found a public one; make it "
                "private on the Hub first, or leave out --private"
            )
        self._check_ours(remote)
        if remote.holds(self.files):
            return remote.commit, False, None
        return self._commit(remote)

    def _look(self) -> _Remote | None:
        """List what the repository holds; None if it isn't there."""
        try:
            info = patiently(lambda: self.api.model_info(self.repo_id, revision=self.revision))
        except RepositoryNotFoundError as error:
            if self.create_pr or isinstance(error, GatedRepoError):
                raise
            return None
        assert info.sha is not None
        commit = info.sha
        listed = patiently(
            lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit))
        )
        files = {each.path: each for each in listed if isinstance(each, RepoFile)}
        return _Remote(commit, bool(info.private), files)

    def _check_ours(self, remote: _Remote) -> None:
        """Refuse a repository that holds something else, which the push would spoil."""
        foreign = sorted(filter(is_foreign, remote.files))
        if not foreign and CONFIG_FILE in remote.files:
            wanted = f"its {CONFIG_FILE}"
            folder = download(self.repo_id, [CONFIG_FILE], wanted, remote.commit, HubError)
            kind = read_json(folder / CONFIG_FILE, HubError).get("peft_type")
            foreign = [] if kind == PEFT_TYPE else [f"a {str(kind)[:40]} adapter"]
        if foreign:
            raise HubError(
                f"{self.repo_id}: expected an empty repository or one of a safety patch or map, "
                f"found {foreign[0]} in it; give another name"
            )

    def _commit(self, remote: _Remote) -> tuple[str, bool, str | None]:
        """Send large files ahead, then commits; a lost answer is looked up, not guessed."""
        additions = [CommitOperationAdd(name, str(path)) for name, path in self.files.items()]
        gone = [name for name in remote.files if belongs(name) and name not in self.files]
        self.api.preupload_lfs_files(
            self.repo_id,
            additions,
            revision=self.revision,
            create_pr=self.create_pr,
            free_memory=False,
        )
        waits = iter(WAITS_SECONDS)
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
                if not wait_out(error, waits, (*PASSING, TIP_MOVED)):
                    raise
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


@contextmanager
def _saying(repo_id: str, create_pr: bool) -> Iterator[None]:
    """Turn what the Hub's client raises into one line."""
    try:
        yield
    except HUB_ERRORS as error:
        told = explain(error, repo_id)
        if create_pr:
            told += "; look first whether the pull request is there"
        elif isinstance(error, HfHubHTTPError) and error.response.status_code == 403:
            told += "; or propose the push by --create-pr"
        raise HubError(f"{repo_id}: expected to push to it, {told}") from error
