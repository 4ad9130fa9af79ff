"""The commands that share: what they print, how they end; and Hub ids in place of directories."""

import json
from pathlib import Path

import pytest

from safeweights_peft.signing import sign
from tests.cli.conftest import call
from tests.hub.conftest import BASE, REPO
from tests.hub_server import HubServer
from tests.test_signing import Keys


@pytest.fixture
def pushed(hub: HubServer, run: Path) -> HubServer:
    assert call("push", run, REPO).exit_code == 0
    return hub


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def test_push_tells_the_commit_the_base_and_the_files(hub: HubServer, run: Path, base: str) -> None:
    called = call("push", run, REPO, "--json", "--commit-message", "Mine")
    assert called.exit_code == 0, called.output
    printed = json.loads(called.stdout)
    repo = hub.repos[REPO]
    assert printed["commit"] == repo.refs["main"]
    assert (printed["base"], printed["base_commit"]) == (BASE, base)
    assert printed["files"] == sorted(repo.files())
    assert repo.private
    assert repo.at("main").message == "Mine"


def test_push_says_where_it_is_and_a_dry_run_where_the_card_is(hub: HubServer, run: Path) -> None:
    tried = call("push", run, REPO, "--dry-run").stdout
    assert REPO not in hub.repos
    card = next(line.split()[-1] for line in tried.splitlines() if line.startswith("not pushed"))
    assert Path(card).read_text(encoding="utf-8").startswith("---")
    assert f"{hub.url}/{REPO}" in call("push", run, REPO).stdout


def test_push_says_where_the_pull_request_is(hub: HubServer, run: Path) -> None:
    hub.add_repo("bob/patch")
    called = call("push", run, "bob/patch", "--create-pr")
    assert f"pull request  {hub.url}/bob/patch/discussions/1" in called.stdout


def test_pull_tells_what_it_fetched_and_what_it_left(pushed: HubServer, tmp_path: Path) -> None:
    pushed.repos[REPO].put({"extra.pkl": b"\0"})
    latest = pushed.repos[BASE].put({"README.md": b"more"}).oid
    called = call("pull", REPO, "--out", tmp_path / "out", "--json")
    assert called.exit_code == 0, called.output
    assert json.loads(called.stdout)["commit"] == pushed.repos[REPO].refs["main"]
    assert "Not fetched: extra.pkl, which can run code." in called.stderr
    assert f"its main branch is at {latest}" in called.stderr


def test_pull_spells_out_what_a_stranger_s_names_would_do_to_the_terminal(
    pushed: HubServer,
) -> None:
    pushed.repos[REPO].put({"a\x1b[2J.pkl": b"\0"})
    config = json.loads(pushed.repos[REPO].files()["adapter_config.json"])
    config["revision"] = "\x1b[2J"
    pushed.repos[REPO].put({"adapter_config.json": json.dumps(config).encode()})
    called = call("pull", REPO)
    assert called.exit_code == 0, called.output
    assert "Not fetched: a\\x1b[2J.pkl, which can run code." in called.stderr
    assert "made for commit \\x1b[2J, its main" in called.stderr
    assert "\x1b" not in called.stdout


def test_list_shows_what_is_there_for_a_base(pushed: HubServer) -> None:
    called = call("list", "--base", BASE)
    assert [line.split()[:3] for line in called.stdout.splitlines()] == [
        ["repository", "kind", "date"],
        [REPO, "safety", "patch"],
    ]
    printed = json.loads(call("list", "--base", BASE, "--json").stdout)
    assert [shared["repo_id"] for shared in printed["found"]] == [REPO]


def test_list_says_that_nothing_was_found_and_sends_no_directory_s_name(
    hub: HubServer, run: Path
) -> None:
    assert (
        call("list", "--base", "nobody/none").stdout == "No patch or map for nobody/none found.\n"
    )
    hub.reset_count()
    called = call("list", "--base", run)
    assert "expected the Hub id of a base, as patches name it, found a directory" in called.stderr
    assert not hub.log


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", REPO],
        ["inspect", f"{REPO}@main"],
        ["verify", REPO, "--base", "BASE"],
        ["compare", REPO, REPO],
        ["merge", "BASE", REPO, "--out", "OUT"],
        ["merge", "BASE", f"{REPO}@0.5", "--out", "OUT"],
        ["merge", "BASE", f"{REPO}@main@0.5", "--out", "OUT"],
        ["merge", BASE, REPO, "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_a_hub_id_stands_for_an_adapter_s_directory(
    arguments: list[str], pushed: HubServer, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    places = {"BASE": str(tiny_llama_bf16), "OUT": str(tmp_path / "out")}
    called = call(*(places.get(argument, argument) for argument in arguments), "--json")
    assert called.exit_code == 0, called.output
    if arguments[0] == "merge":
        scale = 0.5 if arguments[2].endswith("0.5") else 1.0
        assert json.loads(called.stdout)["patches"][0]["scale"] == scale


def test_a_signature_on_the_hub_is_verified_there(
    hub: HubServer, run: Path, keys: Keys, tmp_path: Path
) -> None:
    sign(run / "patch", keys.private)
    assert call("push", run, REPO).exit_code == 0
    called = call("verify-signature", REPO, "--key", keys.public)
    assert called.exit_code == 0, called.output
    other = Keys(tmp_path, "other").public
    assert call("verify-signature", REPO, "--key", other).exit_code == 1


def test_a_directory_comes_before_a_hub_id(
    hub: HubServer, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    hub.reset_count()
    assert call("inspect", "made/patch").exit_code == 1  # no such repository
    assert hub.log
    hub.reset_count()
    assert call("inspect", f"{made.name}/patch").exit_code == 0
    assert hub.log == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["push", "RUN", "bob/patch"],
        ["push", "RUN", "patch"],
        ["pull", "ann/nothing"],
        ["pull", f"{REPO}@nowhere"],
        ["inspect", "ann/nothing"],
        ["list", "--base", "not an id"],
    ],
    ids=" ".join,
)
def test_what_fails_is_one_line_and_exit_code_1(
    arguments: list[str], pushed: HubServer, run: Path
) -> None:
    pushed.add_repo("bob/patch")
    called = call(*(str(run) if argument == "RUN" else argument for argument in arguments))
    assert called.exit_code == 1, called.output
    lines = [line for line in called.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert called.stdout == ""


def test_an_adapter_that_the_hub_does_not_have_is_unreadable_and_no_failed_check(
    pushed: HubServer,
) -> None:
    called = call("verify", "ann/nothing-here")
    assert called.exit_code == 2
    assert "ann/nothing-here" in called.stderr
