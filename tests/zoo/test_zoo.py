"""Every architecture goes the whole way, or is refused in one line; none is wrong in silence.

A spread is tried in every run of the tests; all are by `make zoo`, one process each, which keeps
its results in `zoo/` and resumes there: remove the folder to start over.
"""

import importlib
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from safeweights_peft.errors import MergeError
from tests.zoo.architectures import list_architectures
from tests.zoo.journey import Journey, Refused
from tests.zoo.results import (
    FAULT,
    LONGEST_LINE,
    NOT_BUILT,
    OK,
    REFUSED,
    Outcome,
    Result,
    judge,
    read_result,
    run_architecture,
    write_result,
)

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "zoo"
SECONDS = 600  # for an architecture
# What commands import when they run, so that no process has to: a third of its time.
LATE_IMPORTS = (
    *("matplotlib.pyplot", "scipy.stats", "transformers.trainer", "peft.tuners.lora"),
    *("safeweights_peft.jobs.train", "safeweights_peft.jobs.preserve"),
    *("safeweights_peft.jobs.evaluate", "safeweights_peft.study.report"),
)

SPREAD = [
    "llama_tied_bias",  # dense, with one matrix at both ends
    "gpt2",  # Conv1D: transposed weights
    "mixtral",  # experts, fused in memory
    "gpt_oss",  # experts, sinks, sliding windows
    "gemma3_text",  # sliding windows
    "mpt",  # ALiBi
    "mamba",  # nothing but states
    "qwen3_5_text",  # linear attention, a convolution that its parent reads
    "granitemoehybrid",  # states, attention and experts
    "deepseek_v3",  # latent attention, a router's bias in float32
    "qwen2_vl",  # no causal LM to transformers
    "qwen3_5",  # a checkpoint with a vision tower, of which the text alone is loaded
]
# Known today and to be mended: a fault that is gone fails the test until its name leaves the list.
EXPECTED_FAULTS: list[tuple[str, str]] = []


def expected_faults(name: str) -> set[str]:
    """List the steps of an architecture that are known to be wrong."""
    return {step for architecture, step in EXPECTED_FAULTS if architecture == name}


def assert_no_fault(result: Result) -> None:
    """Accept what works and what is refused, and no other faults than those expected."""
    faults, expected = result.having(FAULT), expected_faults(result.name)
    assert {step: text for step, text in faults.items() if step not in expected} == {}
    assert expected - faults.keys() == set(), "mended: take it off EXPECTED_FAULTS"


@pytest.mark.parametrize("name", SPREAD)
def test_an_architecture_of_the_spread_works_or_is_refused(name: str) -> None:
    result = run_architecture(name)
    assert result.having(NOT_BUILT) == {}
    assert_no_fault(result)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", list_architectures())
def test_an_architecture_works_or_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a fork, torch refuses to work in the threads that transformers loads weights in.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    path = RESULTS / f"{name}.json"
    if not path.exists():
        run_apart(name, path)
    assert_no_fault(read_result(path))


# A crash or a leak of one architecture stays its own; a fork has everything imported.
def run_apart(name: str, path: Path) -> None:
    """Run an architecture in a process of its own, and keep the result."""
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: write_result(run_architecture(name), path)
    )
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode:
        fault = f"the process ended with {process.exitcode} within {SECONDS} s"
        write_result(Result(name, "Dense", [Outcome("build", FAULT, fault)]), path)


def test_the_spread_and_the_expected_faults_name_architectures() -> None:
    names = set(list_architectures())
    assert set(SPREAD) <= names
    assert {name for name, _ in EXPECTED_FAULTS} <= names


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (AssertionError("off by 2"), FAULT, "off by 2"),
        (MergeError("a: expected b"), REFUSED, "a: expected b"),
        (Refused("x" * (LONGEST_LINE + 1)), FAULT, f"refused in {LONGEST_LINE + 1} characters"),
        (Refused("two\nlines"), FAULT, "refused in 9 characters"),
        (KeyError("past"), FAULT, "KeyError: 'past'"),
    ],
    ids=["a difference", "a refusal", "a page", "two lines", "a crash"],
)
def test_only_one_line_of_the_package_is_a_refusal(
    error: Exception, status: str, message: str
) -> None:
    found, text = judge(error)
    assert (found, text[: len(message)]) == (status, message)


def test_a_refusal_of_a_command_is_its_error(tmp_path: Path) -> None:
    journey = Journey("llama", tmp_path)
    journey.path("base").mkdir()
    with pytest.raises(Refused, match=r"^.*/base: expected [^\n]*$"):
        journey.call("score", "./base", "--out", "./map")


def test_a_result_is_read_as_it_was_kept(tmp_path: Path) -> None:
    result = Result("llama", "Dense", [Outcome("build", OK, "", 0.1)], {"torch": "2"})
    write_result(result, tmp_path / "zoo" / "llama.json")
    assert read_result(tmp_path / "zoo" / "llama.json") == result


def test_an_architecture_that_no_model_is_built_of_is_no_fault() -> None:
    result = run_architecture("no such model type")
    assert set(result.having(NOT_BUILT)) == {"build"}
    assert_no_fault(result)


def test_a_mended_fault_has_to_leave_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.zoo.test_zoo.EXPECTED_FAULTS", [("llama", "merge")])
    assert_no_fault(Result("llama", outcomes=[Outcome("merge", FAULT, "other bits")]))
    with pytest.raises(AssertionError, match="mended"):
        assert_no_fault(Result("llama", outcomes=[Outcome("merge", OK)]))
    with pytest.raises(AssertionError, match="crash"):
        assert_no_fault(Result("llama", outcomes=[Outcome("score", FAULT, "crash")]))


def test_the_page_on_models_is_that_of_the_kept_results_and_names_the_spread() -> None:
    command = [sys.executable, "docs/generate_models.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert [name for name in SPREAD if f"| {name} |" not in page] == []
