"""Situations in which an adapter was once ignored, counted twice or lost, mostly in silence."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from safeweights_peft import (
    ModelError,
    SafeWeightsConfig,
    UnsupportedFeatureError,
    create_adapter,
    validate,
)
from safeweights_peft.delta import SparseDelta
from safeweights_peft.modeling.layout import describe, eligible_parameters
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord
from safeweights_peft.tuner.adapter import describe_deltas, fill
from tests.tuner.patches import (
    INPUT_IDS,
    load_base,
    load_by_peft,
    logits,
    patch_model,
    random_content,
    save_patch,
    twin,
    values_of,
)

SIZES = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss


def gradients(model, between=lambda model: None):
    loss = loss_of(model)
    between(model)
    loss.backward()
    return [values.grad for values in values_of(model).values()]


def all_equal(left, right):
    return all(map(torch.equal, left, right))


def patch_all(model, names):
    """Patch parameters of a model that is on no disk; return the dense twin beside it."""
    indices, values = random_content(model, names=list(names))
    metadata = AdapterMetadata(mode=Mode.SET, tensors=describe(model, indices, None))
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, at in indices.items():
            dense.get_parameter(name).view(-1)[torch.from_numpy(at)] += torch.from_numpy(
                values[name]
            )
    return create_adapter(model, metadata, indices, values=values), dense


def hybrid():
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        **SIZES,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    return Qwen3_5ForCausalLM(config).eval()


def mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**SIZES, state_size=4)).eval()


@pytest.mark.parametrize("build", [hybrid, mamba])
def test_weights_that_are_read_without_calling_their_module_act_and_train(build):
    model, dense = patch_all(base := build(), eligible_parameters(base))
    assert [name for name in values_of(model) if "conv1d.weight" in name]
    live = logits(model)
    torch.testing.assert_close(live, logits(dense), rtol=1e-5, atol=1e-6)
    loss_of(model).backward()
    loss_of(dense).backward()
    for name, values in values_of(model).items():
        at = torch.from_numpy(random_content(dense, names=list(values_of(model)))[0][name])
        expected = dense.get_parameter(name).grad.flatten()[at]
        torch.testing.assert_close(values.grad, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert torch.equal(logits(model.merge_and_unload()), live)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
@pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning")
def test_fsdp1_is_refused_by_name(tiny_llama, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = patch_model(load_base(tiny_llama), tiny_llama)
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
        with pytest.raises(ModelError, match=r"DDP or FSDP2 .*, not FSDP1"):
            wrapped(input_ids=INPUT_IDS)
        saved = get_peft_model_state_dict(wrapped)
        assert not [key for key in saved if "_fsdp_wrapped_module" in key]
    finally:
        dist.destroy_process_group()


BETWEEN = {
    "state_dict": lambda model: model.state_dict(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "a saved state": get_peft_model_state_dict,
    "to the cpu": lambda model: model.to("cpu"),
    "to float": lambda model: model.float(),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_look_at_the_base_between_forward_and_backward_changes_no_gradient(tiny_llama, what):
    expected = gradients(patch_model(load_base(tiny_llama), tiny_llama))
    model = patch_model(load_base(tiny_llama), tiny_llama)
    assert all_equal(gradients(model, BETWEEN[what]), expected)


def test_the_state_that_is_saved_between_forward_and_backward_is_the_bases(tiny_tied_llama):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    loss = loss_of(model)
    state = model.get_base_model().state_dict()
    for name, tensor in load_base(tiny_tied_llama).state_dict().items():
        assert torch.equal(state[name], tensor), name
    loss.backward()


def test_a_second_backward_after_a_forward_of_the_base_gives_the_same(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    expected = gradients(patch_model(load_base(tiny_llama), tiny_llama))
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    model.zero_grad()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(tiny_llama)))
    loss.backward()
    assert all_equal([values.grad for values in values_of(model).values()], expected)


def test_what_is_saved_after_a_cast_is_the_same_patch_of_the_same_base(tiny_llama, tmp_path):
    first = save_patch(tiny_llama, tmp_path / "first")
    model = load_by_peft(tiny_llama, first).to(torch.bfloat16)
    logits(model)
    model.save_pretrained(tmp_path / "second")
    assert validate(tmp_path / "second").content_id == validate(first).content_id
    again = load_by_peft(tiny_llama, tmp_path / "second")
    assert torch.equal(logits(again), logits(twin(tiny_llama, first)))


class Two(nn.Module):
    """Two layers that are no language model."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(8, 16)
        self.lin1 = nn.Linear(16, 4)

    def forward(self, x):
        return self.lin1(self.lin0(x).relu())


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("after", ["a forward", "saving"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_traced_model_holds_the_patch(trained, after):
    torch.manual_seed(0)
    base, x = Two(), torch.randn(3, 8)
    plain = base(x).detach()
    record = TensorRecord(
        shape=(16, 8), dtype="float32", blocks=(Block.dense("lin0.weight", (16, 8)),)
    )
    metadata = AdapterMetadata(mode=Mode.SET, tensors={"lin0.weight": record})
    deltas = {
        "lin0.weight": SparseDelta((16, 8), np.arange(10, dtype=np.int32), np.ones(10, np.float32))
    }
    config = SafeWeightsConfig.from_metadata(describe_deltas(base, metadata, deltas))
    config.task_type = None
    model = get_peft_model(base, config)
    fill(model, "default", deltas)
    model.base_model.set_adapter("default", inference_mode=not trained)
    with torch.no_grad():
        expected = model(x)
        if after == "saving":
            model.state_dict()
        traced = torch.jit.trace(base, (x,))
        assert torch.equal(traced(x), expected)
    assert not torch.equal(expected, plain)


@pytest.mark.filterwarnings("ignore:While compiling:UserWarning")  # of transformers
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_an_export_after_saving_holds_the_patch_in_memory(trained, strict, tiny_llama, tmp_path):
    """An ONNX file is written from that memory, past torch's functions."""
    model = PeftModel.from_pretrained(load_base(tiny_llama), save_patch(tiny_llama, tmp_path))
    model.base_model.set_adapter("default", inference_mode=not trained)
    merged = dict(twin(tiny_llama, tmp_path).named_parameters())
    model.state_dict()
    options = {"attention_mask": torch.ones_like(INPUT_IDS), "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model.get_base_model(), (INPUT_IDS,), options, strict=strict)
        expected = logits(model)
        assert torch.equal(exported.module()(INPUT_IDS, **options).logits, expected)
    with torch._C.DisableTorchFunctionSubclass():
        held = {name: own for name, own in exported.state_dict.items() if name in merged}
        assert held
        assert all(torch.equal(own, merged[name]) for name, own in held.items())


def test_an_average_of_a_model_that_never_changes_is_the_model(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    expected = logits(model)
    average = AveragedModel(model)
    logits(model)
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(logits(average), expected)


def test_a_model_whose_layers_are_checkpointed_by_wrappers_is_saved(tiny_llama, tmp_path):
    expected = save_patch(tiny_llama, tmp_path / "expected")
    model = patch_model(load_base(tiny_llama), tiny_llama)
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer)
    )
    loss_of(model).backward()
    model.save_pretrained(tmp_path / "saved")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        saved = (tmp_path / "saved" / name).read_bytes()
        assert saved == (expected / name).read_bytes()


def test_values_that_change_through_data_are_seen(tiny_llama, tmp_path):
    model = load_by_peft(tiny_llama, save_patch(tiny_llama, tmp_path / "patch"))
    before = logits(model)
    for values in values_of(model).values():
        values.data.zero_()
    assert torch.equal(logits(model), logits(load_base(tiny_llama)))
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("change", [torch.neg, lambda values: values.flip(0)])
def test_values_whose_bits_have_the_same_sum_are_seen(change, tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    model, other = (load_by_peft(tiny_llama, patch) for _ in range(2))
    for values in values_of(model).values():
        signs = torch.arange(len(values)) % 2 * 2.0 - 1  # one value is none of two halves
        values.data.abs_().mul_(signs)[len(values) // 2 * 2 :] = 0
    before = logits(model)
    for ours, theirs in zip(values_of(model).values(), values_of(other).values(), strict=True):
        ours.data.copy_(change(ours.data))
        theirs.data.copy_(ours.data)
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), before)


def test_a_merged_model_is_pickled(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model.merge_adapter()
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other), logits(model))
    other.unmerge_adapter()
    with other.disable_adapter():
        assert torch.equal(logits(other), logits(load_base(tiny_llama)))


def test_entries_in_a_module_and_in_its_child_act_and_train():
    base = mamba()
    names = ["backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.x_proj.weight"]
    model, dense = patch_all(base, names)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-6)
    assert all(gradient.any() for gradient in gradients(model))


