"""Waiting and trying again, and the words for what goes wrong at the Hub."""

import pytest

from safeweights_peft.fetching import (
    LONGEST_WAIT_SECONDS,
    WAITS_SECONDS,
    latest_commit,
    patiently,
    split_revision,
)


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
