"""What PEFT offers and this method does not: each refused clearly, never answered wrongly."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from safeweights_peft import (
    BaseMismatchError,
    CorruptAdapterError,
    ModelError,
    SafeWeightsConfig,
    UnsupportedFeatureError,
)
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import TensorRecord
from safeweights_peft.tuner.loading import find_parameter
from safeweights_peft.tuner.model import SafeWeightsModel
from tests.tuner.patches import (
    INPUT_IDS,
    load_base,
    load_by_peft,
    logits,
    patch_model,
    save_patch,
)

UP = "model.layers.0.mlp.up_proj.weight"


def record(shape):
    return TensorRecord(shape=tuple(shape), dtype="float32", blocks=(Block.dense("x", shape),))


def test_different_adapters_within_a_batch(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    names = ["default", "__base__"]
    with pytest.raises(UnsupportedFeatureError, match="expected the same adapters for the whole"):
        model(input_ids=INPUT_IDS, adapter_names=names)
    with pytest.raises(UnsupportedFeatureError, match="use set_adapter and one batch per adapter"):
        model.generate(input_ids=INPUT_IDS, adapter_names=names, max_new_tokens=1)


def test_hotswapping(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    model = load_by_peft(tiny_llama, patch)
    with pytest.raises(ValueError, match="only supports LORA but SAFEWEIGHTS was passed"):
        hotswap_adapter(model, str(patch), "default")
    plain = load_base(tiny_llama)
    plain.load_adapter(patch)
    with pytest.raises(ValueError, match="only supported for LoRA"):
        plain.load_adapter(patch, adapter_name="default", hotswap=True)


@pytest.mark.filterwarnings("ignore:The PEFT config's .base_model_name_or_path. was:UserWarning")
def test_models_of_mixed_methods(tiny_llama, tmp_path):
    config = SafeWeightsConfig.from_pretrained(save_patch(tiny_llama, tmp_path))
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(load_base(tiny_llama), config, mixed=True)


def test_another_method_in_the_same_model(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path)
    model = load_by_peft(tiny_llama, patch)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["up_proj"]))
    lora = get_peft_model(load_base(tiny_llama), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="different peft types"):
        lora.load_adapter(patch, "patch")


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_wrapping_what_another_method_has_wrapped(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path)
    model = load_base(tiny_llama)
    model.add_adapter(LoraConfig(target_modules=["up_proj"]), "lora")
    with pytest.raises(UnsupportedFeatureError, match="without adapters of other methods"):
        model.load_adapter(patch, "patch")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float64])
def test_parameters_of_other_dtypes(dtype):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedFeatureError, match=r"0.weight: expected a whole tensor of floa"):
        find_parameter(model, "0.weight", record((4, 4)))


def test_models_that_say_that_they_are_quantized(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path)
    model = load_base(tiny_llama)
    model.is_quantized = True
    with pytest.raises(UnsupportedFeatureError, match="load it unquantized"):
        PeftModel.from_pretrained(model, patch)


def test_embeddings_that_rewrite_their_weights():
    model = nn.Sequential(nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(UnsupportedFeatureError, match="found max_norm"):
        find_parameter(model, "0.weight", record((4, 4)))


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_parameters_of_modules_whose_children_mean_something(kind):
    model = nn.ModuleDict({"a": kind()})
    model["a"].scale = nn.Parameter(torch.ones(4))
    with pytest.raises(UnsupportedFeatureError, match=r"a.scale: expected .* may have any name"):
        find_parameter(model, "a.scale", record((4,)))


@pytest.mark.parametrize("name", ["merge", "a.b", "weight"])
def test_adapter_names_that_a_layer_uses_itself(tiny_llama, name):
    with pytest.raises(ModelError, match="expected another name"):
        patch_model(load_base(tiny_llama), tiny_llama, name)


def test_two_names_of_one_tied_parameter(tiny_llama, tiny_tied_llama, tmp_path):
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    untied = save_patch(tiny_llama, tmp_path / "untied", names=names)
    with pytest.raises(BaseMismatchError, match="found the one of"):
        load_by_peft(tiny_tied_llama, untied)
    head = save_patch(tiny_llama, tmp_path / "head", names=["lm_head.weight"])
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    with pytest.raises(UnsupportedFeatureError, match="expected the name that other adapters use"):
        model.load_adapter(head, "head")


def test_targets_in_the_usual_way_of_peft(tiny_llama):
    with pytest.raises(UnsupportedFeatureError, match="name parameters in create_adapter instead"):
        SafeWeightsConfig(target_modules=["up_proj"])
    with pytest.raises(
        ModelError, match="expected a config that names parameters, found one witho"
    ):
        get_peft_model(load_base(tiny_llama), SafeWeightsConfig())


@pytest.mark.filterwarnings("ignore:The PEFT config's .base_model_name_or_path. was:UserWarning")
def test_a_config_without_content_gives_no_output(tiny_llama, tmp_path):
    config = SafeWeightsConfig.from_pretrained(save_patch(tiny_llama, tmp_path))
    model = get_peft_model(load_base(tiny_llama), config)
    with pytest.raises(CorruptAdapterError, match="expected loaded indices, found none"):
        logits(model)


def test_a_base_that_trains_beside_the_adapter_is_never_written(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    weight = model.get_base_model().model.norm.weight.requires_grad_(True)
    before = weight.detach().clone()
    model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight, before)


def test_a_base_that_is_offloaded_already(tiny_llama, tmp_path):
    patch, base = save_patch(tiny_llama, tmp_path), load_base(tiny_llama)
    cpu_offload(base, torch.device("cpu"))
    with pytest.raises(UnsupportedFeatureError, match="load the model without offloading"):
        PeftModel.from_pretrained(base, patch)


def test_a_model_that_is_offloaded_later(tiny_llama, tmp_path):
    model = load_by_peft(tiny_llama, save_patch(tiny_llama, tmp_path))
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UnsupportedFeatureError, match="load the model without offloading"):
        logits(model)


def test_a_scale_that_is_not_finite(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with pytest.raises(ModelError, match="scale: expected a finite number, found nan"):
        model.set_scale("default", float("nan"))


def test_conversion_to_lora(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    assert not model.supports_lora_conversion()
    assert isinstance(model.base_model, SafeWeightsModel)
