"""A patch of whole rows or columns: on disk their numbers, in memory entries as any others."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from safeweights_peft import CorruptAdapterError, load_model, read_adapter
from safeweights_peft.patch.artifacts import in_encoding
from safeweights_peft.patch.io import read_metadata, write_adapter
from safeweights_peft.patch.records import Encoding, indices_key
from safeweights_peft.tuner.layer import layers
from tests.tuner.patches import (
    INPUT_IDS,
    ROUTES,
    compact,
    load_base,
    load_by_peft,
    load_by_transformers,
    logits,
    patch_model,
    same_weights,
    save_patch,
    twin,
    values_of,
)

MODELS = ["tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral"]
FILE = "adapter_model.safetensors"


@pytest.fixture(params=["row", "column"])
def group(request):
    return request.param


@pytest.fixture
def base(tiny_llama_bf16):
    return tiny_llama_bf16


@pytest.fixture
def patch(base, group, tmp_path):
    return save_patch(base, tmp_path / "patch", group=group)


def train_a_step(model):
    loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
    loss.backward()
    with torch.no_grad():
        for values in values_of(model).values():
            values -= 0.1 * values.grad
            values.grad = None
    return loss.item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("load_by", ROUTES)
def test_every_route_gives_the_output_of_the_merged_twin(load_by, name, group, request, tmp_path):
    base = request.getfixturevalue(name)
    patch = save_patch(base, tmp_path / "patch", group=group)
    records = read_metadata(patch).tensors.values()
    assert {record.encoding for record in records} == {Encoding(f"{group}s")}
    model = load_by(base, patch)
    assert torch.equal(logits(model), logits(twin(base, patch)))
    for layer in layers(model, "default"):
        assert layer.indices["default"].shape == layer["default"].shape
        assert layer["default"].dtype is torch.float32


@pytest.mark.parametrize("load_by", ROUTES)
def test_it_is_checked_and_saved_again_byte_for_byte(base, patch, load_by, tmp_path):
    model = load_by(base, patch)  # saved without a forward: indices may not be decoded yet
    again = tmp_path / "again"
    model.save_pretrained(again)
    saved = again if (again / FILE).is_file() else next(again.rglob(FILE)).parent
    assert (saved / FILE).read_bytes() == (patch / FILE).read_bytes()
    assert read_metadata(saved).content_id == read_metadata(patch).content_id


def test_the_file_holds_numbers_alone(base, patch, group):
    stored = load_file(patch / FILE)
    for name, record in read_metadata(patch).tensors.items():
        length = record.shape[1] if group == "row" else record.shape[0]
        assert stored[indices_key(name)].numel() * length == record.count


@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16"])
def test_low_cpu_memory_loading_gives_the_same(tiny_tied_llama, group, values_dtype, tmp_path):
    patch = save_patch(tiny_tied_llama, tmp_path / "p", group=group, values_dtype=values_dtype)
    model = PeftModel.from_pretrained(load_base(tiny_tied_llama), patch, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(twin(tiny_tied_llama, patch)))


def test_it_trains_as_the_compact_patch_does(base, patch, tmp_path):
    packed = compact(base, patch, tmp_path / "packed")
    models = [
        PeftModel.from_pretrained(load_base(base), path, is_trainable=True)
        for path in (patch, packed)
    ]
    start = read_adapter(patch).deltas
    for name, values in values_of(models[1]).items():  # steps stand for other values
        with torch.no_grad():
            values.copy_(torch.from_numpy(start[name].values))
    for _ in range(3):
        first, second = map(train_a_step, models)
        assert first == second
    for name, values in values_of(models[0]).items():
        assert torch.equal(values, values_of(models[1])[name])
    # A token that isn't read has a row of embeddings that no training moves.
    name = "model.layers.0.mlp.up_proj.weight"
    moved = values_of(models[0])[name].detach()
    assert not torch.equal(moved, torch.from_numpy(start[name].values))


def test_training_resumes_from_what_was_saved(base, group, tmp_path):
    whole = patch_model(load_base(base), base, group=group)
    train_a_step(whole)
    whole.save_pretrained(tmp_path / "half")
    expected = train_a_step(whole)
    half = PeftModel.from_pretrained(load_base(base), tmp_path / "half", is_trainable=True)
    assert train_a_step(half) == expected


def test_a_state_is_loaded_into_an_adapter_in_use(base, patch, group):
    live = patch_model(load_base(base), base, group=group)
    with torch.no_grad():
        for values in values_of(live).values():
            values.zero_()
    set_peft_model_state_dict(live, load_file(patch / FILE))
    assert torch.equal(logits(live), logits(twin(base, patch)))
    other = patch_model(load_base(base), base, seed=3, group=group)
    with pytest.raises(CorruptAdapterError, match="expected the same indices as before"):
        set_peft_model_state_dict(other, load_file(patch / FILE))


def test_the_state_of_a_loaded_adapter_goes_into_another_one(base, patch):
    first, second = load_by_peft(base, patch), load_by_peft(base, patch)
    with torch.no_grad():
        for values in values_of(second).values():
            values.zero_()
    set_peft_model_state_dict(second, get_peft_model_state_dict(first))
    assert torch.equal(logits(second), logits(first))
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(copy.deepcopy(second)), logits(first))


@pytest.mark.parametrize("load_by", [load_by_peft, load_by_transformers])
def test_numbers_of_another_base_are_refused(base, patch, load_by):
    model = load_base(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(base.parent / "other")
    with pytest.raises(Exception, match="expected the base that the adapter was made for"):
        logits(load_by(base.parent / "other", patch))


@pytest.mark.parametrize("place", [0, -1])
def test_forged_numbers_are_refused_in_a_model(base, patch, place):
    stored = load_file(patch / FILE)
    key = next(key for key in stored if "indices" in key)
    stored[key][place] = 2**31 - 1 if place else -1
    model = load_base(base)
    from safetensors.torch import save_file

    save_file(stored, patch / FILE, {"format": "pt"})
    with pytest.raises(CorruptAdapterError, match="expected"):
        logits(PeftModel.from_pretrained(model, patch))


def test_merging_gives_the_bits_of_the_flat_patch(base, patch, group, tmp_path):
    flat = compact(base, patch, tmp_path / "flat")
    metadata = in_encoding(read_metadata(patch), Encoding.PLAIN)
    assert metadata.tensors.keys() == read_metadata(flat).tensors.keys()
    first, second = load_model(base, patch), load_model(base, flat)
    assert same_weights(first, second)
    assert same_weights(load_by_peft(base, patch).merge_and_unload(), twin(base, patch))


def test_adapters_of_rows_and_of_entries_stand_side_by_side(base, patch, tmp_path):
    entries = save_patch(base, tmp_path / "entries", seed=5)
    model = load_by_peft(base, patch)
    model.load_adapter(entries, "second")
    model.base_model.set_adapter(["default", "second"])
    assert torch.equal(logits(model), logits(twin(base, patch, entries)))


def test_what_is_no_more_whole_is_plain(base, patch, tmp_path):
    adapter = read_adapter(patch)
    name = next(iter(adapter.deltas))
    delta = adapter.deltas[name]
    model = load_base(base)
    indices = {name: delta.indices[1:]}
    from safeweights_peft import create_adapter

    metadata = read_metadata(patch)
    record = metadata.tensors[name]
    flat = {name: type(record)(shape=record.shape, dtype=record.dtype, blocks=record.blocks)}
    peft_model = create_adapter(model, type(metadata)(mode=metadata.mode, tensors=flat), indices)
    peft_model.save_pretrained(tmp_path / "cut")
    assert read_metadata(tmp_path / "cut").tensors[name].encoding is Encoding.PLAIN
    assert np.array_equal(read_adapter(tmp_path / "cut").indices[name], delta.indices[1:])
    write_adapter(tmp_path / "again", read_adapter(tmp_path / "cut"))
