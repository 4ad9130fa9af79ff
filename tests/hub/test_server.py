"""The Hub on loopback refuses what the Hub refuses; else a test against it would prove nothing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError

from tests.hub_server import Fault, HubServer, oid_of

REPO = "ann/things"
LARGE = b"\0" + b"weights" * 100


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    hub.add_repo(REPO)
    return HfApi()


def commit(api: HfApi, files: dict[str, bytes], **options: Any) -> str:
    operations = [CommitOperationAdd(path, raw) for path, raw in files.items()]
    return api.create_commit(REPO, operations, commit_message="test", **options).oid


def lines(*operations: tuple[str, dict[str, Any]]) -> bytes:
    header = ("header", {"summary": "by hand", "description": ""})
    entries = [{"key": key, "value": value} for key, value in (header, *operations)]
    return b"\n".join(json.dumps(entry).encode() for entry in entries)


def post(hub: HubServer, path: str, body: bytes) -> int:
    token = {"authorization": f"Bearer {next(iter(hub.users))}"}
    return get_session().post(hub.url + path, content=body, headers=token).status_code


def test_what_is_committed_is_downloaded_and_listed_with_the_hashes_of_the_hub(
    api: HfApi,
) -> None:
    files = {"small.txt": b"text", "large.bin": LARGE, "in/a/folder.txt": b""}
    oid = commit(api, files)
    for path, raw in files.items():
        assert Path(hf_hub_download(REPO, path)).read_bytes() == raw
    listed = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    empty = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's name of an empty file
    assert listed["in/a/folder.txt"].blob_id == empty
    assert listed["large.bin"].lfs.sha256 == hashlib.sha256(LARGE).hexdigest()
    assert api.model_info(REPO).sha == oid
    assert {entry.path for entry in api.get_paths_info(REPO, ["small.txt", "none"])} == {
        "small.txt"
    }
    assert [entry.name for entry in api.list_repo_refs(REPO).branches] == ["main"]


def test_one_commit_adds_and_deletes(hub: HubServer, api: HfApi) -> None:
    commit(api, {"old.txt": b"old"})
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("old.txt")]
    api.create_commit(REPO, operations, commit_message="both")
    assert hub.repos[REPO].files() == {"new.txt": b"new"}


def test_a_part_of_a_file_is_given_by_range_and_an_unchanged_one_not_again(
    hub: HubServer, api: HfApi
) -> None:
    commit(api, {"small.txt": b"0123456789"})
    url = f"{hub.url}/{REPO}/resolve/main/small.txt"
    part = get_session().get(url, headers={"Range": "bytes=3-5"})
    assert (part.status_code, part.content) == (206, b"345")
    again = get_session().get(url, headers={"If-None-Match": part.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_parent_commit_has_to_be_the_tip(api: HfApi) -> None:
    first = commit(api, {"a.txt": b"1"})
    commit(api, {"a.txt": b"2"}, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, {"a.txt": b"3"}, parent_commit=first)


def test_a_failing_operation_undoes_the_whole_commit(hub: HubServer, api: HfApi) -> None:
    added = ("file", {"path": "a.txt", "content": "YQ==", "encoding": "base64"})
    gone = ("deletedFile", {"path": "none.txt"})
    assert post(hub, f"/api/models/{REPO}/commit/main", lines(added, gone)) == 400
    assert hub.repos[REPO].files() == {}


@pytest.mark.parametrize("size", [len(LARGE), len(LARGE) + 1])
def test_a_pointer_to_what_was_not_stored_is_refused(size: int, hub: HubServer, api: HfApi) -> None:
    if size != len(LARGE):
        hub.stored[oid_of(LARGE, True)] = LARGE
    value = {"path": "a.bin", "algo": "sha256", "oid": oid_of(LARGE, True), "size": size}
    path = f"/api/models/{REPO}/commit/main"
    assert post(hub, path, lines(("lfsFile", value))) == 400


@pytest.mark.parametrize(
    ("oid", "size"), [(oid_of(LARGE, True), 3), (oid_of(b"other", True), len(LARGE))]
)
def test_the_storage_takes_only_what_was_announced(
    oid: str, size: int, hub: HubServer, api: HfApi
) -> None:
    answer = get_session().put(f"{hub.storage}/put/{oid}/{size}", content=LARGE)
    assert answer.status_code == 400
    assert hub.stored == {}


def test_the_storage_refuses_a_token(hub: HubServer, api: HfApi) -> None:
    url = f"{hub.storage}/get/{oid_of(LARGE, True)}"
    answer = get_session().get(url, headers={"authorization": "Bearer any"})
    assert answer.status_code == 400


def test_whoever_has_no_token_or_an_old_one_is_unknown(hub: HubServer, api: HfApi) -> None:
    assert api.whoami()["name"] == "ann"
    hub.users.clear()
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_cut_connection_is_cut_before_or_after_the_deed(
    cut: str, hub: HubServer, api: HfApi
) -> None:
    hub.reset_count()
    hub.faults = [Fault(path="/commit/", cut=cut)]
    with pytest.raises(Exception, match="disconnected"):
        commit(api, {"a.txt": b"1"})
    assert bool(hub.repos[REPO].files()) is (cut == "after")
