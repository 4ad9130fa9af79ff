"""What SPA can't protect is refused, with a name and a way out, before anything is changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from safeweights_peft import (
    BaseMismatchError,
    CorruptAdapterError,
    FormatError,
    ModelError,
    SafetyMap,
    SafeWeightsError,
    UnsupportedFeatureError,
    create_adapter,
    preserve,
)
from safeweights_peft.freeze import FrozenEntries
from safeweights_peft.training.lora import find_frozen_layers
from safeweights_peft.training.preserve import compute_correction
from tests.training.maps import BATCHES, DOWN, UP, hooks, kept, load, make_map, train


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused(
    model: nn.Module, safety_map: SafetyMap, error: type[SafeWeightsError], message: str
) -> None:
    """Check that a model is refused, and that no hook was set for it."""
    before = hooks(model)
    with pytest.raises(error, match=message), preserve(model, safety_map):
        pass
    assert hooks(model) == before


def test_a_model_without_a_parameter_of_the_map_is_refused_by_its_name(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.model.layers = model.model.layers[:1]
    message = rf"^{DOWN}: expected shape \[32, 48\], found no such parameter; train the base"
    refused(model, make_map(tiny_llama, [UP, DOWN]), BaseMismatchError, message)


def test_a_parameter_of_another_shape_is_refused_by_its_name(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.model.layers[1].mlp.down_proj = nn.Linear(7, 32, bias=False)
    message = rf"^{DOWN}: expected shape \[32, 48\], found \[32, 7\]; train the base"
    refused(model, make_map(tiny_llama, [UP, DOWN]), BaseMismatchError, message)


def test_a_base_with_other_entries_is_refused_by_the_parameters_name(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    train(model, steps=1)
    message = f"^{UP}: expected the base that the safety map was made for"
    refused(model, make_map(tiny_llama, [UP, DOWN]), BaseMismatchError, message)


def test_a_map_made_by_hand_with_indices_out_of_range_is_refused(tiny_llama: Path) -> None:
    safety_map = make_map(tiny_llama, [UP])
    safety_map.indices[UP][-1] = 48 * 32
    message = f"^{UP}: expected indices from 0 to 1535, found 1536"
    refused(load(tiny_llama), safety_map, CorruptAdapterError, message)


def test_a_path_that_holds_no_map_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(FormatError, match="expected a directory with adapter_config"):
        preserve(load(tiny_llama), tiny_llama).__enter__()


def test_a_parameter_on_the_meta_device_is_refused_by_its_name(tiny_llama: Path) -> None:
    message = f"^{UP}: .*found one on the meta device; load the model's weights"
    model = load(tiny_llama).to("meta")
    refused(model, make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


def test_a_quantized_parameter_is_refused_by_its_name(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    message = f"^{UP}: expected a whole tensor of float32.*found torch.int8.*unquantized"
    refused(model, make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


def test_a_partition_of_zero_3_is_refused_by_the_parameters_name(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    weight = model.get_parameter(UP)
    weight.data = torch.empty(0)  # what ZeRO-3 leaves of it
    weight.ds_id = 0
    message = f"^{UP}: .*found a partition of ZeRO-3; train it whole"
    refused(model, make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


def test_a_model_that_is_sharded_once_it_is_protected_is_refused_at_the_first_forward(
    tiny_llama: Path, alone: None
) -> None:
    model = load(tiny_llama)
    with preserve(model, make_map(tiny_llama, [UP])):
        model(BATCHES[0])
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        sharded = hooks(model)
        with pytest.raises(UnsupportedFeatureError, match=f"{UP}: expected the parameter that is"):
            model(BATCHES[0])
    model(BATCHES[0])
    assert hooks(model) < sharded


def test_a_shard_of_fsdp2_is_refused_by_the_parameters_name(tiny_llama: Path, alone: None) -> None:
    model = fully_shard(load(tiny_llama), mesh=init_device_mesh("cpu", (1,)))
    message = f"^{UP}: expected a whole tensor.*in a DTensor; .*train it whole"
    refused(model, make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.:UserWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_a_flat_parameter_of_fsdp_is_refused_by_the_parameters_name(
    use_orig_params: bool, tiny_llama: Path, alone: None
) -> None:
    model = FullyShardedDataParallel(
        load(tiny_llama), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    message = f"^{UP}: expected a whole parameter, .*FSDP has flattened; train it whole"
    refused(model, make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


def with_lora(base: Path) -> nn.Module:
    return peft.get_peft_model(load(base), peft.LoraConfig(target_modules=["up_proj"]))


def with_ia3(base: Path) -> nn.Module:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    return peft.get_peft_model(load(base), config)


def with_loha(base: Path) -> nn.Module:
    model = load(base)
    model.add_adapter(peft.LoHaConfig(target_modules=["up_proj"]))
    return model


def with_a_mixture(base: Path) -> nn.Module:
    config = peft.LoraConfig(target_modules=["up_proj"])
    return peft.get_peft_model(load(base), config, mixed=True)


def with_a_patch(base: Path) -> nn.Module:
    safety_map = make_map(base, [UP])
    return create_adapter(load(base), safety_map.metadata, safety_map.indices)


def with_a_prompt(base: Path) -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(load(base), config)


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (with_ia3, "IA3"),
        (with_loha, "LOHA"),
        (with_a_mixture, "PeftMixedModel"),
        (with_a_patch, "SAFEWEIGHTS"),
        (with_a_prompt, "PROMPT_TUNING"),
    ],
)
def test_an_adapter_other_than_lora_is_refused_by_its_kind(
    wrap: Callable[[Path], nn.Module], kind: str, tiny_llama: Path
) -> None:
    message = f"^model: expected LoRA or no adapter, found {kind}, .*merge the adapter first$"
    refused(wrap(tiny_llama), make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


def test_lora_that_is_merged_is_refused_by_the_layers_name(tiny_llama: Path) -> None:
    model = with_lora(tiny_llama)
    model.merge_adapter()
    message = f"^{UP[:-7]}: expected adapters that are not merged, found default.*; unmerge first$"
    refused(model, make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("options", "name", "found"),
    [
        ({"target_modules": ["up_proj"], "use_dora": True}, UP, "Dora in adapter default"),
        ({"target_modules": ["embed_tokens"]}, EMBEDDING, "Embedding on Embedding"),
        (
            {"target_modules": ["up_proj"], "trainable_token_indices": [3]},
            EMBEDDING,
            "TrainableTokensLayer on Embedding",
        ),
    ],
)
def test_lora_that_is_more_than_a_product_in_a_linear_layer_is_refused_by_the_layers_name(
    options: dict[str, Any], name: str, found: str, tiny_llama: Path
) -> None:
    model = peft.get_peft_model(load(tiny_llama), peft.LoraConfig(**options))
    message = f"^{name[:-7]}.*: expected plain LoRA on a linear layer .*, found {found}; leave"
    refused(model, make_map(tiny_llama, [name]), UnsupportedFeatureError, message)


def test_lora_beside_a_map_of_other_layers_may_be_of_any_form(tiny_llama: Path) -> None:
    config = peft.LoraConfig(target_modules=["up_proj", "embed_tokens"], use_dora=True)
    model, safety_map = peft.get_peft_model(load(tiny_llama), config), make_map(tiny_llama, [DOWN])
    weight = model.get_base_model().get_parameter(DOWN).requires_grad_()
    before = weight.detach().clone()
    with preserve(model, safety_map):
        train(model, steps=2)
    assert kept(model.get_base_model(), tiny_llama, safety_map)
    assert not torch.equal(weight, before)


def test_a_bias_of_loras_own_is_refused_where_the_layers_bias_holds_frozen_entries() -> None:
    base = nn.Sequential(nn.Linear(6, 5))
    config = peft.LoraConfig(target_modules=["0"], lora_bias=True)
    model = peft.get_peft_model(base, config)
    bias = model.base_model.model[0].base_layer.bias
    with pytest.raises(
        UnsupportedFeatureError, match=r"^0: .*found lora_bias, with frozen entries"
    ):
        find_frozen_layers(model, [FrozenEntries("0.bias", bias, torch.tensor([1]))])


def test_a_second_map_over_the_same_lora_layer_is_refused(tiny_llama: Path) -> None:
    model = with_lora(tiny_llama)
    with preserve(model, make_map(tiny_llama, [UP])):
        message = f"^{UP[:-7]}: expected a LoRA layer that no other map or patch protects"
        second = make_map(tiny_llama, [UP], seed=1)
        refused(model, second, UnsupportedFeatureError, message)


def test_the_base_under_lora_is_checked_as_ever(tiny_llama: Path) -> None:
    model = with_lora(tiny_llama)
    layer = model.get_submodule(f"base_model.model.{UP[:-7]}")
    before = layer.base_layer.weight.detach().clone()
    layer.base_layer.weight.data += 1
    message = f"^{UP}: expected the base that the safety map was made for"
    refused(model, make_map(tiny_llama, [UP]), BaseMismatchError, message)
    layer.base_layer.weight.data = before[:40]
    message = rf"^{UP}: expected shape \[48, 32\], found \[40, 32\]; train the base"
    refused(model, make_map(tiny_llama, [UP]), BaseMismatchError, message)


def test_a_copy_that_is_trained_in_full_beside_lora_is_checked_by_its_own_name(
    tiny_llama: Path,
) -> None:
    config = peft.LoraConfig(target_modules=["up_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(load(tiny_llama), config)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    message = r"^lm_head\.modules_to_save\.default\.weight: expected the base that the safety map"
    refused(model, make_map(tiny_llama, ["lm_head.weight"]), BaseMismatchError, message)


def test_a_parameter_that_the_adapted_model_lacks_is_refused_by_its_name(tiny_llama: Path) -> None:
    model = with_lora(tiny_llama)
    del model.base_model.model.model.layers[1]
    message = rf"^{DOWN}: expected shape \[32, 48\], found no such parameter; train the base"
    refused(model, make_map(tiny_llama, [DOWN]), BaseMismatchError, message)


def test_the_correction_of_an_adapter_that_the_model_lacks_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"^model: expected an adapter 'other', found none"):
        compute_correction(with_lora(tiny_llama), make_map(tiny_llama, [UP]), adapter="other")


def test_a_model_whose_adapter_was_merged_away_is_no_longer_refused(tiny_llama: Path) -> None:
    safety_map = make_map(tiny_llama, [DOWN])
    model = with_lora(tiny_llama).merge_and_unload().requires_grad_(True)
    with preserve(model, safety_map):
        train(model)
    assert kept(model, tiny_llama, safety_map)
