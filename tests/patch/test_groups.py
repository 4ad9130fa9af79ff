"""Whole rows and columns: found among indices, stored by number, and the same adapter as ever."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from safeweights_peft.delta import SparseDelta, digest
from safeweights_peft.merging.convert import convert
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.groups import Group, count_groups, find_groups, spread_groups
from safeweights_peft.patch.io import inspect, read_adapter, read_map, write_adapter, write_map
from safeweights_peft.patch.records import Encoding, TensorRecord, indices_key
from tests.tiny_files import as_map, dense, fused_experts, grouped_patch, random_checkpoint

SHAPES: list[tuple[int, ...]] = [(5, 7), (2, 2), (3, 4, 5), (2, 3, 2, 4), (1, 6, 3), (4, 1, 3)]
GROUPS: tuple[Group, ...] = ("row", "column")


def entries_of(shape: tuple[int, ...], group: Group, numbers: list[int]) -> np.ndarray:
    """The flat indices of rows or columns: the slow, obvious way."""
    *_, rows, columns = shape
    found = []
    for flat in range(int(np.prod(shape))):
        batch, rest = divmod(flat, rows * columns)
        row, column = divmod(rest, columns)
        number = batch * rows + row if group == "row" else batch * columns + column
        found += [flat] if number in numbers else []
    return np.array(found, np.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_spread_and_found_again(shape: tuple[int, ...], group: Group, seed: int) -> None:
    number, length = count_groups(shape, group)
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(number, max(1, number // (seed + 1)), replace=False))
    indices = entries_of(shape, group, chosen.tolist())
    spread = spread_groups(chosen.astype(np.int32), group, shape)
    assert spread.dtype == np.int32
    np.testing.assert_array_equal(spread, indices)
    found = find_groups(indices, shape)
    if length == 1:
        assert found is None or found[0] != group  # then they happen to be the others
        return
    assert found is not None
    np.testing.assert_array_equal(spread_groups(found[1], found[0], shape), indices)
    if found[0] == group:  # what is both, such as a whole matrix, is rows
        np.testing.assert_array_equal(found[1], chosen)
    else:
        assert found[0] == "row"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", GROUPS)
def test_one_entry_more_or_less_is_no_group(shape: tuple[int, ...], group: Group) -> None:
    whole = entries_of(shape, group, [1])
    for changed in (whole[1:], whole[:-1], np.union1d(whole, (whole[-1] + 1) % np.prod(shape))):
        found = find_groups(changed, shape)
        if found is not None:  # groups of the other kind, as in a matrix of two rows
            np.testing.assert_array_equal(spread_groups(found[1], found[0], shape), changed)


@pytest.mark.parametrize(
    ("indices", "shape"),
    [([], (3, 4)), ([0, 1, 2], (3,)), ([0, 1, 2], (3, 1)), ([2], (1, 3)), ([0, 1, 3, 4], (2, 4))],
)
def test_what_fills_no_row_or_column_is_none(indices: list[int], shape: tuple[int, ...]) -> None:
    if shape == (3, 1):  # one column of three entries, and no three rows of one
        found = find_groups(np.array(indices, np.int32), shape)
        assert found is not None
        assert found[0] == "column"
    else:
        assert find_groups(np.array(indices, np.int32), shape) is None


def test_a_subset_is_found_as_a_set_of_groups_only_if_it_is_one() -> None:
    """All 4,096 subsets of a 3 x 4 matrix."""
    shape = (3, 4)
    for bits in range(1, 2**12):
        indices = np.flatnonzero([bits >> place & 1 for place in range(12)]).astype(np.int32)
        mask = np.zeros(12, bool)
        mask[indices] = True
        lines = mask.reshape(shape)
        by_rows = bool((lines.all(1) | ~lines.any(1)).all())
        by_columns = bool((lines.all(0) | ~lines.any(0)).all())
        found = find_groups(indices, shape)
        assert (found is not None) == (by_rows or by_columns)
        if found is not None:
            assert found[0] == ("row" if by_rows else "column")
            assert found[1].tolist() == np.flatnonzero(lines.any(int(found[0] == "row"))).tolist()


def test_large_shapes_keep_wide_indices() -> None:
    shape = (2**16, 2**17)
    for group in GROUPS:
        numbers = np.array([5, 2**16 - 1])
        indices = spread_groups(numbers, group, shape)
        assert indices.dtype == np.int64
        found = find_groups(indices, shape)
        assert found is not None
        assert (found[0], found[1].tolist()) == (group, numbers.tolist())


RECORDS: dict[str, TensorRecord] = {
    "model.up.weight": dense("model.up.weight", (12, 9), "bfloat16"),
    "model.experts.gate_up_proj": fused_experts("model.experts", 3, 4, 6, "float32"),
}
BASE = random_checkpoint(RECORDS)


@pytest.mark.parametrize("group", GROUPS)
def test_an_adapter_of_groups_is_stored_by_number_and_reads_as_it_was(
    tmp_path: Path, group: Group
) -> None:
    patch = grouped_patch(RECORDS, BASE, group)
    written = write_adapter(tmp_path / "patch", patch)
    stored = load_file(tmp_path / "patch" / "adapter_model.safetensors")
    for name, record in written.tensors.items():
        assert record.encoding is Encoding(f"{group}s")
        numbers = stored[indices_key(name)]
        assert numbers.dtype == np.int32
        np.testing.assert_array_equal(numbers, find_groups(patch.indices[name], record.shape)[1])
        assert record.content_digest == digest(patch.indices[name])
        assert record.digest == digest(numbers, patch.deltas[name].values)
    again = read_adapter(tmp_path / "patch")
    for name, delta in again.deltas.items():
        assert delta.indices.tobytes() == patch.indices[name].tobytes()
        assert delta.values.tobytes() == patch.deltas[name].values.tobytes()
    facts = inspect(tmp_path / "patch")
    assert {tensor["encoding"] for tensor in facts["tensors"].values()} == {f"{group}s"}
    numbers = {name: stored[indices_key(name)].size for name in written.tensors}
    assert {name: tensor[f"{group}s"] for name, tensor in facts["tensors"].items()} == numbers
    other = "columns" if group == "row" else "rows"
    assert (facts[f"{group}s"], facts[other]) == (sum(numbers.values()), 0)
    assert write_adapter(tmp_path / "again", again) == written


@pytest.mark.parametrize("group", GROUPS)
def test_a_map_of_groups_is_stored_by_number(tmp_path: Path, group: Group) -> None:
    safety_map = as_map(grouped_patch(RECORDS, BASE, group))
    written = write_map(tmp_path / "map", safety_map)
    assert {record.encoding for record in written.tensors.values()} == {Encoding(f"{group}s")}
    again = read_map(tmp_path / "map")
    for name, indices in safety_map.indices.items():
        assert again.indices[name].tobytes() == indices.tobytes()
        assert again.scores[name].tobytes() == safety_map.scores[name].tobytes()


def test_a_record_that_asks_for_rows_gets_what_its_entries_are(tmp_path: Path) -> None:
    patch = grouped_patch(RECORDS, BASE, "column")
    deltas = dict(patch.deltas)
    name, other = deltas
    cut = deltas[other]
    deltas[other] = SparseDelta(cut.shape, cut.indices[1:], cut.values[1:])
    tensors = {
        key: replace(record, encoding=Encoding.ROWS)
        for key, record in patch.metadata.tensors.items()
    }
    asked = Adapter(replace(patch.metadata, tensors=tensors), deltas)
    written = write_adapter(tmp_path / "patch", asked).tensors
    assert (written[name].encoding, written[other].encoding) == (Encoding.COLUMNS, Encoding.PLAIN)


@pytest.mark.parametrize("group", GROUPS)
def test_the_identity_is_the_same_compact_and_back(tmp_path: Path, group: Group) -> None:
    written = write_adapter(tmp_path / "first", grouped_patch(RECORDS, BASE, group))
    there = convert(tmp_path / "first", "compact", tmp_path / "compact")
    back = convert(tmp_path / "compact", "plain", tmp_path / "second")
    assert written.content_id == there.content_id == back.content_id
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = (tmp_path / place / file for place in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
