"""Wherever the base is seen, saved, copied or moved, it is the base, though forwards write it."""

import copy
import io

import pytest
import torch
from peft import PeftModel
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict

from safeweights_peft import MergeError, ModelError
from safeweights_peft.tuner.layer import layers
from tests.tuner.patches import (
    INPUT_IDS,
    load_base,
    logits,
    patch_model,
    same_weights,
    save_patch,
    twin,
    values_of,
)


@pytest.fixture(params=["tiny_llama", "tiny_tied_llama", "tiny_mixtral"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def used(base):
    """A patched model that has run, so that its base is overwritten."""
    model = patch_model(load_base(base), base)
    logits(model)
    return model


def same_state(state, base):
    plain = load_base(base).state_dict()
    return state.keys() == plain.keys() and all(torch.equal(state[k], plain[k]) for k in plain)


def test_the_state_dict_of_the_base_is_that_of_the_base(used, base):
    assert same_state(get_base_model_state_dict(used), base)


def test_a_forward_after_the_state_dict_uses_the_patch_again(used):
    expected = logits(used)
    used.state_dict()
    assert torch.equal(logits(used), expected)


def test_the_parameters_are_the_bases_while_adapters_are_disabled(used, base):
    with used.disable_adapter():
        live = {
            name: parameter
            for name, parameter in used.get_base_model().named_parameters()
            if "safeweights" not in name
        }
        plain = dict(load_base(base).named_parameters())
        assert live.keys() == plain.keys()
        assert all(torch.equal(live[name], plain[name]) for name in plain)
        assert torch.equal(logits(used), logits(load_base(base)))


def test_unloading_gives_back_the_base(used, base):
    assert same_weights(used.unload(), load_base(base))


def test_deleting_the_only_adapter_gives_back_the_base(used, base):
    used.delete_adapter("default")
    assert torch.equal(logits(used.base_model.model), logits(load_base(base)))
    assert same_weights(used.unload(), load_base(base))


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
def test_deleting_one_adapter_leaves_the_other(base, tmp_path):
    save_patch(base, tmp_path / "second", seed=1)
    model = patch_model(load_base(base), base)
    model = patch_model(model, base, "second", seed=1)
    model.set_adapter("default")
    logits(model)
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model), logits(twin(base, tmp_path / "second")))


@pytest.mark.parametrize("by", ["deepcopy", "pickle"])
def test_a_copy_works_alone_and_holds_the_base(used, base, by):
    expected = logits(used)
    if by == "deepcopy":
        other = copy.deepcopy(used)
    else:
        buffer = io.BytesIO()
        torch.save(used, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for values in values_of(used).values():
            values.zero_()
    assert torch.equal(logits(used), logits(load_base(base)))
    assert torch.equal(logits(other), expected)
    assert same_weights(other.unload(), load_base(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_to_another_dtype_leaves_indices_and_values_alone(used, dtype):
    values = {name: tensor.detach().clone() for name, tensor in values_of(used).items()}
    used.to(dtype)
    for name, tensor in values_of(used).items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, values[name])
    for name, buffer in used.named_buffers():
        assert "safeweights_indices" not in name or buffer.dtype is torch.int32


def test_a_model_that_is_cast_holds_the_merged_checkpoint_cast(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    model = patch_model(load_base(tiny_llama), tiny_llama)
    logits(model)
    model.to(torch.bfloat16)
    assert torch.equal(logits(model), logits(twin(tiny_llama, patch).to(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_model_that_is_cast_to_a_byte_holds_the_merged_checkpoint_cast(
    dtype, tiny_llama, tmp_path
):
    model = PeftModel.from_pretrained(load_base(tiny_llama), save_patch(tiny_llama, tmp_path))
    merged, plain = twin(tiny_llama, tmp_path).to(dtype), load_base(tiny_llama).to(dtype)
    model.to(dtype)

    def holds(expected):
        return all(
            torch.equal(layer.parameter.float(), expected.get_parameter(layer.name).float())
            for layer in layers(model)
        )

    assert holds(merged)
    with model.disable_adapter():
        assert holds(plain)
    model.merge_adapter()
    assert holds(merged)
    model.unmerge_adapter()
    state = model.get_base_model().state_dict()
    for layer in layers(model):
        assert torch.equal(state[layer.name].float(), plain.get_parameter(layer.name).float())


def test_values_keep_their_gradients_when_the_model_is_moved(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    gradients = {name: tensor.grad.clone() for name, tensor in values_of(model).items()}
    model.half()
    for name, tensor in values_of(model).items():
        assert torch.equal(tensor.grad, gradients[name])


def test_weights_loaded_into_the_base_stay(used, base):
    zeros = {
        name: torch.zeros_like(tensor) for name, tensor in load_base(base).state_dict().items()
    }
    set_base_model_state_dict(used, zeros)
    assert not any(tensor.any() for tensor in get_base_model_state_dict(used).values())
    logits(used)
    assert not any(tensor.any() for tensor in get_base_model_state_dict(used).values())


def test_weights_are_not_loaded_into_a_merged_base(used, base):
    state = load_base(base).state_dict()
    used.merge_adapter()
    with pytest.raises(MergeError, match="call unmerge_adapter first"):
        set_base_model_state_dict(used, state)


def test_a_parameter_that_was_replaced_while_overwritten_is_an_error(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    logits(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.clone(), False)
    with pytest.raises(ModelError, match=r"up_proj.weight: expected .* found another"):
        logits(model)


def test_an_untied_head_is_an_error(tiny_tied_llama):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    head = model.get_base_model().lm_head
    head.weight = torch.nn.Parameter(head.weight.clone(), False)
    with pytest.raises(ModelError, match=r"embed_tokens.weight: expected the parameter .* untied"):
        logits(model)
