"""Pulling: only what belongs, checked, from the Hub or the cache; or one line that says why."""

import json
from pathlib import Path

import pytest

from safeweights_peft.errors import CorruptAdapterError, FormatError, HubError, ModelError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.hub.pull import fetch_adapter, pull_from_hub
from safeweights_peft.hub.push import push_to_hub
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import verify
from safeweights_peft.patch.io import read_artifact
from tests.hub.conftest import BASE, REPO
from tests.hub_server import Fault, HubServer
from tests.tiny_jobs import content

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def pushed(hub: HubServer, run: Path) -> Path:
    """The run, pushed; the count of requests begins anew."""
    push_to_hub(run, REPO)
    hub.reset_count()
    return run


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_what_was_pushed_comes_back_and_fits_its_base(
    kind: str, hub: HubServer, run: Path, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    push_to_hub(run / kind, REPO)
    pulled = pull_from_hub(REPO, tmp_path / "out")
    there = read_artifact(run / kind).metadata
    assert (pulled.path, pulled.artifact) == (str(tmp_path / "out"), f"safety {kind}")
    assert pulled.content_id == there.content_id
    for name in ADAPTER:
        assert (tmp_path / "out" / name).read_bytes() == (run / kind / name).read_bytes()
    assert verify(tmp_path / "out", tiny_llama_bf16).ok


def test_a_pulled_patch_merges_as_the_one_that_was_pushed(
    pushed: Path, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    merge(tiny_llama_bf16, pull_from_hub(REPO).path, tmp_path / "pulled")
    merge(tiny_llama_bf16, pushed / "patch", tmp_path / "here")
    weights = "model.safetensors"
    assert (tmp_path / "pulled" / weights).read_bytes() == (
        tmp_path / "here" / weights
    ).read_bytes()


def test_what_was_pulled_can_be_pushed_again_as_it_is(
    pushed: Path, hub: HubServer, tmp_path: Path
) -> None:
    pull_from_hub(REPO, tmp_path / "out")
    assert not push_to_hub(tmp_path / "out", REPO).changed


def test_all_that_belongs_is_fetched_and_nothing_else(
    pushed: Path, hub: HubServer, tmp_path: Path
) -> None:
    others = {
        "LICENSE": b"free",
        "training_args.bin": b"\0",
        "run.py": b"boom()",
        "images/photos/x.png": b"\0",
    }
    hub.repos[REPO].put(others)
    whole = hub.repos[REPO].files()
    pulled = pull_from_hub(REPO, tmp_path / "out")
    assert content(tmp_path / "out") == {
        path: raw for path, raw in whole.items() if path not in others
    }
    assert pulled.unsafe == ("training_args.bin",)
    assert not [line for line in hub.log if line.endswith((".bin", ".py", "LICENSE"))]


def test_to_load_one_only_the_adapter_itself_is_fetched(pushed: Path) -> None:
    assert set(content(fetch_adapter(REPO))) == ADAPTER


def test_a_revision_is_fetched_by_branch_or_commit(pushed: Path, hub: HubServer) -> None:
    first = hub.repos[REPO].refs["main"]
    hub.repos[REPO].refs["v1"] = first
    hub.repos[REPO].put({"results/new.json": b"{}"})
    assert pull_from_hub(f"{REPO}@v1").commit == first
    assert pull_from_hub(f"{REPO}@{first}").commit == first
    assert pull_from_hub(REPO).commit == hub.repos[REPO].refs["main"] != first


def test_a_base_that_has_moved_on_is_told_with_both_commits(
    pushed: Path, hub: HubServer, base: str
) -> None:
    assert not pull_from_hub(REPO).base_moved_on
    latest = hub.repos[BASE].put({"README.md": b"more"}).oid
    pulled = pull_from_hub(REPO)
    assert pulled.base_moved_on
    assert (pulled.base_commit, pulled.base_latest) == (base, latest)


def test_what_was_pulled_is_found_again_without_a_network(
    pushed: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = pull_from_hub(REPO)
    hub.reset_count()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = pull_from_hub(REPO)
    assert (offline.path, offline.commit) == (online.path, online.commit)
    assert offline.base_latest is None
    assert not offline.base_moved_on
    assert hub.log == []


def test_without_a_network_and_a_copy_it_says_so(
    pushed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="not all of it in the cache, and HF_HUB_OFFLINE set"):
        pull_from_hub(REPO)


def test_an_existing_directory_is_not_overwritten_unasked(
    pushed: Path, hub: HubServer, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(HubError, match="expected an empty directory or none, found files"):
        pull_from_hub(REPO, tmp_path / "out")
    assert hub.log == []
    pull_from_hub(REPO, tmp_path / "out", overwrite=True)
    assert ADAPTER < set(content(tmp_path / "out"))


# --- what is refused ---------------------------------------------------------------------------


LORA = json.dumps({"peft_type": "LORA", "r": 8}).encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": LORA, "adapter_model.safetensors": b"\0"}, "'LORA'"),
        ({"adapter_config.json": LORA, "adapter_model.bin": b"\0"}, "adapter_model.bin, which can"),
        ({"config.json": b"{}", "model.safetensors": b"\0"}, "found config.json"),
        ({"README.md": b"soon"}, "adapter_config.json, found none"),
    ],
    ids=["a LoRA", "a pickled one", "a model", "nothing"],
)
def test_a_repository_of_something_else_is_named_with_what_it_holds(
    files: dict[str, bytes], message: str, hub: HubServer
) -> None:
    hub.add_repo(REPO, files)
    with pytest.raises((HubError, FormatError), match=f"^{REPO}.*{message}") as caught:
        pull_from_hub(REPO)
    assert "\n" not in str(caught.value)
    assert not [line for line in hub.log if ".bin" in line]


@pytest.mark.parametrize("where", ["", "map/"])
def test_a_patch_that_was_tampered_with_is_refused_by_its_name(
    where: str, pushed: Path, hub: HubServer, tmp_path: Path
) -> None:
    raw = bytearray(hub.repos[REPO].files()[f"{where}adapter_model.safetensors"])
    raw[-1] ^= 1
    commit = hub.repos[REPO].put({f"{where}adapter_model.safetensors": bytes(raw)}).oid
    with pytest.raises(CorruptAdapterError, match=f"^{REPO}@{commit[:8]}/{where}adapter_model"):
        pull_from_hub(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ann/nothing", "no such repository that you can see"),
        (f"{REPO}@v9", "at revision v9, found no such revision"),
        ("not an id", "found a name that no repository can have"),
        ("bob/secret", "no such repository that you can see"),
        ("bob/gated", "found a gated repository; ask for access at http"),
    ],
)
def test_what_can_not_be_had_is_told_in_one_line(
    source: str, message: str, pushed: Path, hub: HubServer
) -> None:
    files = hub.repos[REPO].files()
    hub.add_repo("bob/secret", files, private=True)
    hub.add_repo("bob/gated", files, gated=True)
    with pytest.raises(HubError, match=message) as caught:
        pull_from_hub(source)
    assert "\n" not in str(caught.value)


def test_a_gated_base_is_told_in_one_line_as_well(hub: HubServer, base: str) -> None:
    hub.repos[BASE].gated = True
    with pytest.raises(ModelError, match=f"^{BASE}: .*found a gated repository; ask for") as caught:
        resolve_base(BASE, base)
    assert "\n" not in str(caught.value)


# --- the network -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(path="/get/", last=4, cut="midway"),
        Fault(path="/get/", last=12, cut="before"),
        Fault(last=3, status=503),
        Fault(last=2, status=429, headers={"Retry-After": "3"}),
    ],
    ids=["cut midway", "cut", "503", "429"],
)
def test_a_fault_that_passes_is_waited_out(fault: Fault, pushed: Path, hub: HubServer) -> None:
    hub.faults = [fault]
    folder = fetch_adapter(REPO)
    assert len(hub.log) > 4
    for name in ADAPTER:
        assert (folder / name).read_bytes() == (pushed / "patch" / name).read_bytes()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(status=500), "found an error of the server"),
        (Fault(status=429), "found too many requests"),
        (Fault(cut="before"), "found no answer from"),
        (Fault(path="/get/", cut="midway"), "found no answer from"),
    ],
    ids=["500", "429", "cut", "cut midway"],
)
def test_a_fault_that_stays_is_told_and_leaves_nothing(
    fault: Fault, message: str, pushed: Path, hub: HubServer, tmp_path: Path
) -> None:
    hub.faults = [fault]
    with pytest.raises(HubError, match=message) as caught:
        pull_from_hub(REPO, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    pull_from_hub(REPO, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
