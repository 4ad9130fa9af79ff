"""Base models found; waiting and trying again, and the words for what goes wrong at the Hub."""

from pathlib import Path

import pytest

from safeweights_peft.errors import ModelError
from safeweights_peft.fetching import (
    LONGEST_WAIT_SECONDS,
    WAITS_SECONDS,
    BaseModel,
    latest_commit,
    patiently,
    resolve_base,
    split_revision,
)
from tests.tiny_files import cache_model


def test_a_directory_is_its_own_base_without_a_revision(tiny_llama: Path) -> None:
    assert resolve_base(str(tiny_llama)) == BaseModel(str(tiny_llama), tiny_llama, None)


def test_a_revision_of_a_directory_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="--revision main: expected a base on the Hub, found the"):
        resolve_base(str(tiny_llama), "main")


def test_a_directory_without_a_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a Hugging Face model with config\.json") as e:
        resolve_base(str(tmp_path))
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/directory", "nobody/no model"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: expected a model directory or a Hub id"):
        resolve_base(name)


def test_a_cached_hub_model_resolves_to_its_commit(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache_model(tmp_path, tiny_llama, commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = resolve_base("someone/tiny")
    assert found == BaseModel("someone/tiny", snapshot, commit)


class Failing:
    """A call that raises an error some times, then succeeds."""

    def __init__(self, error: Exception, times: int) -> None:
        self.left, self.error = times, error

    def __call__(self) -> str:
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return "done"


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("safeweights_peft.fetching.time.sleep", found.append)
    return found


def status_error(status: int, **headers: str) -> Exception:
    from types import SimpleNamespace

    from huggingface_hub.errors import HfHubHTTPError

    answer = SimpleNamespace(status_code=status, headers=headers, request=None)
    return HfHubHTTPError("it failed", response=answer)


def test_the_waits_grow_and_end(waited: list[float]) -> None:
    with pytest.raises(OSError, match="it failed"):
        patiently(Failing(status_error(503), 100))
    assert waited == list(WAITS_SECONDS)
    assert sorted(waited) == waited


def test_a_passing_failure_is_forgotten(waited: list[float]) -> None:
    assert patiently(Failing(status_error(500), 2)) == "done"
    assert len(waited) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412])
def test_a_refusal_is_not_asked_again(status: int, waited: list[float]) -> None:
    with pytest.raises(OSError, match="it failed"):
        patiently(Failing(status_error(status), 1))
    assert waited == []


@pytest.mark.parametrize(
    ("asked", "expected"), [("0", [0.0]), ("30", [30.0]), ("Fri, 01 Jan 2027", [1.0])]
)
def test_the_server_s_own_wait_comes_first(
    asked: str, expected: list[float], waited: list[float]
) -> None:
    error = status_error(429, **{"Retry-After": asked})
    assert patiently(Failing(error, 1)) == "done"
    assert waited == expected


def test_a_wait_beyond_patience_is_not_waited(waited: list[float]) -> None:
    error = status_error(429, **{"Retry-After": str(int(LONGEST_WAIT_SECONDS) + 1)})
    with pytest.raises(OSError, match="it failed"):
        patiently(Failing(error, 1))
    assert waited == []


def test_other_errors_are_not_the_hub_s(waited: list[float]) -> None:
    with pytest.raises(KeyError):
        patiently(Failing(KeyError("mine"), 1))
    assert waited == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [("a/b", ("a/b", None)), ("a/b@v1", ("a/b", "v1")), ("a/b@refs/pr/1", ("a/b", "refs/pr/1"))],
)
def test_a_revision_follows_the_first_at(source: str, parts: tuple[str, str | None]) -> None:
    assert split_revision(source) == parts


def test_without_a_network_no_commit_is_known() -> None:
    assert latest_commit("someone/tiny") is None
