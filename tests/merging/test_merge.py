"""Merging from shards to shards: bitwise what the slow, obvious way gives, or a clear refusal."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from safeweights_peft.checkpoint.threads import THREADS
from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES
from safeweights_peft.errors import (
    AlreadyMergedError,
    BaseMismatchError,
    CheckpointError,
    CorruptAdapterError,
    MergeError,
    SafeWeightsError,
)
from safeweights_peft.merging.merge import merge, plan
from safeweights_peft.patch.io import read_adapter, write_adapter
from safeweights_peft.patch.records import TensorRecord, entries_by_block
from tests.merging.cases import (
    EMBEDDINGS,
    LAYOUTS,
    UP,
    Case,
    assert_same_tensors,
    count_work,
    plain_layout,
    slow_merge,
    tied_layout,
)
from tests.tiny_files import (
    Tensors,
    edit_config,
    fused_experts,
    load_checkpoint,
    random_checkpoint,
    random_patch,
)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, tied_layout("bfloat16"), head=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_is_bitwise_the_obvious_one(
    tmp_path: Path, layout: Callable[[str], dict[str, TensorRecord]], dtype: str, shards: int
) -> None:
    case = Case(tmp_path, layout(dtype), shards=shards, scale=0.3)
    report = merge(case.base, case.patch, case.out)
    expected = slow_merge(case.tensors, (case.adapter, 0.3))
    assert_same_tensors(load_checkpoint(case.out), expected)
    changed = [key for key in expected if expected[key].tobytes() != case.tensors[key].tobytes()]
    assert report.tensors >= len(changed) > 0
    assert report.entries == sum(delta.count for delta in case.adapter.deltas.values())
    assert report.size_bytes == sum(f.stat().st_size for f in case.out.glob("*.safetensors"))
    assert [patch.scale for patch in report.patches] == [0.3]
    assert_same_tensors(load_checkpoint(case.base), case.tensors)


@pytest.mark.parametrize("values_dtype", list(DTYPES))
@pytest.mark.parametrize("scale", [1.0, -0.7, 0.0, 3.0])
def test_the_requested_scale_multiplies_the_adapters_own(
    tmp_path: Path, values_dtype: str, scale: float
) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"), values_dtype=values_dtype, scale=0.3)
    report = merge(case.base, [(case.patch, scale)], case.out)
    assert report.patches[0].scale == 0.3 * scale
    expected = slow_merge(case.tensors, (case.adapter, 0.3 * scale))
    assert_same_tensors(load_checkpoint(case.out), expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_both_copies_of_a_tied_head_get_the_edit(tmp_path: Path, shards: int) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"), head=True, shards=shards)
    report = merge(case.base, case.patch, case.out)
    found = load_checkpoint(case.out)
    assert_same_tensors(found, slow_merge(case.tensors, (case.adapter, 1.0)))
    assert found["lm_head.weight"].tobytes() == found[EMBEDDINGS].tobytes()
    assert report.tensors == 4


def test_a_tied_copy_that_differs_from_the_base_is_refused_by_key(case: Case) -> None:
    at = int(case.adapter.deltas[EMBEDDINGS].indices[0])
    case.change_base(lambda tensors: tensors["lm_head.weight"].reshape(-1).__setitem__(at, 9))
    with pytest.raises(BaseMismatchError, match=f"^{EMBEDDINGS}: expected in lm_head.weight of"):
        merge(case.base, case.patch, case.out)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_each_entry_is_read_and_hashed_once(
    case: Case, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    reads, hashes = count_work(monkeypatch)
    merge(case.base, [(case.patch, scale)], case.out)
    assert reads == {f"base: {key}": 1 for key in case.tensors if key != "untouched.weight"}
    records = case.adapter.metadata.tensors.values()
    assert [hashes[str(record.base_digest)] for record in records] == [1, 1, 1]
    # The merged digest is the promise at the patch's own scale alone.
    assert hashes.total() == (6 if scale == 1.0 else 3)


def test_values_that_change_nothing_still_merge(tmp_path: Path) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"), scale=1e-30)
    merge(case.base, case.patch, case.out)
    assert_same_tensors(load_checkpoint(case.out), case.tensors)


def test_a_merged_base_is_told_apart_from_a_foreign_one(case: Case, tmp_path: Path) -> None:
    merge(case.base, case.patch, case.out)
    with pytest.raises(AlreadyMergedError, match=r"found the values of .* already merged"):
        merge(case.out, case.patch, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_half_merged_base_is_refused(case: Case, tmp_path: Path) -> None:
    merge(case.base, case.patch, case.out)
    merged = load_checkpoint(case.out)
    case.change_base(lambda tensors: tensors.update({UP: merged[UP]}))
    with pytest.raises(BaseMismatchError, match=rf"^{UP}: .* use someone/tiny at revision 0123abc"):
        merge(case.base, case.patch, tmp_path / "again")


def test_another_base_is_refused_by_the_tensors_name_and_nothing_is_written(case: Case) -> None:
    other = random_checkpoint(tied_layout("bfloat16"), seed=7)
    case.change_base(lambda tensors: tensors.update({UP: other[UP]}))
    with pytest.raises(BaseMismatchError, match=f"^{UP}: expected in .*, found [0-9a-f]{{12}} \\("):
        merge(case.base, case.patch, case.out)
    assert sorted(path.name for path in case.base.parent.iterdir()) == ["base", "patch"]


def test_entries_that_the_patch_leaves_alone_may_differ(case: Case) -> None:
    untouched = set(range(72)) - set(case.adapter.deltas[UP].indices.tolist())
    case.change_base(lambda tensors: tensors[UP].reshape(-1).__setitem__(min(untouched), 5))
    merge(case.base, case.patch, case.out)
    assert_same_tensors(load_checkpoint(case.out), slow_merge(case.tensors, (case.adapter, 1.0)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(UP), f"^{UP}: expected bfloat16 .*, found none"),
        (
            lambda t: t.update({UP: t[UP].astype(np.float32)}),
            f"^{UP}: expected bfloat16 .*, found float32",
        ),
        (lambda t: t.update({UP: t[UP].astype(np.int8)}), "expected bfloat16 .*, found int8"),
        (
            lambda t: t.update({UP: t[UP].reshape(9, 8)}),
            r"bfloat16 \[8, 9\] in .*, found bfloat16 \[9, 8\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:9]}),
            r"^.*: lm_head.weight: expected bfloat16 \[11, 8\] in .*, found bfloat16 \[9, 8\]",
        ),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused_by_key(
    case: Case, edit: Callable[[Tensors], object], message: str
) -> None:
    case.change_base(edit)
    with pytest.raises(BaseMismatchError, match=message):
        merge(case.base, case.patch, case.out)


def test_a_broken_adapter_is_refused_before_anything_is_written(case: Case) -> None:
    file = case.patch / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptAdapterError, match="as its header says"):
        merge(case.base, case.patch, case.out)
    assert not case.out.exists()


def test_an_adapter_whose_result_is_not_the_promised_one_is_refused(case: Case) -> None:
    lie = "sha256:" + "0" * 64
    edit_config(case.patch, lambda config: config["tensors"][UP].update(merged_digest=lie))
    with pytest.raises(MergeError, match=rf"^{UP}: expected merged entries with digest {lie}"):
        merge(case.base, case.patch, case.out)
    assert sorted(path.name for path in case.base.parent.iterdir()) == ["base", "patch"]


def test_a_merge_that_would_write_nan_is_refused(tmp_path: Path) -> None:
    records = plain_layout("bfloat16")
    tensors = random_checkpoint(records)
    tensors[UP][:] = np.nan
    case = Case(tmp_path, records)
    case.change_base(lambda base: base.update({UP: tensors[UP]}))
    write_adapter(case.patch, random_patch(records, tensors), overwrite=True)
    with pytest.raises(MergeError, match=rf"^{UP}: expected numbers after merging, found NaN"):
        merge(case.base, case.patch, case.out)
    assert not case.out.exists()


@pytest.mark.parametrize("scale", [np.inf, np.nan, 1e300])
def test_a_scale_must_be_finite_in_float32(case: Case, scale: float) -> None:
    with pytest.raises(MergeError, match=r"^scale: expected a factor that is finite in float32"):
        merge(case.base, [(case.patch, scale)], case.out)


@pytest.mark.parametrize("out", ["base", "patch", "base/inner", "."])
def test_the_inputs_are_never_replaced(case: Case, out: str) -> None:
    with pytest.raises(MergeError, match=r"expected a directory apart from the (base|patch)"):
        merge(case.base, case.patch, case.base.parent / out, overwrite=True)
    assert_same_tensors(load_checkpoint(case.base), case.tensors)
    assert read_adapter(case.patch).metadata.selection["method"] == "esi"


def test_an_existing_directory_is_replaced_only_when_asked(case: Case) -> None:
    case.out.mkdir()
    (case.out / "old").write_text("old")
    with pytest.raises(MergeError, match="give --overwrite to replace it"):
        merge(case.base, case.patch, case.out)
    merge(case.base, case.patch, case.out, overwrite=True)
    assert not (case.out / "old").exists()


def test_progress_is_told(case: Case) -> None:
    told: list[tuple[int, int]] = []
    merge(case.base, case.patch, case.out, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0


def test_a_full_disk_leaves_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safeweights_peft.checkpoint.writer.copy_file", no_space)
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        merge(case.base, case.patch, case.out)
    assert sorted(path.name for path in case.base.parent.iterdir()) == ["base", "patch"]


def test_a_merge_killed_while_patching_leaves_no_model(case: Case) -> None:
    code = """
