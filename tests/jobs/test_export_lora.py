"""Patches of whole rows and columns as the LoRA that they are: loaded and merged by plain PEFT."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from safeweights_peft import create_adapter, merge, read_adapter, round_values
from safeweights_peft.errors import BaseMismatchError, UnsupportedFeatureError
from safeweights_peft.jobs.export import _find_alpha, export_lora
from safeweights_peft.modeling.layout import describe
from safeweights_peft.patch.groups import spread_groups
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode
from tests.jobs.test_export import UP, count_differing, merge_by_plain_peft
from tests.tuner.patches import load_base, logits, save_patch

FILE = "adapter_model.safetensors"


def save_gpt2(path: Path) -> Path:
    config = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=1
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture
def tiny_gpt2(tmp_path: Path) -> Path:
    return save_gpt2(tmp_path / "gpt2")


def save_lines(
    base: Path,
    out: Path,
    groups: tuple[str, ...] = ("row", "column"),
    scale: float = 1.0,
    values_dtype: str = "float32",
) -> Path:
    """Save a patch of some rows or columns, of other numbers of them, in every linear layer."""
    model, random = load_base(base), np.random.default_rng(0)
    indices, values = {}, {}
    kinds = nn.Linear | Conv1D
    tied = {id(model.get_input_embeddings().weight)}
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, kinds) and id(module.weight) not in tied
    ]
    for place, path in enumerate(paths):
        weight = model.get_submodule(path).weight
        group = groups[place % len(groups)]
        total = weight.shape[0 if group == "row" else 1]
        numbers = np.sort(random.choice(total, 1 + place % 3, replace=False))
        name = f"{path}.weight"
        indices[name] = spread_groups(numbers, group, tuple(weight.shape))  # type: ignore[arg-type]
        values[name] = random.normal(scale=0.05, size=indices[name].size).astype(np.float32)
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path=str(base),
        scale=scale,
        values_dtype=values_dtype,
        tensors=describe(model, indices, base),
    )
    peft_model = create_adapter(model, metadata, indices, "default", values)
    round_values(peft_model)
    peft_model.save_pretrained(out)
    return out


BASES = ["tiny_llama", "tiny_llama_bf16", "tiny_gpt2"]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16"])
def test_merged_by_plain_peft_it_has_the_bits_of_the_patch(
    name: str, scale: float, values_dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(name)
    patch = save_lines(base, tmp_path / "patch", scale=scale, values_dtype=values_dtype)
    record = export_lora(patch, tmp_path / "out", str(base))
    merge(base, patch, tmp_path / "merged")
    expected = load_base(tmp_path / "merged")
    found = PeftModel.from_pretrained(load_base(base), tmp_path / "out").merge_and_unload()
    assert count_differing(found, expected) == 0
    assert count_differing(found, load_base(base)) > 0
    deltas = read_adapter(patch).deltas.values()
    assert record["entries"] == sum(delta.count for delta in deltas)
    assert record["largest_rank"] == 3


@pytest.mark.parametrize("name", ["tiny_llama_bf16", "tiny_gpt2"])
def test_a_process_without_this_package_merges_it(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(name)
    patch = save_lines(base, tmp_path / "patch")
    export_lora(patch, tmp_path / "out", str(base))
    merge(base, patch, tmp_path / "merged")
    found = merge_by_plain_peft(base, tmp_path / "out", tmp_path / "by_peft")
    assert count_differing(found, load_base(tmp_path / "merged")) == 0


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_in_float64_unmerged_logits_are_those_of_the_unrounded_sum(
    name: str, scale: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In exact arithmetic the two are one function; in float64 nothing else is left of it."""
    base = request.getfixturevalue(name)
    patch = save_lines(base, tmp_path / "patch", scale=scale)
    export_lora(patch, tmp_path / "out", str(base))
    expected = load_base(base).double()
    with torch.no_grad():
        for key, delta in read_adapter(patch).deltas.items():
            weight = expected.get_parameter(key)
            # The format rounds a scale to float32, once.
            change = torch.from_numpy(float(np.float32(scale)) * delta.to_dense().astype(float))
            weight += change
    found = PeftModel.from_pretrained(
        load_base(base).double(), tmp_path / "out", autocast_adapter_dtype=False
    ).double()
    largest = logits(expected).abs().max()
    assert (logits(found) - logits(expected)).abs().max() <= 1e-12 * largest
    assert (logits(load_base(base).double()) - logits(expected)).abs().max() > 1e-3 * largest


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("name", BASES)
def test_each_unmerged_layer_is_the_merged_one_up_to_rounding(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """|LoRA − merged| ≤ the roundings of both: dot products in float32, sums, outputs, weights.

    A dot product of n numbers in float32 errs by n·u / (1 - n·u)·|x|·|W| in any order; each
    output, and each merged weight, is rounded once to the base's dtype.
    """
    base = request.getfixturevalue(name)
    patch = save_lines(base, tmp_path / "patch", scale=0.7)
    export_lora(patch, tmp_path / "out", str(base))
    merge(base, patch, tmp_path / "merged")
    merged = load_base(tmp_path / "merged")
    lora = PeftModel.from_pretrained(load_base(base), tmp_path / "out")
    for key, delta in read_adapter(patch).deltas.items():
        path = key.removesuffix(".weight")
        dense, layer = merged.get_submodule(path), lora.get_submodule(f"base_model.model.{path}")
        weight = dense.weight.detach()
        is_conv = isinstance(dense, Conv1D)
        x = torch.randn(7, weight.shape[0 if is_conv else 1]).to(weight.dtype)
        with torch.no_grad():
            found, expected = layer(x).float(), dense(x).float()
            change = torch.from_numpy(0.7 * delta.to_dense())
            sizes = (layer.base_layer.weight.float().abs() + 2 * change.abs()).double()
            reach = x.double().abs() @ (sizes if is_conv else sizes.T)
        u, single, n = unit(weight.dtype), unit(torch.float32), x.shape[-1] + 3
        dot = n * single / (1 - n * single)
        # The weight's rounding; two outputs and the sum of two rounded ones; two or three products.
        bias = 0 if dense.bias is None else dense.bias.detach().double().abs()
        bound = reach * (u + 3 * dot) + (3 * u + 3 * single) * (reach + bias) * (1 + dot)
        assert ((found - expected).abs() <= bound).all()
        assert bound.max() < expected.abs().max()  # or it would say nothing


@pytest.mark.parametrize("name", BASES)
def test_unmerged_logits_are_as_near_as_the_merged_weights_rounding(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(name)
    patch = save_lines(base, tmp_path / "patch")
    export_lora(patch, tmp_path / "out", str(base))
    merge(base, patch, tmp_path / "merged")
    lora = logits(PeftModel.from_pretrained(load_base(base), tmp_path / "out")).double()
    rounded = logits(load_base(tmp_path / "merged")).double()
    exact = load_base(base).double()
    with torch.no_grad():
        for key, delta in read_adapter(patch).deltas.items():
            exact.get_parameter(key).add_(torch.from_numpy(delta.to_dense()))
    off = (rounded - logits(exact)).abs().max()  # what rounding does to the patch itself
    assert (lora - logits(exact)).abs().max() <= 3 * off
    assert (lora - rounded).abs().max() <= 4 * off


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_the_config_holds_for_readers_of_patterns_and_for_others(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(name)
    patch = save_lines(base, tmp_path / "patch", scale=0.3)
    export_lora(patch, tmp_path / "out", str(base))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    stored = load_file(tmp_path / "out" / FILE)
    assert config["peft_type"] == "LORA"
    scale = np.float32(0.3)
    assert np.float32(config["lora_alpha"] / config["r"]) == scale
    # Engines make room for r; what they don't find in the patterns must fit.
    assert config["r"] == max(tensor.shape[0] for key, tensor in stored.items() if "lora_A" in key)
    assert config["r"] not in config["rank_pattern"].values()
    assert config["target_modules"] == sorted(config["target_modules"])
    for module in config["target_modules"]:
        rank = config["rank_pattern"].get(module, config["r"])
        first, second = (stored[f"base_model.model.{module}.lora_{own}.weight"] for own in "AB")
        assert first.shape[0] == second.shape[1] == rank
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        assert np.float32(alpha / rank) == scale
        is_one_hot = [
            bool(((f == 0) | (f == 1)).all()) and f.sum() == rank for f in (first, second)
        ]
        assert any(is_one_hot)


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-9, 7.1, -2.3, 0.0])
@pytest.mark.parametrize("rank", [1, 3, 49, 576])
def test_the_alpha_divided_by_the_rank_is_the_scale(scale: float, rank: int) -> None:
    scale = float(np.float32(scale))
    assert np.float32(_find_alpha(scale, rank) / rank) == np.float32(scale)


def test_a_scale_on_the_command_is_multiplied(tiny_llama: Path, tmp_path: Path) -> None:
    patch = save_lines(tiny_llama, tmp_path / "patch", scale=0.5)
    export_lora(patch, tmp_path / "out", str(tiny_llama), scale=0.5)
    merge(tiny_llama, [(patch, 0.5)], tmp_path / "merged")
    found = PeftModel.from_pretrained(load_base(tiny_llama), tmp_path / "out").merge_and_unload()
    assert count_differing(found, load_base(tmp_path / "merged")) == 0


def refused(base: Path, patch: Path, out: Path) -> str:
    with pytest.raises(UnsupportedFeatureError) as caught:
        export_lora(patch, out, str(base))
    assert not out.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_scattered_entries_are_refused_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    patch = save_patch(tiny_llama, tmp_path / "patch", names=[UP])
    message = refused(tiny_llama, patch, tmp_path / "out")
    assert message.startswith(f"{UP}: expected whole rows or columns of a matrix, found")


@pytest.mark.parametrize(
    ("base", "name", "what"),
    [
        ("tiny_llama", "model.embed_tokens.weight", "found weight of a Embedding"),
        ("tiny_mixtral", "model.layers.0.mlp.experts.down_proj", "expected whole rows or columns"),
        ("tiny_llama", "model.norm.weight", "expected whole rows or columns of a matrix"),
    ],
)
def test_what_is_no_linear_layer_is_refused_by_name(
    base: str, name: str, what: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(base)
    group = None if name == "model.norm.weight" else "row"
    patch = save_patch(path, tmp_path / "patch", names=[name], group=group)
    message = refused(path, patch, tmp_path / "out")
    assert message.startswith(f"{name}: ")
    assert what in message


def test_another_base_is_refused(tiny_llama: Path, tiny_llama_bf16: Path, tmp_path: Path) -> None:
    patch = save_lines(tiny_llama, tmp_path / "patch")
    with pytest.raises(BaseMismatchError):
        export_lora(patch, tmp_path / "out", str(tiny_llama_bf16))
    assert not (tmp_path / "out").exists()
