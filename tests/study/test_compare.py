"""The overlap of safety maps: what sets of entries say, and what chance would share."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.errors import BaseMismatchError, CorruptAdapterError, ReportError
from safeweights_peft.patch.artifacts import Adapter, SafetyMap
from safeweights_peft.patch.io import write_adapter, write_map
from safeweights_peft.study.compare import compare
from tests.tiny_files import (
    as_map,
    dense,
    edit_config,
    edit_tensors,
    fused_experts,
    random_checkpoint,
    random_patch,
)

RECORDS = {
    "layers.0.up.weight": dense("layers.0.up.weight", (7, 9), "float32"),
    "layers.0.experts.gate_up_proj": fused_experts("layers.0", 3, 4, 5, "float32"),
    "layers.1.up.weight": dense("layers.1.up.weight", (11, 3), "float32"),
}


def make(names: list[str] | None = None, density: float = 0.3, seed: int = 1) -> Adapter:
    records = {name: RECORDS[name] for name in names or RECORDS}
    return random_patch(records, random_checkpoint(records), density, seed=seed)


def write(path: Path, *maps: SafetyMap) -> list[Path]:
    paths = [path / f"map{number}" for number in range(len(maps))]
    for each, safety_map in zip(paths, maps, strict=True):
        write_map(each, safety_map)
    return paths


def entries(indices: Mapping[str, np.ndarray]) -> set[tuple[str, int]]:
    """Every entry of a map as a pair of name and index: the slow, obvious way."""
    return {(name, int(index)) for name, each in indices.items() for index in each}


def test_every_pair_shares_what_the_sets_of_their_entries_share(tmp_path: Path) -> None:
    maps = [
        as_map(make(density=0.3, seed=1)),
        as_map(make(density=0.6, seed=2)),
        as_map(make(["layers.1.up.weight"], seed=3)),
    ]
    paths = write(tmp_path, *maps)
    found = compare(paths)["pairs"]
    assert [pair["maps"] for pair in found] == [
        [str(path) for path in pair] for pair in combinations(paths, 2)
    ]
    for pair, (left, right) in zip(found, combinations(maps, 2), strict=True):
        a, b = entries(left.indices), entries(right.indices)
        assert pair["shared"] == len(a & b)
        assert pair["iou"] == len(a & b) / len(a | b)


def test_chance_shares_what_random_selections_of_the_same_sizes_share_on_average(
    tmp_path: Path,
) -> None:
    maps = as_map(make(density=0.3, seed=1)), as_map(make(density=0.6, seed=2))
    found = compare(write(tmp_path, *maps))
    sizes = [len(entries(each.indices)) for each in maps]
    numel = sum(record.numel for record in RECORDS.values())
    random = np.random.default_rng(0)
    shared = [
        len({*random.choice(numel, sizes[0], False)} & {*random.choice(numel, sizes[1], False)})
        for _ in range(2000)
    ]
    assert found["entries_to_draw_from"] == numel
    (pair,) = found["pairs"]
    assert pair["expected_shared"] == pytest.approx(np.mean(shared), rel=0.01)
    ious = [each / (sum(sizes) - each) for each in shared]
    assert pair["expected_iou"] == pytest.approx(np.mean(ious), rel=0.01)


def test_chance_tensor_by_tensor_shares_the_sum_of_what_each_tensor_shares(tmp_path: Path) -> None:
    up = "layers.0.up.weight"
    maps = as_map(make([up, "layers.1.up.weight"], seed=1)), as_map(make([up], seed=2))
    (pair,) = compare(write(tmp_path, *maps))["pairs"]
    sizes = [each.indices[up].size for each in maps]
    shared = sizes[0] * sizes[1] / 63
    either = sum(len(entries(each.indices)) for each in maps) - shared
    assert pair["expected_shared_within_tensors"] == pytest.approx(shared)
    assert pair["expected_iou_within_tensors"] == pytest.approx(shared / either)


def test_a_map_shares_everything_with_itself(tmp_path: Path) -> None:
    (path,) = write(tmp_path, as_map(make()))
    (pair,) = compare([path, path])["pairs"]
    assert pair["iou"] == 1


def test_maps_of_different_tensors_share_nothing(tmp_path: Path) -> None:
    maps = (as_map(make([f"layers.{layer}.up.weight"])) for layer in (0, 1))
    (pair,) = compare(write(tmp_path, *maps))["pairs"]
    assert (pair["shared"], pair["iou"], pair["expected_iou_within_tensors"]) == (0, 0, 0)
    assert pair["expected_iou"] > 0


def test_a_patch_is_compared_by_its_indices_like_a_map(tmp_path: Path) -> None:
    patch = make()
    write_adapter(tmp_path / "patch", patch)
    (path,) = write(tmp_path, as_map(patch))
    found = compare([tmp_path / "patch", path])
    assert found["pairs"][0]["iou"] == 1
    assert [each["artifact"] for each in found["maps"]] == ["safety patch", "safety map"]
    assert {each["entries"] for each in found["maps"]} == {len(entries(patch.indices))}


def test_a_map_says_by_what_it_was_selected(tmp_path: Path) -> None:
    old = as_map(make())
    rows = replace(
        old, metadata=replace(old.metadata, selection={"method": "fisher", "granularity": "row"})
    )
    found = compare(write(tmp_path, old, rows))["maps"]
    assert [(each["method"], each["granularity"]) for each in found] == [
        (old.metadata.selection.get("method"), "entry"),
        ("fisher", "row"),
    ]


def test_the_order_of_two_maps_does_not_matter(tmp_path: Path) -> None:
    paths = write(tmp_path, as_map(make(seed=1)), as_map(make(density=0.6, seed=2)))
    forth, back = (compare(each)["pairs"][0] for each in (paths, paths[::-1]))
    assert forth.pop("maps") == back.pop("maps")[::-1]
    assert forth == back


def test_the_result_is_plain_json(tmp_path: Path) -> None:
    found = compare(write(tmp_path, as_map(make(seed=1)), as_map(make(seed=2))))
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision"])
def test_other_names_of_the_base_are_noted_and_no_error(field: str, tmp_path: Path) -> None:
    safety_map = as_map(make())
    paths = write(tmp_path, safety_map, safety_map)
    assert compare(paths)["same_base"]
    edit_config(paths[1], lambda config: config.update({field: "another"}))
    found = compare(paths)
    assert not found["same_base"]
    assert found["pairs"][0]["iou"] == 1


def test_maps_of_models_of_other_shapes_are_refused_by_name(tmp_path: Path) -> None:
    name = "layers.1.up.weight"
    small, large = make([name]), make([name])
    record = {name: dense(name, (11, 4), "float32")}
    large = random_patch(record, random_checkpoint(record))
    paths = write(tmp_path, as_map(small), as_map(large))
    message = rf"map1: {name}: expected shape \[11, 3\] as in .*map0, found \[11, 4\]; compare"
    with pytest.raises(BaseMismatchError, match=message):
        compare(paths)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_maps_are_refused(count: int, tmp_path: Path) -> None:
    (path,) = write(tmp_path, as_map(make()))
    with pytest.raises(ReportError, match=f"maps: expected at least two, found {count}; name"):
        compare([path] * count)


def test_a_corrupted_map_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, as_map(make(seed=1)), as_map(make(seed=2)))
    edit_tensors(paths[1], lambda tensors: [each.sort() for each in tensors.values()])
    with pytest.raises(CorruptAdapterError, match="map1"):
        compare(paths)


def test_maps_without_entries_share_nothing(tmp_path: Path) -> None:
    full = as_map(make())
    nothing = {name: indices[:0] for name, indices in full.indices.items()}
    no_scores = {name: scores[:0] for name, scores in full.scores.items()}
    empty = replace(full, indices=nothing, scores=no_scores)
    (pair,) = compare(write(tmp_path, empty, empty))["pairs"]
    assert (pair["shared"], pair["iou"], pair["expected_iou"]) == (0, 0, 0)
