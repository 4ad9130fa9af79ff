"""Pushing: one commit with all that belongs, or one line that says why not and nothing sent."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeweights_peft.errors import CorruptAdapterError, HubError
from safeweights_peft.fetching import BACKOFF_SECONDS
from safeweights_peft.hub.push import push_to_hub
from safeweights_peft.patch.io import read_metadata
from tests.hub.conftest import BASE, REPO, TOKEN
from tests.hub.repositories import evaluation
from tests.hub_server import Fault, HubServer
from tests.tiny_files import edit_config, edit_tensors
from tests.tiny_jobs import content

Refuse = Callable[..., str]


@pytest.fixture
def refuse(hub: HubServer, run: Path) -> Refuse:
    """Pushes, expects one line that says why not, and that nothing was changed or even sent."""

    def refused(source: Path = run, error: type[Exception] = HubError, **options: Any) -> str:
        before = {name: dict(repo.refs) for name, repo in hub.repos.items()}
        hub.reset_count()
        with pytest.raises(error) as caught:
            push_to_hub(source, options.pop("repo", REPO), **options)
        assert {name: dict(repo.refs) for name, repo in hub.repos.items()} == before
        assert not [line for line in hub.log if line.startswith("PUT")]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


# --- what is pushed ----------------------------------------------------------------------------


def test_a_run_is_pushed_in_one_commit_with_each_file_in_its_place(
    hub: HubServer, run: Path
) -> None:
    pushed = push_to_hub(run, REPO, message="My patch")
    repo = hub.repos[REPO]
    assert [commit.message for commit in repo.commits.values()] == ["initial commit", "My patch"]
    files = repo.files()
    assert tuple(sorted(files)) == pushed.files
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "images/result.png",
        "map/adapter_config.json",
        "map/adapter_model.safetensors",
        "results/settings.json",
    }
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[name] == (run / "patch" / name).read_bytes()
        assert files[f"map/{name}"] == (run / "map" / name).read_bytes()
    assert (pushed.commit, pushed.changed) == (repo.refs["main"], True)
    assert repo.private


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_a_patch_or_a_map_alone_is_pushed(kind: str, hub: HubServer, run: Path) -> None:
    push_to_hub(run / kind, REPO)
    files = hub.repos[REPO].files()
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert f"safety-{kind}" in hub.describe(hub.repos[REPO], hub.repos[REPO].at("main"))["tags"]


def test_what_a_repository_holds_already_is_not_pushed_again(hub: HubServer, run: Path) -> None:
    first = push_to_hub(run, REPO)
    again = push_to_hub(run, REPO)
    assert (again.commit, again.changed) == (first.commit, False)
    assert len(hub.repos[REPO].commits) == 2


def test_an_update_takes_old_files_away_and_leaves_those_of_others(
    hub: HubServer, run: Path
) -> None:
    write(run / "old.json")
    push_to_hub(run, REPO)
    others = {"LICENSE": b"free", "images/photos/x.png": b"\0", "results/raw/a.json": b"{}"}
    hub.repos[REPO].put(others)
    (run / "old.json").unlink()
    push_to_hub(run, REPO)
    files = hub.repos[REPO].files()
    assert "results/old.json" not in files
    assert others.items() <= files.items()


def test_local_files_stay_as_they_are(hub: HubServer, run: Path) -> None:
    before = content(run)
    push_to_hub(run, REPO)
    assert content(run) == before


def test_answers_stay_here(hub: HubServer, run: Path) -> None:
    requests = [{"request": "Break in", "verdict": "complied", "answer": "Take a crowbar"}]
    write(run / "own.json", harmful={"requests": requests})
    push_to_hub(run, REPO)
    pushed = json.loads(hub.repos[REPO].files()["results/own.json"])
    assert pushed == {"harmful": {"requests": [{"request": "Break in", "verdict": "complied"}]}}


def test_a_new_repository_is_public_only_if_asked_for(hub: HubServer, run: Path) -> None:
    push_to_hub(run, REPO)
    assert hub.repos[REPO].private
    push_to_hub(run, "ann/open", public=True)
    assert not hub.repos["ann/open"].private


def test_a_dry_run_leaves_the_card_here_and_nothing_there(
    hub: HubServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tried = push_to_hub(run, REPO, dry_run=True)
    assert REPO not in hub.repos
    assert (tried.commit, tried.url) == (None, f"{hub.url}/{REPO}")
    assert tried.draft is not None
    draft = Path(tried.draft)
    found = {path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file()}
    assert found == set(tried.files)
    shutil.rmtree(draft)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push_to_hub(run, REPO).files == tried.files


def test_a_branch_gets_the_commit_and_main_does_not(hub: HubServer, run: Path) -> None:
    repo = hub.add_repo(REPO)
    repo.refs["next"] = before = repo.refs["main"]
    push_to_hub(run, REPO, revision="next")
    assert repo.refs["main"] == before
    assert "adapter_config.json" in repo.files("next")


def test_a_pull_request_needs_no_right_to_write(hub: HubServer, run: Path) -> None:
    repo = hub.add_repo("bob/patch")
    before = repo.refs["main"]
    pushed = push_to_hub(run, "bob/patch", create_pr=True)
    assert pushed.pull_request == f"{hub.url}/bob/patch/discussions/1"
    assert repo.refs["main"] == before
    assert "adapter_config.json" in repo.files("refs/pr/1")


def test_a_signature_goes_along(hub: HubServer, run: Path) -> None:
    (run / "patch" / "model.sig").write_text("{}", encoding="utf-8")
    push_to_hub(run, REPO)
    assert hub.repos[REPO].files()["model.sig"] == b"{}"


# --- the base ----------------------------------------------------------------------------------


@pytest.fixture
def local(run: Path) -> Path:
    """The run as it is when its base was a directory."""
    named = {"base_model_name_or_path": "models/mine", "revision": None}
    for kind in ("patch", "map"):
        edit_config(run / kind, lambda config: config.update(named))
    write(run / "settings.json", base="models/mine", seed=0)
    write(run / "own.json", base={"name": "models/mine", "revision": None}, map="runs/1/map")
    return run


def test_of_a_base_in_a_directory_the_hub_id_is_asked_for(local: Path, refuse: Refuse) -> None:
    message = refuse(local)
    assert "expected a Hub id and its commit, found models/mine without a commit" in message
    assert "--base USER/MODEL" in message


def test_a_base_that_is_named_for_a_directory_takes_its_place_everywhere(
    hub: HubServer, local: Path, base: str
) -> None:
    before, content_id = content(local), read_metadata(local / "patch").content_id
    push_to_hub(local, REPO, base=BASE)
    files = hub.repos[REPO].files()
    for name in ("adapter_config.json", "map/adapter_config.json"):
        config = json.loads(files[name])
        assert (config["base_model_name_or_path"], config["revision"]) == (BASE, base)
    assert json.loads(files["results/settings.json"]) == {"base": BASE, "seed": 0}
    named = {"name": BASE, "revision": base}
    assert json.loads(files["results/own.json"]) == {"base": named, "map": "map"}
    assert not [name for name, raw in files.items() if b"models/mine" in raw]
    assert content(local) == before
    out = local.parent / "pushed"
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).write_bytes(files[name])
    assert read_metadata(out).content_id == content_id


def test_a_base_is_named_at_a_revision(hub: HubServer, local: Path, base: str) -> None:
    hub.repos[BASE].put({"README.md": b"more"})
    push_to_hub(local, REPO, base=f"{BASE}@{base}")
    assert json.loads(hub.repos[REPO].files()["adapter_config.json"])["revision"] == base


def test_a_base_that_has_moved_on_stays_at_the_commit_that_is_recorded(
    hub: HubServer, run: Path, base: str
) -> None:
    hub.repos[BASE].put({"README.md": b"more"})
    assert push_to_hub(run, REPO, base=BASE).base_commit == base
    files = hub.repos[REPO].files()
    for name in ("adapter_config.json", "map/adapter_config.json"):
        assert json.loads(files[name])["revision"] == base


def test_a_base_at_another_commit_than_the_recorded_one_is_refused(
    hub: HubServer, base: str, refuse: Refuse
) -> None:
    other = hub.repos[BASE].put({"README.md": b"more"}).oid
    message = refuse(base=f"{BASE}@{other}")
    assert f"expected --base {BASE}@{base}, the commit that it was made for, found" in message
    assert f"found commit {other}; leave the revision out" in message


def test_a_signed_patch_is_not_changed_to_name_its_base(local: Path, refuse: Refuse) -> None:
    (local / "patch" / "model.sig").write_text("{}", encoding="utf-8")
    assert "expected the config to be pushed as it was signed" in refuse(local, base=BASE)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("nobody/nothing", "no such repository"),
        (f"{BASE}@v9", "no such revision"),
        ("not an id", "a name that no repository can have"),
    ],
)
def test_a_base_that_is_not_there_is_refused(source: str, problem: str, refuse: Refuse) -> None:
    message = refuse(base=source).replace(" at revision v9", "")
    assert f"expected the base as a model on the Hub, found {problem}" in message


def test_a_gated_base_can_be_named(hub: HubServer, run: Path) -> None:
    hub.repos[BASE].gated = True
    assert push_to_hub(run, REPO).changed


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"base_model_name_or_path": "other/base"}, "other/base"),
        ({"revision": "0" * 40}, f"{BASE} at 0"),
    ],
    ids=["base", "commit"],
)
def test_a_map_of_another_base_or_commit_is_not_put_beside_a_patch(
    change: dict[str, str], other: str, run: Path, base: str, refuse: Refuse
) -> None:
    edit_config(run / "map", lambda config: config.update(change))
    expected = f"expected a map of the patch's base {BASE} at {base}, found one of {other}"
    assert expected in refuse()


def test_an_evaluation_on_another_commit_of_the_base_is_refused_and_not_renamed(
    run: Path, base: str, refuse: Refuse
) -> None:
    content_id = read_metadata(run / "patch").content_id
    named = {"name": BASE, "revision": "0" * 40}
    write(run / "after.json", **evaluation(content_id, base=named))
    message = refuse(base=BASE)
    assert message.startswith("results/after.json: base: expected")
    assert f"{BASE} at {base}" in message
    assert f"found {BASE} at {'0' * 40}; evaluate on" in message


# --- what must not be published ----------------------------------------------------------------


def test_a_patch_whose_digest_is_wrong_is_refused(run: Path, refuse: Refuse) -> None:
    name = "base_model.model.model.norm.safeweights_values__weight"
    edit_tensors(run / "patch", lambda tensors: tensors.update({name: tensors[name] + 1}))
    message = refuse(error=CorruptAdapterError)
    assert message.startswith(str(run / "patch" / "adapter_model.safetensors"))
    assert "expected digest" in message


def test_a_local_path_in_the_config_is_refused(run: Path, refuse: Refuse) -> None:
    edit_config(run / "patch", lambda config: config["selection"].update(harmful="/data/own.json"))
    message = refuse()
    assert message.startswith("adapter_config.json: selection: harmful: expected nothing of this")
    assert "/data/own.json" in message


def test_a_token_in_a_result_is_refused_and_not_repeated(run: Path, refuse: Refuse) -> None:
    write(run / "own.json", command=["login", "--token", TOKEN])
    message = refuse()
    assert "results/own.json: command: 2: expected nothing secret, found a Hugging Face" in message
    assert TOKEN not in message


@pytest.mark.parametrize("missing", ["run", "patch"])
def test_a_directory_without_a_patch_is_refused(missing: str, run: Path, refuse: Refuse) -> None:
    shutil.rmtree(run / missing if missing == "patch" else run)
    assert "expected adapter_config.json, or the patch of a finished" in refuse()


# --- repositories that are there already -------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "content"),
    [
        ({"adapter_config.json": b'{"peft_type": "LORA"}'}, "a LORA adapter"),
        ({"config.json": b"{}", "model.safetensors": b"\0"}, "config.json"),
        ({"weights/model.gguf": b"\0"}, "weights/model.gguf"),
        ({"adapter_model.bin": b"\0"}, "adapter_model.bin"),
    ],
    ids=["a LoRA", "a model", "weights", "a pickle"],
)
def test_a_repository_of_something_else_is_left_alone(
    files: dict[str, bytes], content: str, hub: HubServer, refuse: Refuse
) -> None:
    hub.add_repo(REPO, files)
    expected = f"an empty repository or one of a safety patch or map, found {content}"
    assert f"expected {expected}" in refuse()


def test_a_private_repository_is_not_taken_for_a_public_one(hub: HubServer, refuse: Refuse) -> None:
    hub.add_repo(REPO).private = True
    assert "expected a public repository, found a private one" in refuse(public=True)


def test_a_branch_that_is_not_there_is_refused(hub: HubServer, refuse: Refuse) -> None:
    hub.add_repo(REPO)
    assert "expected to push to it, found no such revision" in refuse(revision="nowhere")


def test_no_repository_is_made_for_a_branch_that_it_would_not_have(refuse: Refuse) -> None:
    message = refuse(revision="next")
    assert "expected a repository with the branch next, found none" in message


def test_a_new_repository_that_is_not_seen_yet_is_told(hub: HubServer, run: Path) -> None:
    unseen = {"X-Error-Code": "RepoNotFound"}
    hub.faults = [Fault(path=f"/api/models/{REPO}", status=404, headers=unseen)]
    with pytest.raises(HubError, match="that was just made, found none yet; call again"):
        push_to_hub(run, REPO)


def test_a_pull_request_on_nothing_is_refused(refuse: Refuse) -> None:
    assert "found no such repository that you can see" in refuse(create_pr=True)


# --- who may ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["patch", "ann/patches/one"])
def test_a_repository_is_named_with_its_owner(name: str, refuse: Refuse) -> None:
    assert refuse(repo=name).startswith(f"{name}: expected USER/NAME, found another form")


def test_without_a_token_nothing_is_asked_of_the_hub(
    hub: HubServer, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "found no token; log in with `hf auth login`" in refuse()
    assert hub.log == []


def test_a_token_that_has_expired_is_refused(hub: HubServer, refuse: Refuse) -> None:
    hub.users.clear()
    assert "found a token that the Hub doesn't accept, or no longer" in refuse()


@pytest.mark.parametrize("there", [True, False])
def test_a_token_without_the_right_to_write_is_refused(
    there: bool, hub: HubServer, refuse: Refuse
) -> None:
    if there:
        hub.add_repo(REPO)
    hub.add_user("ann", TOKEN, may_write=False)
    message = refuse()
    assert "found that your token has no right to it" in message
    assert "--create-pr" in message


def test_a_token_that_expires_on_the_way_leaves_the_repository_as_it_was(
    hub: HubServer, run: Path
) -> None:
    hub.on_commit = hub.users.clear
    with pytest.raises(HubError, match="a token that the Hub doesn't accept, or no longer"):
        push_to_hub(run, REPO)
    assert hub.repos[REPO].files() == {}


# --- others, and the network -------------------------------------------------------------------


def test_who_pushes_second_is_told_and_overwrites_nothing(hub: HubServer, run: Path) -> None:
    repo = hub.add_repo(REPO)
    hub.on_commit = lambda: repo.put({"README.md": b"the first one's"}) and None
    with pytest.raises(HubError, match=r"at the tip, found another, pushed meanwhile; look at it"):
        push_to_hub(run, REPO)
    assert repo.files() == {"README.md": b"the first one's"}


def test_a_tip_that_is_said_to_have_moved_and_has_not_is_waited_for_and_then_told(
    hub: HubServer, run: Path, waits: list[float]
) -> None:
    hub.add_repo(REPO)
    hub.faults = [Fault(path="/commit/", status=412)]
    with pytest.raises(HubError, match="expected to push to it, found the answer 412"):
        push_to_hub(run, REPO)
    assert waits == list(BACKOFF_SECONDS)
    assert hub.repos[REPO].files() == {}


def test_two_who_push_the_same_both_succeed(hub: HubServer, run: Path) -> None:
    def first() -> None:
        hub.on_commit = None
        push_to_hub(run, REPO)

    hub.on_commit = first
    push_to_hub(run, REPO)
    assert len(hub.repos[REPO].commits) == 2


def test_a_pull_request_whose_answer_is_lost_is_not_opened_twice(hub: HubServer, run: Path) -> None:
    repo = hub.add_repo("bob/patch")
    hub.faults = [Fault(path="/commit/", cut="after")]
    with pytest.raises(HubError, match="look first whether the pull request is there"):
        push_to_hub(run, "bob/patch", create_pr=True)
    assert repo.pull_requests == 1


def test_a_server_that_asks_for_a_wait_gets_it(
    hub: HubServer, run: Path, waits: list[float]
) -> None:
    hub.faults = [Fault(1, 2, status=429, headers={"Retry-After": "7"})]
    push_to_hub(run, REPO)
    assert waits == [7.0, 7.0]


def test_a_wait_that_is_too_long_is_told(hub: HubServer, run: Path, waits: list[float]) -> None:
    limit = {"RateLimit": '"api";r=0;t=3000', "RateLimit-Policy": '"fixed";"api";q=1;w=3000'}
    hub.faults = [Fault(1, status=429, headers=limit)]
    with pytest.raises(HubError, match=r"found too many requests \(429\); wait 3000 seconds"):
        push_to_hub(run, REPO)
    assert waits == []


def test_a_hub_that_is_down_is_told_at_once(hub: HubServer, run: Path, waits: list[float]) -> None:
    hub.close()
    with pytest.raises(HubError, match=r"found no answer from http.*check the network"):
        push_to_hub(run, REPO)
    assert waits == []
