"""Reading checks and hashes each array once: a patch of gigabytes is read in one pass."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeweights_peft import delta
from safeweights_peft.patch.artifacts import Artifact, SafetyMap, in_encoding
from safeweights_peft.patch.io import read_adapter, read_artifact, write_adapter, write_map
from safeweights_peft.patch.records import Encoding
from tests.patch.test_corruption_compact import NAME, PATCH, base_entries
from tests.tiny_files import Tensors, as_map, load_file

Calls = dict[str, Counter[bytes]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """By function: how often it was given each array, wherever it is called from."""
    seen: Calls = {name: Counter() for name in ("check_indices", "check_finite", "Hash")}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *arrays: Any, **options: Any) -> Any:
            seen[name].update(array.tobytes() for array in arrays if isinstance(array, np.ndarray))
            return function(first, *arrays, **options)

        return call

    monkeypatch.setattr(delta.Hash, "__init__", counted("Hash", delta.Hash.__init__))
    for name in ("check_indices", "check_finite"):
        function = getattr(delta, name)
        for module in [m for key, m in sys.modules.items() if key.startswith("safeweights_peft")]:
            if getattr(module, "__dict__", {}).get(name) is function:
                monkeypatch.setattr(module, name, counted(name, function))
    return seen


def write(path: Path, kind: str, encoding: Encoding) -> Tensors:
    """Write a patch or a map; return what is stored."""
    artifact: Artifact = PATCH if kind == "patch" else as_map(PATCH)
    metadata = in_encoding(artifact.metadata, encoding)
    if isinstance(artifact, SafetyMap):
        write_map(path, SafetyMap(metadata, artifact.indices, artifact.scores))
    else:
        write_adapter(path, type(PATCH)(metadata, PATCH.deltas), base=base_entries)
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("kind", ["patch", "map"])
def test_each_array_is_checked_and_hashed_once(
    tmp_path: Path, calls: Calls, kind: str, encoding: Encoding
) -> None:
    stored = [array.tobytes() for array in write(tmp_path / "a", kind, encoding).values()]
    for seen in calls.values():
        seen.clear()
    if kind == "patch":
        patch = read_adapter(tmp_path / "a", base_entries)
        indices, content = patch.indices[NAME].tobytes(), patch.deltas[NAME].values.tobytes()
        base = base_entries(NAME, patch.metadata.tensors[NAME], patch.indices[NAME]).tobytes()
        hashed = {*stored, indices} | ({base} if encoding is Encoding.COMPACT else set())
    else:
        found = read_artifact(tmp_path / "a")
        assert isinstance(found, SafetyMap)
        indices, content = found.indices[NAME].tobytes(), found.scores[NAME].tobytes()
        hashed = {*stored, indices, content}
    # What is decoded from gaps ascends by construction: a gap is not negative.
    checked = set() if encoding is Encoding.COMPACT else {indices}
    assert calls["check_indices"] == Counter(checked)
    assert calls["check_finite"] == Counter({content})
    assert calls["Hash"] == Counter(hashed)


def test_a_delta_of_a_users_own_is_checked(calls: Calls) -> None:
    indices, values = np.array([1, 4]), np.ones(2, np.float32)
    delta.SparseDelta((5,), indices, values)
    assert calls["check_indices"] == Counter([indices.tobytes()])
    assert calls["check_finite"] == Counter([values.tobytes()])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_indices_are_copied_window_by_window_and_the_copy_is_checked(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(delta, "_WINDOW", 2)
    indices = np.arange(count)
    copy = delta.check_indices("here", indices, (count,), copy=True)
    np.testing.assert_array_equal(copy, indices)
    assert not np.shares_memory(copy, indices)
    assert delta.check_indices("here", indices, (count,)) is indices
    for at in range(1, count):
        repeated = indices.copy()
        repeated[at] = repeated[at - 1]
        message = f"found {at - 1} before {at - 1} at position {at - 1};"
        with pytest.raises(delta.CorruptAdapterError, match=message):
            delta.check_indices("here", repeated, (count,), copy=True)
