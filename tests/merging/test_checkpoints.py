"""Which checkpoints a patch can be merged into: other prefixes, float8, but no integers."""

import json
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.errors import CheckpointError, MergeError
from safeweights_peft.merging.in_place import merge_in_place
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import verify
from tests.merging.cases import (
    EMBEDDINGS,
    UP,
    Case,
    assert_same_tensors,
    plain_layout,
    slow_merge,
    tied_layout,
)
from tests.tiny_files import Tensors, dense, load_checkpoint, save_checkpoint


def describe_quantization(base: Path, described: object) -> None:
    (base / "config.json").write_text(json.dumps({"quantization_config": described}))


def without_prefix(tensors: Tensors) -> Tensors:
    return {key.removeprefix("model."): tensor for key, tensor in tensors.items()}


def test_a_checkpoint_whose_keys_lack_the_prefix_gets_the_same_edit(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"), head=True)
    bare = save_checkpoint(tmp_path / "bare", without_prefix(case.tensors), shards=2)
    merge(bare, case.patch, case.out)
    expected = slow_merge(case.tensors, (case.adapter, 1.0))
    assert_same_tensors(load_checkpoint(case.out), without_prefix(expected))
    assert verify(case.patch, case.out).checks[-1].detail.startswith("holds the merged values")


def test_a_tied_copy_that_is_the_parameter_without_its_prefix_is_changed_once(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path, {UP: dense(UP, (8, 9), "bfloat16", tied_keys=("up.weight",))})
    bare = save_checkpoint(tmp_path / "bare", without_prefix(case.tensors))
    assert merge(bare, case.patch, case.out).tensors == 1
    expected = slow_merge(case.tensors, (case.adapter, 1.0))
    assert_same_tensors(load_checkpoint(case.out), without_prefix(expected))


@pytest.mark.parametrize(
    ("method", "dtype"), [("gptq", np.int32), ("bitsandbytes", np.uint8), ("int8", np.int8)]
)
def test_a_checkpoint_quantized_to_integers_is_refused_by_name(
    tmp_path: Path, method: str, dtype: type
) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"))
    case.change_base(lambda tensors: tensors.update(qweight=np.ones((2, 3), dtype)))
    describe_quantization(case.base, {"quant_method": method, "bits": 4})
    message = rf"found qweight in u?int\d+, quantized by '{method}'; use the model that was"
    for attempt in (
        lambda: merge(case.base, case.patch, case.out),
        lambda: merge_in_place(case.base, case.patch),
    ):
        with pytest.raises(CheckpointError, match=message):
            attempt()
    assert_same_tensors(load_checkpoint(case.base), case.tensors)


def test_integers_that_are_no_weights_may_stand_in_a_checkpoint(tmp_path: Path) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"))
    case.change_base(lambda tensors: tensors.update(position_ids=np.arange(5)))
    merge(case.base, case.patch, case.out)
    assert_same_tensors(load_checkpoint(case.out), slow_merge(case.tensors, (case.adapter, 1.0)))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_scaled_float8_weights_are_patched_as_they_are_stored(tmp_path: Path, dtype: str) -> None:
    case = Case(tmp_path, plain_layout(dtype))
    scales = np.full((1, 1), 0.01, np.float32)
    case.change_base(lambda tensors: tensors.update({f"{UP}_scale_inv": scales}))
    describe_quantization(case.base, {"quant_method": "fp8"})
    merge(case.base, case.patch, case.out)
    assert_same_tensors(load_checkpoint(case.out), slow_merge(case.tensors, (case.adapter, 1.0)))


def test_an_overflow_where_there_is_no_infinity_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, plain_layout("float8_e4m3fn"))
    with pytest.raises(MergeError, match=r"found NaN; use a base without NaN, or a smaller scale"):
        merge(case.base, [(case.patch, 1e6)], case.out)


def test_what_loading_needs_comes_along_and_index_and_metadata_stay_right(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"), shards=3)
    (case.base / "preprocessor_config.json").write_text("{}")
    (case.base / "README.md").write_text("the base's card")
    merge(case.base, case.patch, case.out)
    names = {path.name for path in case.base.iterdir()}
    assert {path.name for path in case.out.iterdir()} == names
    for name in names - {"README.md"}:
        was, now = (case.base / name).read_bytes(), (case.out / name).read_bytes()
        if name.endswith(".safetensors"):
            start = 8 + int.from_bytes(was[:8], "little")
            assert now[:start] == was[:start]
        else:
            assert now == was
    assert "someone/tiny" in (case.out / "README.md").read_text()


def test_no_file_of_the_result_is_shared_with_the_base(tmp_path: Path) -> None:
    case = Case(tmp_path, {EMBEDDINGS: tied_layout("bfloat16")[EMBEDDINGS]}, shards=2)
    merge(case.base, case.patch, case.out)
    for path in case.out.iterdir():
        assert path.stat().st_nlink == 1
        assert not path.is_symlink()
