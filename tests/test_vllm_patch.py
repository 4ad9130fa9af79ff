"""Patches in checkpoint coordinates, read back as docs/export.md says, by a reader of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, FormatError, MergeError
from safeweights_peft.merging.export import export_vllm_patch
from safeweights_peft.merging.merge import merge
from safeweights_peft.patch.io import write_adapter, write_map
from safeweights_peft.patch.records import TensorRecord
from tests.test_merge import EMBEDDINGS, LAYOUTS, UP, Case, tied_layout
from tests.tiny_files import as_map, random_checkpoint, random_patch

Layout = Callable[[str], dict[str, TensorRecord]]


def apply(patch: Path, model: dict[str, torch.Tensor]) -> None:
    """The page's reader: torch, JSON, and nothing of this package."""
    header = json.loads((patch / "patch.json").read_text())
    assert (header["format"], header["version"]) == ("safeweights-vllm-patch", 1)
    stored = load_file(patch / "patch.safetensors")
    assert len(stored) == 2 * len(header["tensors"])
    for key, described in header["tensors"].items():
        tensor = model[key]
        assert list(tensor.shape) == described["shape"]
        assert str(tensor.dtype) == f"torch.{described['dtype']}"
        indices, values = stored[f"indices/{key}"], stored[f"values/{key}"]
        assert indices.dtype is torch.int32
        assert indices.numel() == values.numel() == described["count"] > 0
        assert (indices.diff() > 0).all()
        tensor.view(-1)[indices.long()] = values


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_whoever_applies_it_has_the_merged_checkpoint(
    layout: Layout, dtype: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, layout(dtype), shards=2, scale=0.3)
    record = export_vllm_patch(case.patch, case.base, case.out)
    merge(case.base, case.patch, tmp_path / "merged")
    model, expected = load(case.base), load(tmp_path / "merged")
    apply(case.out, model)
    bits = {2: torch.int16, 4: torch.int32}
    for key, tensor in expected.items():
        as_bits = bits[tensor.itemsize]
        assert torch.equal(model[key].view(as_bits), tensor.view(as_bits)), key
    assert record["entries"] == sum(each.count for each in case.adapter.deltas.values())
    assert record["size_bytes"] == (case.out / "patch.safetensors").stat().st_size


def test_a_tied_copy_on_disk_gets_the_same_entries(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"), head=True)
    record = export_vllm_patch(case.patch, case.base, case.out)
    model = load(case.base)
    apply(case.out, model)
    assert torch.equal(model["lm_head.weight"], model[EMBEDDINGS])
    assert record["tensors"] == 4


def test_the_header_names_the_base(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"))
    export_vllm_patch(case.patch, case.base, case.out)
    header = json.loads((case.out / "patch.json").read_text())
    assert (header["base_model_name_or_path"], header["revision"]) == ("someone/tiny", "0123abc")


def test_another_base_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"))
    other = random_checkpoint(tied_layout("bfloat16"), seed=7)
    case.change_base(lambda tensors: tensors.update({UP: other[UP]}))
    with pytest.raises(BaseMismatchError, match=rf"^{UP}: expected"):
        export_vllm_patch(case.patch, case.base, case.out)
    assert not case.out.exists()


def test_a_merged_base_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"))
    merge(case.base, case.patch, tmp_path / "merged")
    with pytest.raises(AlreadyMergedError, match="already merged"):
        export_vllm_patch(case.patch, tmp_path / "merged", case.out)


def test_entries_that_would_be_nan_are_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"))
    case.change_base(lambda tensors: tensors.update({UP: np.full_like(tensors[UP], np.nan)}))
    write_adapter(case.patch, random_patch(tied_layout("bfloat16"), case.tensors), overwrite=True)
    with pytest.raises(MergeError, match=rf"^{UP}: expected numbers after merging, found NaN"):
        export_vllm_patch(case.patch, case.base, case.out)


def test_a_safety_map_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"))
    write_map(tmp_path / "map", as_map(case.adapter))
    with pytest.raises(FormatError, match="mode: expected set, found spa"):
        export_vllm_patch(tmp_path / "map", case.base, case.out)


def test_an_existing_directory_is_replaced_only_when_asked(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"))
    case.out.mkdir()
    (case.out / "old").write_text("old")
    with pytest.raises(MergeError, match="set overwrite to replace it"):
        export_vllm_patch(case.patch, case.base, case.out)
    export_vllm_patch(case.patch, case.base, case.out, overwrite=True)
    assert not (case.out / "old").exists()


def test_the_inputs_are_never_replaced(tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"))
    with pytest.raises(MergeError, match="expected a directory apart from base_dir"):
        export_vllm_patch(case.patch, case.base, case.base, overwrite=True)
