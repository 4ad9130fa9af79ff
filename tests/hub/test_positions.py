"""Whatever request of a push fails, the repository is never half updated, and a retry succeeds."""

import shutil
from pathlib import Path

import pytest

from safeweights_peft.errors import HubError
from safeweights_peft.hub.push import push_to_hub
from tests.hub.conftest import REPO, TOKEN
from tests.hub_server import Fault, HubServer
from tests.tiny_jobs import content

REQUESTS = {"new": 16, "update": 13}
"""How many requests a whole push makes: to a repository that isn't there, and to one that is."""

POSITIONS = [(case, n) for case, requests in REQUESTS.items() for n in range(1, requests + 1)]

FAULTS = [{"status": 500}, {"cut": "before"}, {"cut": "after"}]
KINDS = ["500", "cut before", "cut after"]


@pytest.fixture
def case(request: pytest.FixtureRequest, hub: HubServer, run: Path) -> str:
    """A push to a repository that isn't there, or to one that holds an older push."""
    if request.param == "update":
        older = run.parent / "older"
        shutil.copytree(run, older)
        (older / "old.json").write_text("{}", encoding="utf-8")
        (older / "result.png").write_bytes(b"\x89PNG\0older")
        push_to_hub(older, REPO)
        (run / "new.json").write_text("{}", encoding="utf-8")
    return request.param


def files_at(hub: HubServer) -> dict[str, bytes]:
    return hub.repos[REPO].files() if REPO in hub.repos else {}


def names_of(case: str) -> set[str]:
    """List what the repository holds once it is complete."""
    own = {"settings", "new"} if case == "update" else {"settings"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    beside = {"README.md", "images/result.png", *(f"results/{name}.json" for name in own)}
    return adapter | {f"map/{name}" for name in adapter} | beside


@pytest.mark.parametrize("case", REQUESTS, indirect=True)
def test_a_whole_push_makes_as_many_requests_as_are_tried_below(
    case: str, hub: HubServer, run: Path
) -> None:
    hub.reset_count()
    push_to_hub(run, REPO)
    assert len(hub.log) == REQUESTS[case]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "position"), POSITIONS, indirect=["case"])
@pytest.mark.parametrize("fault", FAULTS, ids=KINDS)
def test_a_push_that_fails_from_some_request_on_leaves_no_half_and_is_done_by_the_next(
    position: int, fault: dict[str, object], case: str, hub: HubServer, run: Path
) -> None:
    local, before = content(run), files_at(hub)
    hub.reset_count()
    hub.faults = [Fault(position, **fault)]
    with pytest.raises(HubError) as caught:
        push_to_hub(run, REPO)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    left = files_at(hub)
    assert content(run) == local
    hub.faults.clear()
    push_to_hub(run, REPO)
    assert set(files_at(hub)) == names_of(case)
    assert left in (before, files_at(hub))
    assert content(run) == local


@pytest.mark.slow
@pytest.mark.parametrize(("case", "position"), POSITIONS, indirect=["case"])
@pytest.mark.parametrize("fault", [*FAULTS, {"status": 429}], ids=[*KINDS, "429"])
def test_a_push_of_which_one_request_fails_once_is_done_in_one_commit(
    position: int, fault: dict[str, object], case: str, hub: HubServer, run: Path
) -> None:
    commits = len(hub.repos[REPO].commits) if case == "update" else 1
    hub.reset_count()
    hub.faults = [Fault(position, position, **fault)]
    push_to_hub(run, REPO)
    assert len(hub.log) > position
    assert len(hub.repos[REPO].commits) == commits + 1
    assert set(files_at(hub)) == names_of(case)
