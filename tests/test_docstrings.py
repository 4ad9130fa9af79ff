"""The example of every public name runs as its docstring shows it.

It starts with nothing imported, in a folder where `demo/base` is a tiny Llama with a tokenizer and
`demo/run` a run of `enhance` on it, with `demo/run/map` and `demo/run/patch`. Requests are in
`demo/harmful.json`, `demo/benign.jsonl` and `demo/lessons.json` (the last with answers), a signer's
keys in `demo/key.pem` and `demo/key.pub`. On the Hub, `someone/tiny` is the base, ann is logged in,
and `ann/patch` is the run, once it is pushed.
"""

import contextlib
import doctest
import inspect
import io
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import safeweights_peft
from safeweights_peft.cli import main
from tests.hub.conftest import BASE, REPO, hub, server, waits
from tests.hub_server import HubServer
from tests.test_signing import Keys
from tests.tiny_jobs import Requests, content

__all__ = ["hub", "server", "waits"]  # fixtures


def is_exception(member: object) -> bool:
    return isinstance(member, type) and issubclass(member, BaseException)


NAMES = [
    name
    for name in sorted(safeweights_peft.__all__)
    if not is_exception(getattr(safeweights_peft, name))
]


def example_of(name: str, docstring: str | None) -> doctest.DocTest:
    """Read the `Example:` section of a docstring."""
    _, _, section = inspect.cleandoc(docstring or "").partition("\nExample:\n")
    return doctest.DocTestParser().get_doctest(section, {}, name, None, None)


def run(example: doctest.DocTest) -> None:
    """Run an example; it must print what it shows, where `...` stands for anything."""
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    runner.run(example, out=report.write)
    assert not runner.failures, report.getvalue()


@pytest.fixture(scope="module")
def made(tiny_tied_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_tied_llama, folder / "demo/base")
    with contextlib.chdir(folder):  # so that the patch names its base as a reader would
        requests, _ = Requests(Path("demo")), Keys(Path("demo"))
        sources = ["--harmful", requests.harmful, "--benign", requests.benign]
        sources += ["--eval-harmful", requests.harmful, "--eval-benign", requests.benign]
        job = ["enhance", "demo/base", "--out", "demo/run", "--density", "0.1", "--steps", "2"]
        called = CliRunner().invoke(main, [*job, *sources])
    assert called.exit_code == 0, called.output
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lay_out_hub(hub: HubServer, with_patch: bool) -> None:
    hub.add_repo(BASE, content(Path("demo/base")))
    if with_patch:
        safeweights_peft.push_to_hub("demo/run", REPO, base=BASE)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(
    name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    example = example_of(name, getattr(safeweights_peft, name).__doc__)
    assert example.examples, "expected an `Example:` section, found none"
    if "hub" in name:
        lay_out_hub(request.getfixturevalue("hub"), with_patch=name != "push_to_hub")
    run(example)


@pytest.mark.parametrize(
    ("docstring", "count"),
    [
        ("Add.\n\n    Example:\n        >>> 1 + 1\n        2\n    ", 1),
        ("Add.\n\n    Args:\n        a: as in >>> 1\n    ", 0),
        (None, 0),
    ],
)
def test_an_example_is_found_in_its_section_alone(docstring: str | None, count: int) -> None:
    assert len(example_of("add", docstring).examples) == count


@pytest.mark.parametrize("code", ["1 + 1\n3", "raise ValueError", "print('a')\nb..."])
def test_an_example_that_fails_is_noticed(code: str) -> None:
    with pytest.raises(AssertionError, match="Failed example"):
        run(example_of("add", f"Add.\n\nExample:\n>>> {code}\n"))
