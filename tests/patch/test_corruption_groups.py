"""Hostile files of rows and columns: each lie in a record or a number gives one clear error."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeweights_peft.delta import digest
from safeweights_peft.errors import CorruptAdapterError, UnsupportedVersionError
from safeweights_peft.patch.io import inspect, read_artifact, validate, write_adapter
from safeweights_peft.patch.records import indices_key, values_key
from tests.tiny_files import (
    Tensors,
    dense,
    edit_config,
    edit_tensors,
    grouped_patch,
    random_checkpoint,
)

NAME = "model.up.weight"
INDICES, VALUES = indices_key(NAME), values_key(NAME)
RECORDS = {NAME: dense(NAME, (10, 8), "bfloat16")}
BASE = random_checkpoint(RECORDS)


@pytest.fixture(params=["row", "column"])
def patch(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_adapter(tmp_path / "patch", grouped_patch(RECORDS, BASE, request.param, fraction=0.5))
    return tmp_path / "patch"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Five rows of eight entries."""
    write_adapter(tmp_path / "rows", grouped_patch(RECORDS, BASE, "row", fraction=0.5))
    return tmp_path / "rows"


def set_record(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["tensors"][NAME].update(changes)


BLOCK = {"key": NAME, "shape": [80], "offset": 0, "strides": [1]}
CONFIG_EDITS = [
    (set_record(count=0), "count: expected whole rows of 8 entries, at least one, found 0"),
    (set_record(count=39), "count: expected whole rows of 8 entries, at least one, found 39"),
    (set_record(count=32), r"expected int32 \[4\], found int32 \[5\]"),
    (set_record(count=80), r"expected int32 \[10\], found int32 \[5\]"),
    (set_record(count=88), "count: expected at most 80"),
    (set_record(encoding="columns"), r"expected int32 \[4\], found int32 \[5\]"),
    (set_record(encoding="plain"), r"expected int32 \[40\], found int32 \[5\]"),
    (set_record(streams={}), "'streams': expected only base_digest"),
    (
        set_record(shape=[80], blocks=[BLOCK]),
        r"encoding: expected a matrix, to have rows, found \[80\]",
    ),
    (set_record(shape=[80, 1]), r"expected int32 \[40\], found int32 \[5\]"),
    (set_record(content_digest="sha256:" + "0" * 64), "expected digest sha256:000"),
]


@pytest.mark.parametrize(("edit", "message"), CONFIG_EDITS, ids=[text for _, text in CONFIG_EDITS])
def test_a_record_that_lies_about_its_rows_is_refused(
    rows: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_config(rows, edit)
    with pytest.raises(CorruptAdapterError, match=message):
        read_artifact(rows)


def forge(folder: Path, edit: Callable[[Tensors], None]) -> None:
    """Change numbers, and make the digests of what is there now, as a forger would."""
    edit_tensors(folder, edit)
    found: Tensors = {}
    edit_tensors(folder, found.update)
    edit_config(folder, set_record(digest=digest(found[INDICES], found[VALUES])))
    edit_config(folder, lambda config: config["tensors"][NAME].pop("content_digest"))


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, -1, "expected indices from 0 to"),
        (-1, 80, "expected indices from 0 to"),
        (-1, 10, "expected indices from 0 to"),
        (-1, 2**31 - 1, "expected indices from 0 to"),
        (0, 9, "expected ascending indices without repeats"),
    ],
)
def test_forged_numbers_are_refused(patch: Path, place: int, number: int, message: str) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[INDICES][place] = number

    forge(patch, edit)
    with pytest.raises(CorruptAdapterError, match=message):
        validate(patch)


def test_repeated_numbers_are_refused(patch: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[INDICES][1] = tensors[INDICES][0]

    forge(patch, edit)
    with pytest.raises(CorruptAdapterError, match="expected ascending indices without repeats"):
        validate(patch)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(patch: Path, bad: float) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[VALUES][3] = bad

    forge(patch, edit)
    with pytest.raises(CorruptAdapterError, match="expected finite values"):
        validate(patch)


@pytest.mark.parametrize("key", [INDICES, VALUES])
def test_every_flipped_byte_is_noticed(patch: Path, key: str) -> None:
    before: Tensors = {}
    edit_tensors(patch, before.update)
    for place in range(before[key].nbytes):

        def edit(tensors: Tensors, place: int = place) -> None:
            tensors.update({name: array.copy() for name, array in before.items()})
            tensors[key].view(np.uint8)[place] ^= 1

        edit_tensors(patch, edit)
        with pytest.raises(CorruptAdapterError):
            validate(patch)


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.update({INDICES: tensors[INDICES].astype(np.int64)}),
        lambda tensors: tensors.update({INDICES: tensors[INDICES][:-1]}),
        lambda tensors: tensors.update({INDICES: tensors[INDICES].reshape(1, -1)}),
        lambda tensors: tensors.update({VALUES: tensors[VALUES][:-1]}),
        lambda tensors: tensors.update({VALUES: tensors[VALUES].reshape(2, -1)}),
        lambda tensors: tensors.pop(INDICES),
    ],
)
def test_tensors_of_another_layout_are_refused_by_the_header(
    patch: Path, edit: Callable[[Tensors], None]
) -> None:
    edit_tensors(patch, edit)
    for read in (inspect, validate):
        with pytest.raises(CorruptAdapterError, match=r"expected (int32|float32)"):
            read(patch)


def test_a_few_numbers_in_a_huge_shape_cost_no_memory(rows: Path) -> None:
    """What numbers stand for is in the file, one value for each entry."""
    huge = [2**20, 2**40]
    block = {"key": NAME, "shape": huge, "offset": 0, "strides": [2**40, 1]}
    edit_config(rows, set_record(shape=huge, blocks=[block], count=5 * 2**40))
    with pytest.raises(CorruptAdapterError, match="expected int64"):
        validate(rows)


def test_an_encoding_of_groups_that_is_unknown_asks_for_a_newer_package(rows: Path) -> None:
    edit_config(rows, set_record(encoding="blocks"))
    with pytest.raises(UnsupportedVersionError, match="expected one of plain, compact, rows, col"):
        validate(rows)


def test_an_adapter_that_contradicts_its_own_shape_is_not_written(tmp_path: Path) -> None:
    patch = grouped_patch(RECORDS, BASE, "row")
    tensors = {NAME: replace(patch.metadata.tensors[NAME], count=7)}
    written = write_adapter(
        tmp_path / "patch", replace(patch, metadata=replace(patch.metadata, tensors=tensors))
    )
    assert written.tensors[NAME].count == patch.deltas[NAME].count  # counts are computed
