"""What SPA can't protect is refused, with a name and a way out, before anything is changed."""

from collections.abc import Callable, Iterator
from pathlib import Path

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
from tests.training.maps import DOWN, UP, hooks, kept, load, make_map, train


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused(
    model: nn.Module, safety_map: SafetyMap, error: type[SafeWeightsError], message: str
) -> None:
    """Checks that a model is refused, and that no hook was set for it."""
    before = hooks(model)
    with pytest.raises(error, match=message), preserve(model, safety_map):
        pass
    assert hooks(model) == before


def test_a_model_without_a_parameter_of_the_map_is_refused_by_its_name(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.model.layers = model.model.layers[:1]
    message = f"^{DOWN}: expected a parameter of the model, found none; train the base"
    refused(model, make_map(tiny_llama, [UP, DOWN]), ModelError, message)


def test_a_parameter_of_another_shape_is_refused_by_its_name(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    model.model.layers[1].mlp.down_proj = nn.Linear(7, 32, bias=False)
    message = rf"^{DOWN}: expected shape \[32, 48\], found \[32, 7\]; train the base"
    refused(model, make_map(tiny_llama, [UP, DOWN]), ModelError, message)


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


def with_lora_injected(base: Path) -> nn.Module:
    model = load(base)
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"]))
    return model


def with_a_patch(base: Path) -> nn.Module:
    safety_map = make_map(base, [UP])
    return create_adapter(load(base), safety_map.metadata, safety_map.indices)


def with_a_prompt(base: Path) -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(load(base), config)


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (with_lora, "LORA"),
        (with_lora_injected, "LORA"),
        (with_a_patch, "SAFEWEIGHTS"),
        (with_a_prompt, "PROMPT_TUNING"),
    ],
)
def test_a_model_with_an_adapter_is_refused_by_the_adapters_kind(
    wrap: Callable[[Path], nn.Module], kind: str, tiny_llama: Path
) -> None:
    message = f"^model: expected one without adapters, found {kind}: under an adapter the base is"
    refused(wrap(tiny_llama), make_map(tiny_llama, [UP]), UnsupportedFeatureError, message)


def test_a_model_whose_adapter_was_merged_away_is_no_longer_refused(tiny_llama: Path) -> None:
    safety_map = make_map(tiny_llama, [DOWN])
    model = with_lora(tiny_llama).merge_and_unload().requires_grad_(True)
    with preserve(model, safety_map):
        train(model)
    assert kept(model, tiny_llama, safety_map)
