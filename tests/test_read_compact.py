"""The short reader reads what the package writes, and shares no code with it."""

import importlib.util
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES
from safeweights_peft.merging.convert import convert
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.patch.groups import Group
from safeweights_peft.patch.io import read_adapter, write_adapter
from safeweights_peft.patch.records import TensorRecord
from tests.merging.cases import LAYOUTS, UP, Case
from tests.tiny_files import dense, grouped_patch, random_checkpoint, save_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "format_v1_rows" / "patch"
READER = Path(__file__).parents[1] / "examples" / "read_compact.py"


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_compact", READER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wide_layout(dtype: str) -> dict[str, TensorRecord]:
    return {UP: dense(UP, (64, 48), dtype)}


@pytest.mark.parametrize("encoding", ["plain", "compact", "compact without base"])
@pytest.mark.parametrize("layout", [wide_layout, *LAYOUTS])
@pytest.mark.parametrize(
    ("dtype", "values_dtype"),
    [(dtype, "float32") for dtype in WEIGHT_DTYPES] + [("bfloat16", each) for each in DTYPES],
)
def test_the_short_reader_agrees_with_the_package(
    tmp_path: Path,
    reader: ModuleType,
    layout: Callable[[str], dict[str, TensorRecord]],
    dtype: str,
    values_dtype: str,
    encoding: str,
) -> None:
    case = Case(tmp_path, layout(dtype), values_dtype=values_dtype, density=0.4)
    patch = case.patch
    if encoding != "plain":
        patch = tmp_path / "compact"
        convert(case.patch, "compact", patch, case.base if encoding == "compact" else None)
    deltas = read_adapter(patch, partial(gather_entries, CheckpointReader(case.base))).deltas
    found = {name: entries for name, *entries in reader.read_patch(patch, case.base)}
    assert found.keys() == deltas.keys()
    for name, (indices, values) in found.items():
        np.testing.assert_array_equal(indices, deltas[name].indices)
        assert values.tobytes() == deltas[name].values.tobytes()


@pytest.mark.parametrize("group", ["row", "column"])
@pytest.mark.parametrize("layout", [wide_layout, *LAYOUTS])
@pytest.mark.parametrize("encoding", ["plain", "compact"])
def test_the_short_reader_reads_rows_and_columns(
    tmp_path: Path,
    reader: ModuleType,
    layout: Callable[[str], dict[str, TensorRecord]],
    group: Group,
    encoding: str,
) -> None:
    records = {name: record for name, record in layout("bfloat16").items() if len(record.shape) > 1}
    tensors = random_checkpoint(records)
    base = save_checkpoint(tmp_path / "base", tensors)
    deltas = grouped_patch(records, tensors, group).deltas
    written = write_adapter(tmp_path / "patch", grouped_patch(records, tensors, group))
    assert {record.encoding.group for record in written.tensors.values()} == {group}
    if encoding == "compact":
        convert(tmp_path / "patch", "compact", tmp_path / "compact")
    folder = tmp_path / ("patch" if encoding == "plain" else "compact")
    found = {name: entries for name, *entries in reader.read_patch(folder, base)}
    assert found.keys() == deltas.keys()
    for name, (indices, values) in found.items():
        np.testing.assert_array_equal(indices, deltas[name].indices)
        assert values.tobytes() == deltas[name].values.tobytes()


def test_the_short_reader_reads_the_golden_rows(
    reader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "base_entries", lambda *_: np.zeros(0, np.float16))
    found = {name: entries for name, *entries in reader.read_patch(GOLDEN, GOLDEN)}
    for name, delta in read_adapter(GOLDEN).deltas.items():
        np.testing.assert_array_equal(found[name][0], delta.indices)
        assert found[name][1].tobytes() == delta.values.tobytes()


def test_the_short_reader_is_short_and_stands_alone() -> None:
    text = READER.read_text()
    assert not re.search(r"^\s*(import|from) safeweights", text, re.MULTILINE)
    lines = text.split('"""\n', 1)[1].splitlines()
    assert sum(1 for line in lines if line.strip() and '"""' not in line) <= 70