def test_offloading_to_disk_is_refused_before_a_file_of_the_base_is_written(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    before = (tiny_llama / "model.safetensors").read_bytes()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, **options)
    with pytest.raises(UnsupportedFeatureError, match="is offloaded; load the model without"):
        PeftModel.from_pretrained(base, patch, **options)
    assert (tiny_llama / "model.safetensors").read_bytes() == before


def test_a_tensor_that_stands_for_a_quantized_one_is_refused(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")

    class Quantized(torch.Tensor):
        """Claims to be float32, as torchao's tensors do."""

    base = load_base(tiny_llama)
    weight = base.lm_head.weight.data.as_subclass(Quantized)
    base.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedFeatureError, match="float32 in a Quantized; load the base unqu"):
        PeftModel.from_pretrained(base, patch)


def test_an_adapter_of_another_ones_config_is_a_copy_of_it(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    expected = logits(model)
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does for DPO, GRPO and KTO
    with torch.no_grad():
        for values in values_of(model).values():
            values.mul_(3)
    assert not torch.equal(logits(model), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_a_pickle_that_nobody_could_load_is_not_written(tiny_llama, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with pytest.raises(UnsupportedFeatureError, match="safe_serialization: expected True"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_numbers_are_named_in_a_safe_merge(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with torch.no_grad():
        values_of(model)["lm_head.weight"][0] = float("nan")
    with pytest.raises(ValueError, match=r"lm_head.weight: .*correct the adapter's values"):
        model.merge_and_unload(safe_merge=True)
