"""All four load routes give the same model, and none lets a bad file or a wrong base through."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel, get_base_model_state_dict
from safetensors.numpy import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from safeweights_peft import (
    AlreadyMergedError,
    BaseMismatchError,
    CorruptAdapterError,
    SafetyMap,
    UnsupportedFeatureError,
    UnsupportedVersionError,
    merge,
    read_adapter,
    write_map,
)
from safeweights_peft.delta import digest
from safeweights_peft.modeling.tensors import check_entries, to_torch
from safeweights_peft.patch.records import Mode, indices_key, values_key
from tests.hostile.edits import rename
from tests.tiny_models import save_tiny_llama
from tests.tuner.patches import (
    ROUTES,
    edit_config,
    load_base,
    load_by_peft,
    load_by_transformers,
    logits,
    patch_model,
    save_patch,
    twin,
    values_of,
)
from tests.zoo.architectures import save_checkpoint

MODELS = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
VICTIM = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tiny_llama, tmp_path_factory):
    """A good patch of the tiny Llama; copy it before breaking it."""
    return save_patch(tiny_llama, tmp_path_factory.mktemp("good"))


@pytest.fixture
def patch(good, tmp_path):
    """A patch of the tiny Llama to break."""
    return shutil.copytree(good, tmp_path / "patch")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("load", ROUTES)
def test_every_route_gives_the_output_of_the_dense_twin(load, name, request, tmp_path):
    base = request.getfixturevalue(name)
    patch = save_patch(base, tmp_path / "patch", values_dtype="bfloat16")
    model = load(base, patch)
    assert torch.equal(logits(model), logits(twin(base, patch)))
    assert all(tensor.dtype is torch.float32 for tensor in values_of(model).values())


def test_a_route_that_renames_tensors_is_refused_and_another_named(tmp_path):
    """By a pattern of a dot, transformers reads Laguna's `shared_experts` as two names."""
    base, name = tmp_path / "base", "model.layers.1.mlp.shared_experts.up_proj.weight"
    save_checkpoint("laguna", base)
    patch = save_patch(base, tmp_path / "patch", names=[name])
    expected = logits(twin(base, patch))
    assert torch.equal(logits(load_by_peft(base, patch)), expected)
    with pytest.raises(CorruptAdapterError, match=r"PeftModel.from_pretrained where load_adapter"):
        logits(load_by_transformers(base, patch))


@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("autocast", [True, False])
def test_low_cpu_memory_loading_gives_the_same_float32_values(
    tiny_tied_llama, values_dtype, autocast, tmp_path
):
    patch = save_patch(tiny_tied_llama, tmp_path / "patch", values_dtype=values_dtype)
    model = PeftModel.from_pretrained(
        load_base(tiny_tied_llama), patch, low_cpu_mem_usage=True, autocast_adapter_dtype=autocast
    )
    assert all(tensor.dtype is torch.float32 for tensor in values_of(model).values())
    assert not any(tensor.requires_grad for tensor in values_of(model).values())
    assert torch.equal(logits(model), logits(twin(tiny_tied_llama, patch)))


def test_a_loaded_patch_is_frozen_unless_it_is_to_be_trained(tiny_llama, good):
    frozen = PeftModel.from_pretrained(load_base(tiny_llama), good)
    trained = PeftModel.from_pretrained(load_base(tiny_llama), good, is_trainable=True)
    assert not any(tensor.requires_grad for tensor in frozen.parameters())
    assert all(tensor.requires_grad for tensor in values_of(trained).values())
    model = load_base(tiny_llama)
    model.load_adapter(good, is_trainable=True)
    assert all(tensor.requires_grad for tensor in values_of(model).values())


def test_a_bfloat16_base_that_is_loaded_in_float32_is_recognized(tiny_llama_bf16, tmp_path):
    patch = save_patch(tiny_llama_bf16, tmp_path / "patch")
    model = load_base(tiny_llama_bf16, dtype=torch.float32)
    model.load_adapter(patch)
    expected = logits(model)
    assert expected.dtype is torch.float32
    other = PeftModel.from_pretrained(load_base(tiny_llama_bf16, dtype=torch.float32), patch)
    assert torch.equal(logits(other), expected)


