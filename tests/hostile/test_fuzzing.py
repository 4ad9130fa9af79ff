"""What is fuzzed runs on its first inputs; the fuzzer itself is no part of the tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from safeweights_peft.errors import FormatError

pytestmark = pytest.mark.filterwarnings(  # some inputs are of a newer minor version
    "ignore::safeweights_peft.errors.SafeWeightsWarning"
)

SOURCE = Path(__file__).parents[2] / "benchmarks" / "fuzz" / "targets.py"


@pytest.fixture(scope="module")
def targets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("targets", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["artifact", "metadata", "streams"])
def test_a_target_takes_its_first_inputs(name: str, targets: ModuleType) -> None:
    inputs = targets.seeds(name)
    assert len(inputs) >= 8
    for data in inputs:
        targets.TARGETS[name](data)


def test_a_target_notices_another_error(
    targets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(targets, "read_artifact", crash)
    with pytest.raises(IndexError, match="out of range"):
        targets.artifact(b"\0" * 9)


def test_the_first_inputs_are_read_and_refused(
    targets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    read = targets.read_artifact

    def counted(folder: str) -> object:
        try:
            found = read(folder)
        except FormatError:
            results.append("refused")
            raise
        results.append("read")
        return found

    monkeypatch.setattr(targets, "read_artifact", counted)
    for data in (*targets.seeds("artifact"), b"\0" * 9):
        targets.artifact(data)
    assert {"read", "refused"} == set(results)
