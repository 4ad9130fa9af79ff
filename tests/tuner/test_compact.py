"""A patch in the compact encoding is the patch: on every route, and in whatever is done with it."""

import copy
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from safeweights_peft import (
    CorruptAdapterError,
    load_model,
    merge,
    read_adapter,
    round_values,
    write_map,
)
from safeweights_peft.patch.artifacts import in_encoding
from safeweights_peft.patch.io import read_metadata
from safeweights_peft.patch.records import Encoding
from tests.training.maps import kept, load, make_map, moved, train
from tests.tuner.patches import (
    INPUT_IDS,
    ROUTES,
    compact,
    load_base,
    load_by_peft,
    load_by_transformers,
    logits,
    same_weights,
    save_patch,
    twin,
    values_of,
)

MODELS = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]


@pytest.fixture
def base(tiny_llama_bf16):
    """A base in bfloat16, whose patches are stored as steps."""
    return tiny_llama_bf16


@pytest.fixture
def plain(base, tmp_path):
    """A patch as it was made."""
    return save_patch(base, tmp_path / "plain")


@pytest.fixture
def packed(base, plain, tmp_path):
    """The same patch in the compact encoding."""
    return compact(base, plain, tmp_path / "packed")


def no_bytes(model: nn.Module) -> bool:
    """Tell whether nothing in a model is in a coded form any more."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(tensor.dtype is torch.uint8 for tensor in tensors)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("load_by", ROUTES)
def test_every_route_gives_the_output_of_the_plain_patch(load_by, name, request, tmp_path):
    base = request.getfixturevalue(name)
    plain = save_patch(base, tmp_path / "plain")
    packed = compact(base, plain, tmp_path / "packed")
    records = read_metadata(packed).tensors.values()
    assert Encoding.COMPACT in {record.encoding for record in records}
    model = load_by(base, packed)
    assert torch.equal(logits(model), logits(twin(base, plain)))
    assert no_bytes(model)
    values = values_of(model).values()
    assert not any(tensor.requires_grad or tensor.dtype is not torch.float32 for tensor in values)


@pytest.mark.parametrize("load_by", ROUTES)
def test_values_in_memory_are_the_merged_entries_minus_the_base(base, plain, packed, load_by):
    merged, before = twin(base, plain), load_base(base)
    found = values_of(load_by(base, packed))
    for name, delta in read_adapter(plain).deltas.items():
        after, entries = (
            module.get_parameter(name).detach().flatten()[torch.from_numpy(delta.indices)].float()
            for module in (merged, before)
        )
        if read_metadata(packed).tensors[name].needs_base:
            assert torch.equal(found[name].detach(), after - entries), name


@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_cpu_memory_loading_gives_the_same_float32_values(
    tiny_tied_llama, values_dtype, autocast, tmp_path
):
    plain = save_patch(tiny_tied_llama, tmp_path / "plain", values_dtype=values_dtype)
    packed = compact(tiny_tied_llama, plain, tmp_path / "packed")
    model = PeftModel.from_pretrained(
        load_base(tiny_tied_llama), packed, low_cpu_mem_usage=True, autocast_adapter_dtype=autocast
    )
    assert all(tensor.dtype is torch.float32 for tensor in values_of(model).values())
    assert not any(tensor.requires_grad for tensor in values_of(model).values())
    assert torch.equal(logits(model), logits(twin(tiny_tied_llama, plain)))


def test_a_base_that_is_loaded_in_float32_is_stepped_from_in_its_own_dtype(base, plain, packed):
    found = load_by_peft(base, packed)
    wide = PeftModel.from_pretrained(load_base(base, dtype=torch.float32), packed)
    for name, values in values_of(wide).items():
        assert torch.equal(values, values_of(found)[name])


@pytest.mark.parametrize("name", ["tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral"])
def test_on_a_wider_base_both_encodings_give_the_merged_checkpoint(name, request, tmp_path):
    """One content id, one output: whichever the encoding, and on every route."""
    base, wide = request.getfixturevalue(name), {"dtype": torch.float32}
    plain = save_patch(base, tmp_path / "plain", values_dtype="float32")
    packed = compact(base, plain, tmp_path / "packed")
    assert read_metadata(plain).content_id == read_metadata(packed).content_id
    merge(base, plain, tmp_path / "merged")
    expected = logits(merged := load_base(tmp_path / "merged", **wide))
    assert not torch.equal(expected, logits(load_base(base, **wide)))
    for patch in (plain, packed):
        by_peft = PeftModel.from_pretrained(load_base(base, **wide), patch)
        by_transformers = load_base(base, **wide)
        by_transformers.load_adapter(patch)
        by_auto = AutoModelForCausalLM.from_pretrained(patch, **wide).eval()
        by_auto_peft = AutoPeftModelForCausalLM.from_pretrained(patch, **wide).eval()
        unmerged, loaded = (load_model(base, patch, merge, **wide) for merge in (False, True))
        for model in (by_peft, by_transformers, by_auto, by_auto_peft, unmerged, loaded):
            assert torch.equal(logits(model), expected)
        with by_peft.disable_adapter():
            logits(by_peft)
        by_transformers.disable_adapters()
        by_transformers.enable_adapters()
        for model in (by_peft, by_transformers):
            assert torch.equal(logits(model), expected)
        by_auto_peft.merge_adapter()
        assert torch.equal(logits(by_auto_peft), expected)
        assert same_weights(by_peft.merge_and_unload(), merged)
        assert same_weights(loaded, merged)


@pytest.mark.parametrize("by_peft", [True, False])
def test_a_patch_to_be_trained_has_its_values_when_an_optimizer_asks(base, packed, by_peft):
    if by_peft:
        model = PeftModel.from_pretrained(load_base(base), packed, is_trainable=True)
    else:
        model = load_base(base)
        model.load_adapter(packed, is_trainable=True)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    assert {id(tensor) for tensor in trained} == {
        id(tensor) for tensor in values_of(model).values()
    }
    before = [tensor.detach().clone() for tensor in trained]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    assert not any(map(torch.equal, before, trained))


def test_a_second_patch_may_be_trained_while_it_is_not_active(base, plain, packed):
    model = load_by_peft(base, plain)
    model.load_adapter(packed, "second", is_trainable=True)
    assert all(tensor.requires_grad for tensor in values_of(model, "second").values())
    assert not any(tensor.requires_grad for tensor in values_of(model).values())


def test_compact_and_plain_patches_act_together_in_any_order(base, plain, packed, tmp_path):
    other = save_patch(base, tmp_path / "other", seed=1)
    packed_other = compact(base, other, tmp_path / "packed_other")
    for first, second in [(packed, other), (plain, packed_other), (packed, packed_other)]:
        model = load_by_peft(base, first)
        model.load_adapter(second, "second")
        assert torch.equal(logits(model), logits(twin(base, plain)))
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(twin(base, other)))
        model.set_adapter("default")
        model.delete_adapter("second")
        assert torch.equal(logits(model), logits(twin(base, plain)))


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_transformers_loads_several_and_switches(base, plain, packed, tmp_path):
    other = save_patch(base, tmp_path / "other", seed=1)
    model = load_by_transformers(base, packed)
    model.load_adapter(compact(base, other, tmp_path / "packed_other"), "second")
    for name, expected in [("second", other), ("default", plain)]:
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(twin(base, expected)))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(load_base(base)))


def test_merging_gives_the_bits_of_the_plain_patch_and_unmerging_those_of_the_base(
    base, plain, packed
):
    model = load_by_peft(base, packed)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_weights(model.unload(), load_base(base))
    assert same_weights(load_by_peft(base, packed).merge_and_unload(), twin(base, plain))


def test_copies_are_the_same_model(base, packed):
    model = load_by_transformers(base, packed)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))


def test_the_scale_multiplies_the_decoded_values(base, packed):
    model = load_by_peft(base, packed)
    model.set_scale("default", 0.0)
    assert torch.equal(logits(model), logits(load_base(base)))
    round_values(model)
    model.set_scale("default", 1.0)
    assert torch.equal(logits(model), logits(load_by_peft(base, packed)))


def test_a_weighted_adapter_of_a_compact_one_is_that_one(base, packed):
    model = load_by_peft(base, packed)
    expected = logits(model)
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("load_by", [load_by_peft, load_by_transformers])
def test_what_is_saved_is_plain_and_does_the_same(base, plain, packed, load_by, tmp_path):
    load_by(base, packed).save_pretrained(tmp_path / "saved")
    saved = read_metadata(tmp_path / "saved")
    assert {record.encoding for record in saved.tensors.values()} == {Encoding.PLAIN}
    assert saved.content_id == read_metadata(packed).content_id
    assert torch.equal(logits(load_by_peft(base, tmp_path / "saved")), logits(twin(base, plain)))


def test_a_training_that_began_with_a_compact_patch_is_resumed_from_its_plain_checkpoint(
    base, packed, tmp_path
):
    model = PeftModel.from_pretrained(load_base(base), packed, is_trainable=True)
    loss_of(model).backward()
    with torch.no_grad():
        for values in values_of(model).values():
            values -= 0.1 * values.grad
    model.save_pretrained(tmp_path / "checkpoint")
    resumed = PeftModel.from_pretrained(load_base(base), packed, is_trainable=True)
    resumed.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    for name, values in values_of(model).items():
        assert torch.equal(values, values_of(resumed)[name])


def test_a_compact_patch_is_loaded_again_into_the_adapter_that_it_became(base, packed):
    model = PeftModel.from_pretrained(load_base(base), packed, is_trainable=True)
    expected = logits(model)
    with torch.no_grad():
        for values in values_of(model).values():
            values.zero_()
    model.load_adapter(packed, "default", is_trainable=True)
    assert torch.equal(logits(model), expected)


def test_another_compact_patch_is_not_loaded_into_an_adapter_in_use(base, packed, tmp_path):
    other = save_patch(base, tmp_path / "other", seed=1)
    model = load_by_peft(base, packed)
    with pytest.raises(CorruptAdapterError, match=r"do not use this adapter|expected digest"):
        model.load_adapter(compact(base, other, tmp_path / "packed_other"), "default")


def test_the_trainer_trains_what_transformers_has_loaded(base, packed, tmp_path):
    model = load_base(base)
    model.load_adapter(packed, is_trainable=True)
    before = {name: tensor.detach().clone() for name, tensor in values_of(model).items()}
    rows = [{"input_ids": INPUT_IDS[0], "labels": INPUT_IDS[0]}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        save_strategy="no",
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in values_of(model).items())


def test_a_compact_safety_map_protects(tiny_llama, tmp_path):
    safety_map = make_map(tiny_llama)
    metadata = in_encoding(safety_map.metadata, Encoding.COMPACT)
    write_map(tmp_path / "map", type(safety_map)(metadata, safety_map.indices, safety_map.scores))
    records = read_metadata(tmp_path / "map").tensors.values()
    assert Encoding.COMPACT in {record.encoding for record in records}
    model = PeftModel.from_pretrained(load(tiny_llama), str(tmp_path / "map"), is_trainable=True)
    train(model)
    assert kept(model.get_base_model(), tiny_llama, safety_map)
    assert moved(model.get_base_model(), tiny_llama)