def test_a_base_in_a_dtype_that_loses_digits_is_refused_with_advice(tiny_llama, good):
    model = load_base(tiny_llama, dtype=torch.bfloat16)
    with pytest.raises(BaseMismatchError, match="load that one in float32, not bfloa"):
        PeftModel.from_pretrained(model, good)


class Copies(TorchDispatchMode):
    """Count the copies of floating tensors with a number of entries, wherever they go in memory."""

    def __init__(self, count):
        super().__init__()
        self.count, self.found = count, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in {"copy_", "clone", "_to_copy"} and result.numel() == self.count:
            source = args[1] if name == "copy_" else args[0]
            is_data = result.is_floating_point() and not result.is_meta
            self.found += is_data and result.data_ptr() != source.data_ptr()
        return result


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16"])
def test_peft_copies_values_once_from_the_file_to_where_they_are_used(
    tiny_llama, values_dtype, low_cpu_mem_usage, tmp_path, monkeypatch
):
    patch = save_patch(tiny_llama, tmp_path / "patch", names=[VICTIM], values_dtype=values_dtype)
    base, expected = load_base(tiny_llama), read_adapter(patch).deltas[VICTIM].values
    copies = Copies(expected.size)

    def view(array):
        tensor = to_torch(array)
        is_copy = tensor.data_ptr() != array.__array_interface__["data"][0]
        copies.found += is_copy and tensor.is_floating_point()
        return tensor

    monkeypatch.setattr("safeweights_peft.tuner.loading.to_torch", view)
    with copies:
        model = PeftModel.from_pretrained(base, patch, low_cpu_mem_usage=low_cpu_mem_usage)
    assert copies.found == 1
    (patch / "adapter_model.safetensors").unlink()  # nothing is left in the file
    assert np.array_equal(values_of(model)[VICTIM].numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_peft_checks_a_patch_once(tiny_llama, good, low_cpu_mem_usage, monkeypatch):
    checked = []

    def check(name, *arguments):
        checked.append(name)
        return check_entries(name, *arguments)

    monkeypatch.setattr("safeweights_peft.tuner.loading.check_entries", check)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    logits(PeftModel.from_pretrained(load_base(tiny_llama), good, **options))
    assert sorted(checked) == sorted(read_adapter(good).deltas)


def edit_tensors(patch, edit, fix_digest=True):
    """Change a patch's tensors, and (like a careful forger) its digest."""
    path = patch / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if fix_digest:
        config = json.loads((patch / "adapter_config.json").read_text(encoding="utf-8"))
        stored = tensors[indices_key(VICTIM)], tensors[values_key(VICTIM)]
        config["tensors"][VICTIM]["digest"] = digest(*stored)
        edit_config(patch, **config)


def set_entry(key, position, value):
    def edit(tensors):
        tensors[key][position] = value

    return edit


def swap(tensors):
    indices = tensors[indices_key(VICTIM)]
    indices[[3, 4]] = indices[[4, 3]]


def repeat(tensors):
    indices = tensors[indices_key(VICTIM)]
    indices[4] = indices[3]


def shorten(kind):
    def edit(tensors):
        tensors[kind(VICTIM)] = tensors[kind(VICTIM)][:-1]

    return edit


CORRUPTIONS = {
    "a negative index": set_entry(indices_key(VICTIM), 0, -1),
    "an index past the end": set_entry(indices_key(VICTIM), -1, 48 * 32),
    "a repeated index": repeat,
    "unsorted indices": swap,
    "a NaN": set_entry(values_key(VICTIM), 2, np.nan),
    "an infinity": set_entry(values_key(VICTIM), 2, np.inf),
}
MISSHAPEN = {"too few indices": shorten(indices_key), "too few values": shorten(values_key)}


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corrupt_content_gives_no_output_on_any_route(tiny_llama, patch, load, what):
    edit_tensors(patch, CORRUPTIONS[what])
    with pytest.raises(CorruptAdapterError, match=r"up_proj.*(expected|finite)"):
        logits(load(tiny_llama, patch))


@pytest.mark.parametrize("load", ROUTES)
def test_a_flipped_value_gives_no_output_on_any_route(tiny_llama, patch, load):
    edit_tensors(patch, set_entry(values_key(VICTIM), 1, 0.5), fix_digest=False)
    with pytest.raises(CorruptAdapterError, match="expected digest sha256:"):
        logits(load(tiny_llama, patch))


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize("what", MISSHAPEN)
def test_wrong_sizes_give_no_output_on_any_route(tiny_llama, patch, load, what):
    edit_tensors(patch, MISSHAPEN[what])
    with pytest.raises((CorruptAdapterError, RuntimeError)):  # transformers compares sizes itself
        logits(load(tiny_llama, patch))


def test_wrong_sizes_that_transformers_is_told_to_ignore_are_not_loaded(tiny_llama, patch):
    edit_tensors(patch, shorten(indices_key))
    model = load_base(tiny_llama)
    with pytest.raises(CorruptAdapterError, match=r"up_proj.*expected int32"):
        model.load_adapter(patch, ignore_mismatched_sizes=True)
    assert torch.equal(logits(model), logits(load_base(tiny_llama)))


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize("key", [indices_key(VICTIM), values_key(VICTIM)])
def test_a_missing_tensor_gives_no_output_on_any_route(tiny_llama, patch, load, key):
    path = patch / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CorruptAdapterError, match="up_proj"):
        logits(load(tiny_llama, patch))


