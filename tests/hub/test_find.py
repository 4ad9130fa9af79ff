"""Searching: by base, through all pages, with what the cards tell."""

from pathlib import Path

import pytest

from safeweights_peft.errors import HubError
from safeweights_peft.hub.pull import Claim, find_on_hub
from safeweights_peft.hub.push import push_to_hub
from tests.hub.conftest import BASE, REPO
from tests.hub_server import Fault, HubServer

CARD = """---
base_model: {base}
base_model_relation: adapter
tags: {tags}
{more}
---
"""
INDEX = """model-index:
- name: patch
  results:
  - task: {type: text-generation}
    dataset: {name: AdvBench, type: advbench}
    metrics:
    - {name: ASR, type: asr, value: 0.04}
    - {type: kl, value: 0.026}"""


def card(base: str = BASE, tags: str = "[safeweights, safety-patch]", more: str = "") -> bytes:
    return CARD.format(base=base, tags=tags, more=more).encode()


def test_what_was_pushed_is_found_by_its_base(hub: HubServer, run: Path) -> None:
    push_to_hub(run / "patch", REPO)
    push_to_hub(run / "map", "ann/map")
    shared = find_on_hub(BASE)
    assert [(repository.repo_id, repository.artifact) for repository in shared] == [
        ("ann/map", "safety map"),
        ("ann/patch", "safety patch"),
    ]
    assert shared[1].commit == hub.repos[REPO].refs["main"]


def test_all_pages_are_read(hub: HubServer) -> None:
    names = [f"ann/patch-{number}" for number in range(5)]
    for name in names:
        hub.add_repo(name, {"README.md": card()})
    assert [repository.repo_id for repository in find_on_hub(BASE)] == names


@pytest.mark.parametrize(
    "other",
    [
        card(base="other/base"),
        card(tags="[safety-patch]"),
        card(tags="[safeweights]"),
        b"",
    ],
    ids=["of another base", "of another project", "neither patch nor map", "without a card"],
)
def test_others_are_not_listed(other: bytes, hub: HubServer) -> None:
    hub.add_repo("ann/other", {"README.md": other})
    assert find_on_hub(BASE) == []


def test_results_are_those_of_the_card(hub: HubServer) -> None:
    hub.add_repo(REPO, {"README.md": card(more=INDEX)})
    (shared,) = find_on_hub(BASE)
    assert shared.results == (Claim("ASR", "AdvBench", 0.04), Claim("kl", "AdvBench", 0.026))


@pytest.mark.parametrize("more", ["model-index: 3", "model-index: [{results: [{}]}]"])
def test_a_malformed_card_is_shown_without_results(more: str, hub: HubServer) -> None:
    hub.add_repo(REPO, {"README.md": card(more=more)})
    (shared,) = find_on_hub(BASE)
    assert shared.results == ()


def test_a_server_in_trouble_is_told_in_one_line(hub: HubServer) -> None:
    hub.faults = [Fault(status=502)]
    with pytest.raises(HubError, match=f"^{BASE}: expected to search for it, found an error of"):
        find_on_hub(BASE)
