"""Finding base models; retrying, and explaining what goes wrong at the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeweights_peft.errors import FormatError, ModelError
from safeweights_peft.fetching import (
    BACKOFF_SECONDS,
    MAX_WAIT_SECONDS,
    BaseModel,
    find_base,
    latest_commit,
    resolve_base,
    retry,
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


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bsae", "no such directory here, and not all of it in the cache.*; did you mean base?"),
        ("./bsae", "no such directory; did you mean base?"),
        ("run/pacth", "no such directory here, and .*; did you mean run/patch?"),
        ("./nosuch", "no such directory; check the spelling"),
    ],
)
def test_a_misspelt_directory_is_said_to_be_missing_with_the_nearest_name(
    name: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("base", "run/patch"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=f"^{name}: expected .*, found {found}".replace("?", "[?]")
    ):
        resolve_base(name)


def test_a_cached_hub_model_resolves_to_its_commit(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache_model(tmp_path, tiny_llama, commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = resolve_base("someone/tiny")
    assert base == BaseModel("someone/tiny", snapshot, commit)


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., Path]:
    """Write the config of a LoRA that records this of its base."""

    def write(folder: str = "lora", **recorded: Any) -> Path:
        (tmp_path / folder).mkdir()
        config = {"peft_type": "LORA", **recorded}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path / folder

    return write


@pytest.fixture
def fetched(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Names, revisions and files of the models that are asked for on the Hub."""
    calls: list[tuple[Any, ...]] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, tuple(allow_patterns)))
        return str(tiny_llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return calls


def named(name: str | None, commit: str | None) -> dict[str, Any]:
    return {"base_model_name_or_path": name, "revision": commit}


@pytest.mark.parametrize(
    ("base", "revision", "expected"),
    [
        (None, None, ("ann/a", "commit")),
        ("ann/a", None, ("ann/a", "commit")),
        (None, "v2", ("ann/a", "v2")),
        ("ann/b", None, ("ann/b", None)),
    ],
    ids=["none given", "the same", "another revision", "another base"],
)
def test_a_base_is_taken_at_the_commit_that_an_adapter_records_for_it(
    base: str | None,
    revision: str | None,
    expected: tuple[str, str | None],
    lora: Callable[..., Path],
    fetched: list[tuple[Any, ...]],
) -> None:
    find_base(base, [lora(**named("ann/a", "commit"))], revision, ["config.json"])
    assert fetched == [(*expected, ("config.json",))]


def test_of_several_adapters_the_first_names_the_base_and_any_may_know_its_commit(
    lora: Callable[..., Path], fetched: list[tuple[Any, ...]]
) -> None:
    bases = [named(None, "x"), named("ann/a", None), named("ann/b", "y"), named("ann/a", "z")]
    find_base(None, [lora(f"lora{number}", **base) for number, base in enumerate(bases)])
    assert fetched[0][:2] == ("ann/a", "z")


def test_a_directory_that_is_given_is_the_base_whatever_an_adapter_says(
    tiny_llama: Path, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    assert find_base(tiny_llama, [nothing]) == BaseModel(str(tiny_llama), tiny_llama, None)


def test_a_commit_that_is_recorded_for_what_is_a_directory_here_is_left_out(
    tiny_llama: Path, lora: Callable[..., Path]
) -> None:
    adapter = lora(**named(str(tiny_llama), "commit"))
    assert find_base(None, [adapter]) == BaseModel(str(tiny_llama), tiny_llama, None)
    with pytest.raises(ModelError, match="--revision main: expected a base on the Hub"):
        find_base(None, [adapter], "main")


@pytest.mark.parametrize("name", [None, ""])
def test_adapters_without_a_base_ask_for_one(name: str | None, lora: Callable[..., Path]) -> None:
    message = "lora: base_model_name_or_path: expected the name of its base, found none; give the"
    with pytest.raises(ModelError, match=message):
        find_base(None, [lora(**named(name, None))])


@pytest.mark.parametrize("key", ["base_model_name_or_path", "revision"])
@pytest.mark.parametrize("value", [3, ["ann/a"], {}, False])
def test_what_a_hostile_config_records_must_be_text(
    key: str, value: object, lora: Callable[..., Path], fetched: list[tuple[Any, ...]]
) -> None:
    adapter = lora(**{**named("ann/a", None), key: value})
    with pytest.raises(FormatError, match=f"{key}: expected text or null, found"):
        find_base("ann/a", [adapter])
    assert fetched == []


def test_a_broken_patch_is_refused_before_its_base_is_fetched(
    lora: Callable[..., Path], fetched: list[tuple[Any, ...]]
) -> None:
    adapter = lora(**named("ann/a", None) | {"peft_type": "SAFEWEIGHTS"})
    with pytest.raises(FormatError):
        find_base(None, [adapter])
    assert fetched == []


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
    waits: list[float] = []
    monkeypatch.setattr("safeweights_peft.fetching.time.sleep", waits.append)
    return waits


def status_error(status: int, **headers: str) -> Exception:
    from types import SimpleNamespace

    from huggingface_hub.errors import HfHubHTTPError

    answer = SimpleNamespace(status_code=status, headers=headers, request=None)
    return HfHubHTTPError("it failed", response=answer)


def test_the_waits_grow_and_end(waited: list[float]) -> None:
    with pytest.raises(OSError, match="it failed"):
        retry(Failing(status_error(503), 100))
    assert waited == list(BACKOFF_SECONDS)
    assert sorted(waited) == waited


def test_a_passing_failure_is_forgotten(waited: list[float]) -> None:
    assert retry(Failing(status_error(500), 2)) == "done"
    assert len(waited) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412])
def test_a_refusal_is_not_asked_again(status: int, waited: list[float]) -> None:
    with pytest.raises(OSError, match="it failed"):
        retry(Failing(status_error(status), 1))
    assert waited == []


@pytest.mark.parametrize(
    ("seconds", "expected"), [("0", [0.0]), ("30", [30.0]), ("Fri, 01 Jan 2027", [1.0])]
)
def test_the_server_s_own_wait_comes_first(
    seconds: str, expected: list[float], waited: list[float]
) -> None:
    error = status_error(429, **{"Retry-After": seconds})
    assert retry(Failing(error, 1)) == "done"
    assert waited == expected


def test_a_wait_beyond_patience_is_not_waited(waited: list[float]) -> None:
    error = status_error(429, **{"Retry-After": str(int(MAX_WAIT_SECONDS) + 1)})
    with pytest.raises(OSError, match="it failed"):
        retry(Failing(error, 1))
    assert waited == []


def test_other_errors_are_not_the_hub_s(waited: list[float]) -> None:
    with pytest.raises(KeyError):
        retry(Failing(KeyError("mine"), 1))
    assert waited == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [("a/b", ("a/b", None)), ("a/b@v1", ("a/b", "v1")), ("a/b@refs/pr/1", ("a/b", "refs/pr/1"))],
)
def test_a_revision_follows_the_first_at(source: str, parts: tuple[str, str | None]) -> None:
    assert split_revision(source) == parts


def test_without_a_network_no_commit_is_known() -> None:
    assert latest_commit("someone/tiny") is None
