"""Patches as PEFT's own methods: loaded by plain PEFT, and what they keep and lose."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from safeweights_peft import create_adapter
from safeweights_peft.errors import (
    AlreadyMergedError,
    BaseMismatchError,
    MergeError,
    UnsupportedFeatureError,
)
from safeweights_peft.jobs.export import export_supertuning, find_sparsity
from safeweights_peft.merging.merge import merge
from safeweights_peft.modeling.layout import describe
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode
from tests.tiny_files import copy_checkpoint
from tests.tiny_jobs import content
from tests.tiny_models import save_tiny_llama, save_tiny_mixtral
from tests.tuner.patches import load_base, random_content, save_patch

UP = "model.layers.0.mlp.up_proj.weight"
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}

MERGE_BY_PLAIN_PEFT = """
import sys, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
assert "safeweights_peft" not in sys.modules
"""


def linear_names(base: Path) -> list[str]:
    modules = load_base(base).named_modules()
    return [f"{path}.weight" for path, module in modules if isinstance(module, nn.Linear)]


def save_linear_patch(
    base: Path, out: Path, first: slice = slice(None, None, 3), scale: float = 1.0
) -> Path:
    """Save a random patch of every linear layer; of the first one only a slice of the entries."""
    model, names = load_base(base), linear_names(base)
    indices, values = random_content(model, names=names)
    indices[names[0]], values[names[0]] = indices[names[0]][first], values[names[0]][first]
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path=str(base),
        scale=scale,
        tensors=describe(model, indices, base),
    )
    create_adapter(model, metadata, indices, "default", values).save_pretrained(out)
    return out


@pytest.fixture
def patch(tiny_llama: Path, tmp_path: Path) -> Path:
    return save_linear_patch(tiny_llama, tmp_path / "patch")


@pytest.fixture
def tiny_float32_mixtral(tmp_path: Path) -> Path:
    return save_tiny_mixtral(tmp_path / "mixtral")


def merge_by_plain_peft(base: Path, adapter: Path, out: Path) -> nn.Module:
    """Merges in a process that never heard of this package."""
    command = [sys.executable, "-c", MERGE_BY_PLAIN_PEFT, str(base), str(adapter), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_base(out)


def count_differing(left: nn.Module, right: nn.Module) -> int:
    """Counts the entries of two plain models whose bits differ."""
    others = right.state_dict()
    return sum(
        int((each.view(BITS[each.dtype]) != others[name].view(BITS[each.dtype])).sum())
        for name, each in left.state_dict().items()
    )


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_float32_mixtral"])
def test_plain_peft_merges_supertuning_to_the_bits_of_the_patch_in_float32(
    base: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(base)
    patch = save_linear_patch(path, tmp_path / "patch", scale=0.7)
    record = export_supertuning(patch, tmp_path / "out", str(path))
    merge(path, patch, tmp_path / "merged")
    found = merge_by_plain_peft(path, tmp_path / "out", tmp_path / "by_peft")
    assert count_differing(found, load_base(tmp_path / "merged")) == 0
    assert count_differing(found, load_base(path)) > 0
    assert record["differing_entries"] == 0


def test_padding_leaves_a_negative_zero_at_the_first_index_alone(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def put_zero(tensors: dict[str, np.ndarray]) -> None:
        for tensor in tensors.values():
            tensor.reshape(-1)[0] = -0.0

    base = copy_checkpoint(tiny_llama, tmp_path / "base", put_zero)
    patch = save_linear_patch(base, tmp_path / "patch")
    export_supertuning(patch, tmp_path / "out", str(base))
    merge(base, patch, tmp_path / "merged")
    found = PeftModel.from_pretrained(load_base(base), tmp_path / "out").merge_and_unload()
    assert count_differing(found, load_base(tmp_path / "merged")) == 0


def test_in_bfloat16_it_tells_how_many_entries_peft_rounds_differently(
    tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    patch = save_linear_patch(tiny_llama_bf16, tmp_path / "patch")
    record = export_supertuning(patch, tmp_path / "out", str(tiny_llama_bf16))
    merge(tiny_llama_bf16, patch, tmp_path / "merged")
    base = load_base(tiny_llama_bf16)
    found = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    differing = count_differing(found, load_base(tmp_path / "merged"))
    assert record["differing_entries"] == differing > 0


def test_supertuning_tells_what_the_padding_costs(
    tiny_llama: Path, patch: Path, tmp_path: Path
) -> None:
    record = export_supertuning(patch, tmp_path / "out", str(tiny_llama))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    values = [tensor for key, tensor in stored.items() if key.endswith("values")]
    assert record["stored_entries"] == sum(each.numel() for each in values)
    assert record["entries"] == sum(int((each != 0).sum()) for each in values)
    assert record["entries"] < record["stored_entries"]
    assert record["parameters"] == len(values)


@settings(deadline=None, max_examples=1000)
@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1)), min_size=1, max_size=5))
def test_the_sparsity_makes_room_as_peft_counts_it(matrices: list[tuple[int, float]]) -> None:
    needs = [(max(1, round(share * numel)), numel) for numel, share in matrices]
    sparsity = find_sparsity(needs)
    assert 0 <= sparsity < 1
    rooms = [int(numel * (1 - sparsity)) - count for count, numel in needs]
    assert min(rooms) in (0, 1)


@pytest.mark.parametrize(
    ("base", "name", "found"),
    [
        ("tiny_tied_llama", "model.embed_tokens.weight", "weight of a Embedding"),
        ("tiny_llama", "model.norm.weight", "weight of a LlamaRMSNorm"),
        ("tiny_mixtral", "model.layers.0.mlp.experts.down_proj", "down_proj of a MixtralExperts"),
    ],
)
def test_what_super_tuning_can_not_change_is_refused_by_name(
    base: str,
    name: str,
    found: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    path = request.getfixturevalue(base)
    patch = save_patch(path, tmp_path / "patch", names=[name])
    with pytest.raises(
        UnsupportedFeatureError, match=rf"^{name}: .*, found {found}; .*: merge the patch$"
    ):
        export_supertuning(patch, tmp_path / "out", str(path))
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(patch: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError, match=r"expected in .* the values with digest"):
        export_supertuning(patch, tmp_path / "out", str(other))
    assert not (tmp_path / "out").exists()


def test_a_merged_base_is_refused(tiny_llama: Path, patch: Path, tmp_path: Path) -> None:
    merge(tiny_llama, patch, tmp_path / "merged")
    with pytest.raises(AlreadyMergedError, match="already merged"):
        export_supertuning(patch, tmp_path / "out", str(tmp_path / "merged"))


def test_the_config_names_the_base_and_every_layer(
    tiny_llama: Path, patch: Path, tmp_path: Path
) -> None:
    export_supertuning(patch, tmp_path / "out", None)  # the patch names it
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    names = [name.removesuffix(".weight") for name in linear_names(tiny_llama)]
    assert config["target_modules"] == sorted(names)


def test_two_exports_are_the_same_bytes(patch: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_supertuning(patch, tmp_path / name)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_layer_without_entries_is_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    patch = save_linear_patch(tiny_llama, tmp_path / "patch", first=slice(0))
    export_supertuning(patch, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = {name.removesuffix(".weight") for name in linear_names(tiny_llama)[1:]}
    assert set(config["target_modules"]) == names
    found = PeftModel.from_pretrained(load_base(tiny_llama), tmp_path / "out").merge_and_unload()
    assert count_differing(found, load_base(tiny_llama)) > 0


def test_a_patch_without_entries_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_base(tiny_llama)
    nothing = {UP: np.empty(0, np.int32)}
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path=str(tiny_llama),
        tensors=describe(model, nothing, tiny_llama),
    )
    values = {UP: np.empty(0, np.float32)}
    create_adapter(model, metadata, nothing, "default", values).save_pretrained(tmp_path / "patch")
    with pytest.raises(MergeError, match="expected a patch that changes entries, found none"):
        export_supertuning(tmp_path / "patch", tmp_path / "out")


def test_an_existing_result_is_replaced_only_when_asked(patch: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(MergeError, match="give --overwrite to replace it"):
        export_supertuning(patch, tmp_path / "out")
    export_supertuning(patch, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