def test_a_tensor_that_no_record_names_is_refused(tiny_llama, patch):
    def smuggle(tensors):
        tensors["base_model.model.model.norm.weight"] = np.zeros(32, np.float32)

    edit_tensors(patch, smuggle)
    with pytest.raises(CorruptAdapterError, match=r"norm.weight.*: expected only tensors"):
        load_by_peft(tiny_llama, patch)


@pytest.mark.parametrize("load", ROUTES)
def test_a_wrong_base_gives_no_output_on_any_route(patch, load, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError, match="expected the base that the adapter was made for"):
        logits(load(other, patch))


@pytest.mark.parametrize("load", ROUTES)
def test_a_base_that_differs_in_one_entry_gives_no_output(tiny_llama, patch, load, tmp_path):
    at = int(read_adapter(patch).deltas[VICTIM].indices[5])
    model = load_base(tiny_llama)
    with torch.no_grad():
        model.get_parameter(VICTIM).view(-1)[at] += 1e-3
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=VICTIM):
        logits(load(tmp_path / "other", patch))


@pytest.mark.parametrize("load", ROUTES)
def test_a_merged_base_is_called_merged_on_every_route(tiny_llama, patch, load, tmp_path):
    merge(tiny_llama, patch, tmp_path / "merged")
    with pytest.raises(AlreadyMergedError, match="found the adapter's merged ones"):
        logits(load(tmp_path / "merged", patch))


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format_version": 2}, UnsupportedVersionError, "format_version: expected 1, found 2"),
        ({"scale": "1"}, CorruptAdapterError, "scale"),
        ({"values_dtype": "float64"}, CorruptAdapterError, "values_dtype"),
        ({"tensors": {}}, CorruptAdapterError, "tensors: expected at least one"),
        ({"tensors": []}, CorruptAdapterError, "tensors"),
        ({"target_modules": ["up_proj"]}, UnsupportedFeatureError, "target_modules"),
    ],
)
def test_a_config_that_breaks_the_format_is_refused_on_every_route(
    tiny_llama, patch, load, changes, error, message
):
    edit_config(patch, **changes)
    with pytest.raises(error, match=message):
        load(tiny_llama, patch)


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize(
    ("old", "new"), [("layers.1.", "layers.7."), ("up_proj.weight", "up_proj.bias")]
)
def test_a_parameter_that_the_model_lacks_is_named(tiny_llama, patch, load, old, new):
    missing = VICTIM.replace(old, new)
    rename(VICTIM, missing)(patch)
    with pytest.raises(BaseMismatchError, match=f"{missing}: expected .* found no such parameter"):
        load(tiny_llama, patch)


@pytest.mark.parametrize("load", ROUTES)
def test_a_parameter_of_another_shape_is_named(tiny_llama, patch, load):
    config = json.loads((patch / "adapter_config.json").read_text(encoding="utf-8"))
    record = config["tensors"][VICTIM]
    record["shape"] = record["blocks"][0]["shape"] = record["shape"][::-1]
    record["blocks"][0]["strides"] = [record["shape"][1], 1]
    edit_config(patch, **config)
    with pytest.raises(
        BaseMismatchError, match=r"up_proj.weight: expected shape \[32, 48\], found"
    ):
        load(tiny_llama, patch)