import os, sys
from safeweights_peft.checkpoint.writer import CheckpointDraft
from safeweights_peft import merge
CheckpointDraft.patch = lambda *_: os._exit(9)
merge(*sys.argv[1:])
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(case.base), str(case.patch), str(case.out)]
    assert subprocess.run(command, check=False, cwd=root).returncode == 9
    assert not case.out.exists()


def test_entries_are_sorted_by_the_matrix_that_holds_them() -> None:
    record = fused_experts("e", experts=2, inner=2, outer=3, dtype="float32")
    found = entries_by_block(record, np.array([0, 7, 12, 23], np.int32))
    positions = np.arange(4)
    assert {key: (positions[a].tolist(), b.tolist()) for key, (a, b) in found.items()} == {
        "e.0.w1.weight": ([0], [0]),
        "e.0.w3.weight": ([1], [1]),
        "e.1.w1.weight": ([2], [0]),
        "e.1.w3.weight": ([3], [5]),
    }


def test_every_refusal_is_one_line_of_the_one_tree(case: Case) -> None:
    (case.base / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(SafeWeightsError) as caught:
        merge(case.base, case.patch, case.out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("first", ["import safeweights_peft.merging", "safeweights_peft.merge"])
def test_the_room_and_the_function_have_names_of_their_own(first: str) -> None:
    code = f"""
import types
import safeweights_peft
{first}
import safeweights_peft.merging.merge
from safeweights_peft import merge
assert callable(merge) and safeweights_peft.merge is safeweights_peft.merging.merge.merge
assert isinstance(safeweights_peft.merging, types.ModuleType)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_plan_foretells_the_merge(case: Case) -> None:
    planned = plan(case.base, case.patch, case.out)
    report = merge(case.base, case.patch, case.out)
    copied = [path for path in case.out.rglob("*") if path.is_file() and path.name != "README.md"]
    assert (planned["tensors"], planned["entries"]) == (report.tensors, report.entries)
    assert planned["write_bytes"] == sum(path.stat().st_size for path in copied)


def test_a_plan_writes_nothing(case: Case) -> None:
    before = sorted(case.base.parent.rglob("*"))
    plan(case.base, case.patch, case.out)
    assert sorted(case.base.parent.rglob("*")) == before


def test_a_plan_counts_the_patch_new_entries_and_the_largest_tensor_per_thread_as_memory(
    case: Case,
) -> None:
    deltas = case.adapter.deltas
    delta_bytes = sum(4 * delta.count + delta.values.nbytes for delta in deltas.values())
    head = deltas[EMBEDDINGS].count
    edit_bytes = 2 * (sum(delta.count for delta in deltas.values()) + head)
    largest = case.tensors[EMBEDDINGS].nbytes
    planned = plan(case.base, case.patch, case.out)
    assert planned["memory_bytes"] == THREADS * largest + delta_bytes + edit_bytes
    assert plan(case.base, case.patch, None)["memory_bytes"] == THREADS * largest + delta_bytes


def test_a_plan_tells_whether_the_disk_has_room(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, fits in ((0, False), (10**9, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        planned = plan(case.base, case.patch, case.out / "deeper")
        assert (planned["free_bytes"], planned["fits"]) == (free, fits)


def test_a_plan_refuses_what_the_merge_refuses(case: Case) -> None:
    merge(case.base, case.patch, case.out)
    with pytest.raises(AlreadyMergedError):
        plan(case.out, case.patch, case.out.with_name("again"))
