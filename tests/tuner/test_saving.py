"""What PEFT's own save_pretrained writes is a valid patch, and says what was trained."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from safeweights_peft import (
    BaseMismatchError,
    CorruptAdapterError,
    ModelError,
    UnsupportedFeatureError,
    create_adapter,
    merge,
    read_adapter,
    round_values,
    validate,
    verify,
)
from safeweights_peft.delta import add_rounded, digest
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.metadata import AdapterMetadata, record_from_json
from safeweights_peft.patch.records import Mode
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

MODELS = ["tiny_llama", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
UP = "model.layers.0.mlp.up_proj.weight"


def train_a_step(model):
    model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    with torch.no_grad():
        for values in values_of(model).values():
            values -= 0.1 * values.grad


@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_trained_patch_is_saved_complete_and_true(name, values_dtype, request, tmp_path):
    base = request.getfixturevalue(name)
    model = patch_model(load_base(base), base, values_dtype=values_dtype, scale=0.5)
    train_a_step(model)
    round_values(model)
    model.save_pretrained(tmp_path / "patch")
    adapter = read_adapter(tmp_path / "patch")
    live = values_of(model)
    plain = load_base(base)
    assert adapter.deltas.keys() == live.keys()
    for parameter, delta in adapter.deltas.items():
        record = adapter.metadata.tensors[parameter]
        stored = torch.from_numpy(delta.values.astype(np.float32))
        assert torch.equal(stored, live[parameter])
        entries = delta.gather(numpy_weight(plain, parameter))
        assert record.count == delta.count
        assert record.base_digest == digest(entries)
        assert record.merged_digest == digest(add_rounded(entries, delta.values, 0.5))
    assert verify(tmp_path / "patch", base).ok
    merge(base, tmp_path / "patch", tmp_path / "merged")
    assert torch.equal(logits(model), logits(load_base(tmp_path / "merged")))


def numpy_weight(model, parameter):
    return to_numpy(model.get_parameter(parameter))


def test_digests_follow_training(tiny_llama, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model.save_pretrained(tmp_path / "before")
    train_a_step(model)
    model.save_pretrained(tmp_path / "after")
    before, after = validate(tmp_path / "before"), validate(tmp_path / "after")
    for name in before.tensors:
        assert before.tensors[name].digest != after.tensors[name].digest
        assert before.tensors[name].base_digest == after.tensors[name].base_digest
    assert torch.equal(logits(load_by_peft(tiny_llama, tmp_path / "after")), logits(model))


@pytest.mark.parametrize("state", ["after a forward", "disabled", "merged"])
def test_saving_at_any_time_gives_the_same_file(tiny_tied_llama, state, tmp_path):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    model.save_pretrained(tmp_path / "first")
    logits(model)
    if state == "merged":
        model.merge_adapter()
    if state == "disabled":
        with model.disable_adapter():
            model.save_pretrained(tmp_path / "second")
    else:
        model.save_pretrained(tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_values_are_rounded_in_the_file_and_on_request_in_the_model(tiny_llama, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama, values_dtype="bfloat16")
    train_a_step(model)
    model.save_pretrained(tmp_path / "patch")
    loaded = load_by_peft(tiny_llama, tmp_path / "patch")
    assert not torch.equal(values_of(loaded)[UP], values_of(model)[UP])
    round_values(model)
    assert torch.equal(values_of(loaded)[UP], values_of(model)[UP])
    assert torch.equal(logits(loaded), logits(model))


def test_several_adapters_are_saved_in_folders_of_their_own(tiny_llama, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model = patch_model(model, tiny_llama, "second", seed=1, names=[UP])
    model.save_pretrained(tmp_path)
    assert len(read_adapter(tmp_path).deltas) == 21
    assert list(read_adapter(tmp_path / "second").deltas) == [UP]
    loaded = load_by_peft(tiny_llama, tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


def test_the_state_dict_of_an_adapter_holds_only_its_tensors(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama, names=[UP])
    state = get_peft_model_state_dict(model)
    prefix = "base_model.model.model.layers.0.mlp.up_proj.safeweights"
    assert sorted(state) == [f"{prefix}_indices__weight", f"{prefix}_values__weight"]


def test_a_patch_that_was_loaded_by_transformers_is_checked_before_it_is_saved(
    tiny_llama, tmp_path
):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    model = load_base(tiny_llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.load_adapter(patch)
    with pytest.raises(BaseMismatchError, match="up_proj"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("value", "values_dtype"), [(float("nan"), "float32"), (1e6, "float16"), (3e38, "bfloat16")]
)
def test_values_that_are_not_finite_are_not_saved(tiny_llama, value, values_dtype, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama, values_dtype=values_dtype)
    with torch.no_grad():
        values_of(model)[UP][3] = value
        if value == 3e38:
            values_of(model)[UP][3] = torch.finfo(torch.float32).max
    with pytest.raises(CorruptAdapterError, match="finite"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_weights_of_the_base_are_not_saved_into_a_patch(tiny_llama, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with pytest.raises(UnsupportedFeatureError, match="save_embedding_layers=False"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)


def test_a_converted_initial_model_is_not_saved(tiny_llama, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with pytest.raises(UnsupportedFeatureError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(
            tmp_path / "patch", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )


def new_metadata(base, names):
    records = describe(load_base(base), names, base)
    return AdapterMetadata(mode=Mode.SPA, base_model_name_or_path="some/base", tensors=records)


@pytest.mark.filterwarnings("ignore:Could not find a config file in some/base:UserWarning")
def test_a_new_adapter_is_trainable_active_and_changes_nothing(tiny_llama, tmp_path):
    model = load_base(tiny_llama)
    indices, _ = random_content(model)
    peft_model = create_adapter(model, new_metadata(tiny_llama, indices), indices)
    assert isinstance(peft_model, PeftModel)
    assert torch.equal(logits(peft_model), logits(load_base(tiny_llama)))
    assert peft_model.active_adapters == ["default"]
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert trainable == sum(flat.size for flat in indices.values())
    peft_model.save_pretrained(tmp_path)
    saved = validate(tmp_path)
    assert (saved.mode, saved.base_model_name_or_path) == (Mode.SET, "some/base")


def test_a_new_adapter_needs_a_record_of_each_parameter(tiny_llama):
    model = load_base(tiny_llama)
    indices, _ = random_content(model)
    metadata = new_metadata(tiny_llama, [UP])
    with pytest.raises(ModelError, match="expected a record in metadata, found none"):
        create_adapter(model, metadata, indices)


def test_a_recorded_base_digest_must_hold_for_a_new_adapter(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    adapter = read_adapter(patch)
    indices = {name: delta.indices for name, delta in adapter.deltas.items()}
    values = {name: delta.values for name, delta in adapter.deltas.items()}
    model = create_adapter(load_base(tiny_llama), adapter.metadata, indices, values=values)
    assert torch.equal(logits(model), logits(twin(tiny_llama, patch)))
    wrong = load_base(tiny_llama)
    with torch.no_grad():
        wrong.lm_head.weight.zero_()
    with pytest.raises(BaseMismatchError, match="lm_head"):
        create_adapter(wrong, adapter.metadata, indices)


@pytest.mark.parametrize("bad", [[-1, 2], [2, 1], [3, 3], [0, 48 * 32]])
def test_a_new_adapter_refuses_bad_indices(tiny_llama, bad):
    with pytest.raises(CorruptAdapterError, match="indices"):
        create_adapter(load_base(tiny_llama), new_metadata(tiny_llama, [UP]), {UP: np.array(bad)})


def test_a_config_written_by_peft_is_plain_and_complete(tiny_llama, tmp_path):
    save_patch(tiny_llama, tmp_path, names=[UP])
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "SAFEWEIGHTS"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] is None
    assert config["format_version"] == 1
    assert record_from_json(config["tensors"][UP], UP).count == round(48 * 32 * 0.05)
