"""SPA under a safety patch: what SET has made safe and merged is what stays."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from safeweights_peft import (
    Adapter,
    BaseMismatchError,
    FormatError,
    SafetyPreservingCallback,
    UnsupportedFeatureError,
    merge,
    preserve,
    read_adapter,
)
from tests.training.maps import DOWN, UP, entries, hooks, load, moved, same, train
from tests.training.test_preserve_trainer import make_trainer
from tests.tuner.patches import save_patch


@pytest.fixture
def patch(tiny_llama: Path, tmp_path: Path) -> Path:
    """A random patch of the float32 Llama, at a scale of its own."""
    return save_patch(tiny_llama, tmp_path / "patch", scale=0.5)


@pytest.fixture
def merged(tiny_llama: Path, patch: Path, tmp_path: Path) -> Path:
    """The float32 Llama with the patch merged in."""
    merge(tiny_llama, patch, tmp_path / "merged")
    return tmp_path / "merged"


def merge_on_disk(base: Path, patch: Path, out: Path) -> PreTrainedModel:
    merge(base, patch, out)
    return load(out)


def merge_in_memory(base: Path, patch: Path, out: Path) -> PreTrainedModel:
    model = PeftModel.from_pretrained(load(base), patch).merge_and_unload()
    return model.requires_grad_(True)


@pytest.mark.parametrize("merge_patch", [merge_on_disk, merge_in_memory])
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16"])
def test_a_merged_patchs_entries_keep_their_bits_while_the_rest_trains(
    base: str,
    merge_patch: Callable[[Path, Path, Path], PreTrainedModel],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    path: Path = request.getfixturevalue(base)
    adapter = read_adapter(save_patch(path, tmp_path / "patch"))
    model = merge_patch(path, tmp_path / "patch", tmp_path / "merged")
    before = entries(model, adapter)
    assert not same(before, entries(load(path), adapter))
    with preserve(model, adapter):
        train(model)
        assert same(entries(model, adapter), before)
    assert same(entries(model, adapter), before)
    assert moved(model, path)


def test_a_patch_may_be_given_as_its_directory(patch: Path, merged: Path) -> None:
    adapter, model = read_adapter(patch), load(merged)
    before = entries(model, adapter)
    with preserve(model, patch):
        train(model)
    assert same(entries(model, adapter), before)


def test_a_merged_model_in_float32_may_be_trained_under_a_patch_of_its_bfloat16_checkpoint(
    tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(save_patch(tiny_llama_bf16, tmp_path / "patch"))
    merge(tiny_llama_bf16, tmp_path / "patch", tmp_path / "merged")
    model = load(tmp_path / "merged", dtype=torch.float32)
    before = entries(model, adapter)
    with preserve(model, adapter):
        train(model)
    assert same(entries(model, adapter), before)


def test_a_trainer_moves_no_entry_of_a_merged_patch(
    patch: Path, merged: Path, tmp_path: Path
) -> None:
    adapter, model = read_adapter(patch), load(merged)
    before = entries(model, adapter)
    make_trainer(model, SafetyPreservingCallback(patch), tmp_path).train()
    assert same(entries(model, adapter), before)
    assert moved(model, merged)


def refused(model: nn.Module, adapter: Adapter | Path, error: type, message: str) -> None:
    before = hooks(model)
    with pytest.raises(error, match=message), preserve(model, adapter):
        pass
    assert hooks(model) == before


def test_a_base_without_the_patch_is_refused_with_the_advice_to_merge(
    tiny_llama: Path, patch: Path
) -> None:
    message = r"merged in, found the base without it; merge the patch first$"
    refused(load(tiny_llama), patch, BaseMismatchError, message)


def test_a_patch_merged_at_another_scale_is_refused_with_its_own_scale(
    tiny_llama: Path, patch: Path, tmp_path: Path
) -> None:
    merge(tiny_llama, [(patch, 0.5)], tmp_path / "half")
    message = r"merged in at its own scale .*another .*; load that one, merged at scale 0\.5"
    refused(load(tmp_path / "half"), patch, BaseMismatchError, message)


def test_a_patch_that_lacks_a_merged_digest_is_refused(patch: Path, merged: Path) -> None:
    adapter = read_adapter(patch)
    tensors = adapter.metadata.tensors
    tensors[UP] = replace(tensors[UP], merged_digest=None)
    message = f"^{UP}: expected a merged_digest in the safety patch, found null; save the patch"
    refused(load(merged), adapter, FormatError, message)


def test_a_model_whose_patch_is_not_merged_yet_is_refused(tiny_llama: Path, patch: Path) -> None:
    model = PeftModel.from_pretrained(load(tiny_llama), patch)
    refused(model, patch, UnsupportedFeatureError, "found SAFEWEIGHTS, .*merge the adapter first")


def test_a_missing_parameter_is_told_as_the_safety_patchs(merged: Path, patch: Path) -> None:
    model = load(merged)
    model.model.layers = model.model.layers[:1]
    refused(model, patch, BaseMismatchError, "train the base that the safety patch was made for")


def test_parameters_that_are_not_trained_are_told_as_the_safety_patchs(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_patch(tiny_llama, tmp_path / "patch", names=[UP, DOWN])
    model = merge_on_disk(tiny_llama, tmp_path / "patch", tmp_path / "merged")
    model.get_parameter(DOWN).requires_grad_(False)
    with preserve(model, tmp_path / "patch"):
        train(model, steps=1)
    assert "1 of the safety patch's 2 parameters" in caplog.text
