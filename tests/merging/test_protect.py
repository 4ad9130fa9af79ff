"""Putting a base's entries back into a tuned model: bitwise the slow way's, or a clear refusal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import BaseMismatchError, MergeError, SafeWeightsError
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.protect import protect
from safeweights_peft.patch.io import write_adapter, write_map
from safeweights_peft.patch.records import TensorRecord
from tests.tiny_files import (
    Tensors,
    as_map,
    dense,
    fused_experts,
    load_checkpoint,
    memory_entries,
    random_checkpoint,
    random_patch,
    save_checkpoint,
)

UP, NORM, EXPERTS = "model.up.weight", "model.norm.weight", "model.experts.gate_up"


class Case:
    """A base, what fine-tuning made of it, and a map of the base."""

    def __init__(self, path: Path, dtype: str = "bfloat16", tuned_dtype: str | None = None) -> None:
        self.records: dict[str, TensorRecord] = {
            UP: dense(UP, (8, 9), dtype),
            NORM: dense("norm", (9,), dtype),
            EXPERTS: fused_experts("e", experts=2, inner=2, outer=3, dtype=dtype),
        }
        self.tensors = random_checkpoint(self.records)
        self.tuned_tensors = {
            key: tensor.astype(DTYPES[tuned_dtype or dtype])
            for key, tensor in random_checkpoint(self.records, seed=5).items()
        }
        self.adapter = random_patch(self.records, self.tensors, density=0.3)
        self.base = save_checkpoint(path / "base", self.tensors)
        self.tuned = save_checkpoint(path / "tuned", self.tuned_tensors, shards=2)
        self.map, self.out = path / "map", path / "out"
        write_map(self.map, as_map(self.adapter))

    def in_memory(self, tensors: Tensors, name: str) -> np.ndarray:
        dtype = next(iter(tensors.values())).dtype.name
        return memory_entries(replace(self.records[name], dtype=dtype), tensors)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {key: tensor.tobytes() for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("dtype", "tuned_dtype"),
    [
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
    ],
)
def test_a_maps_entries_become_the_bases_and_all_others_stay_the_tuned_ones(
    tmp_path: Path, dtype: str, tuned_dtype: str
) -> None:
    case = Case(tmp_path, dtype, tuned_dtype)
    protect(case.tuned, case.base, case.map, case.out)
    written = load_checkpoint(case.out)
    for name, indices in case.adapter.indices.items():
        expected = case.in_memory(case.tuned_tensors, name)
        expected[indices] = case.in_memory(case.tensors, name)[indices].astype(expected.dtype)
        assert case.in_memory(written, name).tobytes() == expected.tobytes()
    untouched = written["untouched.weight"]
    assert untouched.tobytes() == case.tuned_tensors["untouched.weight"].tobytes()


def test_the_tuned_model_is_left_as_it_is(case: Case) -> None:
    protect(case.tuned, case.base, case.map, case.out)
    assert bits(load_checkpoint(case.tuned)) == bits(case.tuned_tensors)


def test_a_tied_copy_that_only_the_tuned_model_has_on_disk_is_protected_too(tmp_path: Path) -> None:
    record = {UP: dense(UP, (8, 9), "float32", tied_keys=("lm_head.weight",))}
    base, tuned = random_checkpoint(record), random_checkpoint(record, seed=5)
    tuned["lm_head.weight"] = tuned[UP].copy()
    write_map(tmp_path / "map", as_map(random_patch(record, base)))
    paths = save_checkpoint(tmp_path / "tuned", tuned), save_checkpoint(tmp_path / "base", base)
    report = protect(*paths, tmp_path / "map", tmp_path / "out")
    written = load_checkpoint(tmp_path / "out")
    assert written[UP].tobytes() == written["lm_head.weight"].tobytes() != tuned[UP].tobytes()
    assert report.tensors == 2


def test_a_merged_patchs_entries_are_kept_as_merged(case: Case, tmp_path: Path) -> None:
    write_adapter(tmp_path / "patch", case.adapter)
    merge(case.base, tmp_path / "patch", tmp_path / "merged")
    protect(case.tuned, tmp_path / "merged", tmp_path / "patch", case.out)
    merged, written = load_checkpoint(tmp_path / "merged"), load_checkpoint(case.out)
    indices = case.adapter.indices[UP]
    assert (written[UP].flatten()[indices] == merged[UP].flatten()[indices]).all()


def test_a_base_without_the_patch_is_refused(case: Case, tmp_path: Path) -> None:
    write_adapter(tmp_path / "patch", case.adapter)
    with pytest.raises(
        BaseMismatchError, match="with the safety patch merged in, found it without"
    ):
        protect(case.tuned, case.base, tmp_path / "patch", case.out)
    assert not case.out.exists()


def test_the_report_counts_what_had_moved_and_how_far(case: Case, tmp_path: Path) -> None:
    tensors = {key: tensor.copy() for key, tensor in case.tensors.items()}
    index = int(case.adapter.indices[UP][0])
    tensors[UP].reshape(-1)[index] += 2
    tuned = save_checkpoint(tmp_path / "moved", tensors)
    report = protect(tuned, case.base, case.map, case.out)
    assert report.changed == 1
    assert report.largest_change == pytest.approx(2, abs=0.02)
    assert report.entries == sum(indices.size for indices in case.adapter.indices.values())
    assert bits(load_checkpoint(case.out)) == bits(case.tensors)


def test_another_models_map_is_refused(case: Case) -> None:
    with pytest.raises(BaseMismatchError, match="digest"):
        protect(case.tuned, case.tuned, case.map, case.out)
    assert not case.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(UP), r"expected \[8, 9\] in .*, found none"),
        (
            lambda tensors: tensors.update({UP: tensors[UP][:4]}),
            r"expected \[8, 9\] in .*, found bfloat16 \[4, 9\]",
        ),
        (lambda tensors: tensors.update({UP: tensors[UP].astype(np.int8)}), "found int8"),
    ],
)
def test_a_tuned_model_of_another_build_is_refused_before_anything_is_written(
    case: Case, tmp_path: Path, change, message: str
) -> None:
    change(case.tuned_tensors)
    tuned = save_checkpoint(tmp_path / "other", case.tuned_tensors)
    with pytest.raises(SafeWeightsError, match=message):
        protect(tuned, case.base, case.map, case.out)
    assert not case.out.exists()


def test_an_existing_result_and_an_input_are_never_written_over(case: Case) -> None:
    for out in (case.tuned, case.base, case.map):
        with pytest.raises(MergeError):
            protect(case.tuned, case.base, case.map, out, overwrite=True)
    save_checkpoint(case.out, case.tensors)
    with pytest.raises(MergeError, match="overwrite"):
        protect(case.tuned, case.base, case.map, case.out)