@pytest.mark.parametrize("load", ROUTES)
def test_a_safety_map_is_not_an_adapter(tiny_llama, patch, load, tmp_path):
    adapter = read_adapter(patch)
    config = adapter.metadata.to_config()
    for record in config["tensors"].values():
        record["merged_digest"] = None
    metadata = type(adapter.metadata).from_config(
        config | {"mode": Mode.SPA.value, "values_dtype": "float32"}, "test"
    )
    indices = {name: delta.indices for name, delta in adapter.deltas.items()}
    scores = {name: np.ones(flat.size, np.float32) for name, flat in indices.items()}
    write_map(tmp_path / "map", SafetyMap(metadata, indices, scores))
    with pytest.raises(UnsupportedFeatureError, match="a safety map has no values to load"):
        load(tiny_llama, tmp_path / "map")


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
def test_several_adapters_live_side_by_side(tiny_llama, good, tmp_path):
    second = save_patch(tiny_llama, tmp_path / "second", seed=1)
    first_logits = logits(twin(tiny_llama, good))
    second_logits = logits(twin(tiny_llama, second))
    by_peft = load_by_peft(tiny_llama, good)
    by_peft.load_adapter(second, "second")
    by_transformers = load_by_transformers(tiny_llama, good)
    by_transformers.load_adapter(second, "second")
    for model in (by_peft, by_transformers):
        for name, expected in [("second", second_logits), ("default", first_logits)]:
            model.set_adapter(name)
            assert torch.equal(logits(model), expected)
    assert by_peft.get_model_status().peft_types == {
        "default": "SAFEWEIGHTS",
        "second": "SAFEWEIGHTS",
    }


def test_the_methods_that_transformers_adds_work(tiny_llama, good, tmp_path):
    model = load_by_transformers(tiny_llama, good)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(load_base(tiny_llama)))
    model.enable_adapters()
    assert torch.equal(logits(model), logits(twin(tiny_llama, good)))
    assert model.active_adapters() == ["default"]
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_by_peft(tiny_llama, tmp_path / "again")), logits(model))
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(load_base(tiny_llama)))


def test_peft_counts_a_layer_for_each_parameter(tiny_llama):
    names = ["lm_head.weight", "model.norm.weight"]
    model = patch_model(load_base(tiny_llama), tiny_llama, names=names)
    assert model.get_model_status().num_adapter_layers == 2
    for status in model.get_layer_status():
        assert (status.available_adapters, status.active_adapters) == (["default"], ["default"])
        assert status.devices == {"default": ["cpu"]}
    model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


def test_peft_tells_the_bases_tensors_from_the_adapters(tiny_llama, good):
    state = get_base_model_state_dict(load_by_peft(tiny_llama, good))
    expected = load_base(tiny_llama).state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_bad_second_adapter_leaves_the_first_in_use(tiny_llama, good, patch):
    edit_tensors(patch, CORRUPTIONS["a NaN"])
    model = load_by_peft(tiny_llama, good)
    expected = logits(model)
    with pytest.raises(CorruptAdapterError, match="finite"):
        model.load_adapter(patch, "bad")
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]


def test_other_indices_are_not_loaded_into_an_adapter_in_use(tiny_llama, good, tmp_path):
    other = save_patch(tiny_llama, tmp_path / "other", seed=1)
    model = load_by_peft(tiny_llama, good)
    with pytest.raises(CorruptAdapterError, match="load this adapter under another name"):
        model.load_adapter(other, "default")


def test_the_checks_hold_when_embeddings_come_from_elsewhere(tiny_tied_llama, tmp_path):
    patch = save_patch(tiny_tied_llama, tmp_path / "patch", names=["model.embed_tokens.weight"])
    other = save_tiny_llama(tmp_path / "other", tied=True, seed=1, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(other)
    model.load_adapter(patch)
    with pytest.raises(BaseMismatchError, match="embed_tokens"):
        model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.bfloat16))
