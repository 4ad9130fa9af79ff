"""Merging is exact in both directions, whole or not at all, and equal to merging the files."""

import copy
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safeweights_peft import (
    AlreadyMergedError,
    CorruptAdapterError,
    MergeError,
    ModelError,
    UnsupportedFeatureError,
    merge,
    validate,
    verify,
)
from tests.tuner.patches import (
    load_base,
    load_by_peft,
    logits,
    patch_model,
    same_weights,
    save_patch,
    twin,
    values_of,
)

MODELS = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]


@pytest.fixture(params=MODELS)
def base(request):
    return request.getfixturevalue(request.param)


def plain_state(model):
    """Clone the base's part of a wrapped model's state, by the base's own names."""
    return {
        key: value.clone()
        for key, value in model.get_base_model().state_dict().items()
        if "safeweights" not in key
    }


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("safe_merge", [True, False])
def test_merge_and_unload_gives_the_bits_of_the_dense_twin_and_of_the_merged_files(
    base, safe_merge, tmp_path
):
    patch = save_patch(base, tmp_path / "patch", values_dtype="bfloat16")
    merged = load_by_peft(base, patch).merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(load_base(base))
    assert same_weights(merged, twin(base, patch))
    merge(base, patch, tmp_path / "merged")
    assert same_weights(merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.equal(logits(merged), logits(load_by_peft(base, patch)))


def test_what_peft_merges_and_transformers_saves_is_verified(base, tmp_path):
    patch = save_patch(base, tmp_path / "patch", values_dtype="bfloat16")
    saved = tmp_path / "saved"
    load_by_peft(base, patch).merge_and_unload().save_pretrained(saved)
    assert "tokenizer.json missing" in verify(patch, base, saved).checks[-1].detail
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, saved)
    report = verify(patch, base, saved)
    assert report.ok, report


def test_unmerging_restores_the_base_bit_by_bit(base):
    model = patch_model(load_base(base), base)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    assert not equal(plain_state(model), load_base(base).state_dict())
    model.unmerge_adapter()
    assert equal(plain_state(model), load_base(base).state_dict())
    assert torch.equal(logits(model), expected)


def test_merged_adapters_are_rounded_once_however_they_were_merged(tiny_llama_bf16, tmp_path):
    first = save_patch(tiny_llama_bf16, tmp_path / "first")
    second = save_patch(tiny_llama_bf16, tmp_path / "second", seed=1)
    dense = twin(tiny_llama_bf16, first, second)
    model = load_by_peft(tiny_llama_bf16, first)
    model.load_adapter(second, "second")
    model.merge_adapter(["default", "second"])
    assert equal(plain_state(model), dense.state_dict())
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    assert equal(plain_state(model), dense.state_dict())
    assert same_weights(model.unload(), dense)


@pytest.mark.parametrize("order", [["first", "second"], ["second", "first"]])
@pytest.mark.parametrize("base_name", ["tiny_llama", "tiny_llama_bf16", "tiny_mixtral"])
def test_several_adapters_act_and_merge_with_the_bits_of_the_merged_files(
    base_name, order, tmp_path, request
):
    base = request.getfixturevalue(base_name)
    patches = {
        "first": save_patch(base, tmp_path / "first", scale=0.3),
        "second": save_patch(base, tmp_path / "second", seed=1, values_dtype="bfloat16"),
    }
    report = merge(base, [patches[name] for name in order], tmp_path / "merged")
    assert report.overlap
    model = PeftModel.from_pretrained(load_base(base), patches[order[0]], order[0])
    model.load_adapter(patches[order[1]], order[1])
    model.base_model.set_adapter(order)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(model), logits(merged))
    assert same_weights(model.merge_and_unload(), merged)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_setting_an_adapter_unmerges_first(tiny_tied_llama, tmp_path):
    second = save_patch(tiny_tied_llama, tmp_path / "second", seed=1)
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    model.load_adapter(second, "second")
    model.merge_adapter()
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(twin(tiny_tied_llama, second)))


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
def test_merging_twice_changes_nothing(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model.merge_adapter()
    once = plain_state(model)
    model.merge_adapter()
    assert equal(plain_state(model), once)
    model.unmerge_adapter()
    model.unmerge_adapter()
    assert equal(plain_state(model), load_base(tiny_llama).state_dict())


def test_disabling_adapters_of_a_merged_model_gives_the_base(tiny_tied_llama):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(tiny_tied_llama)))


def test_a_merged_adapter_is_not_deleted(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("default")


def test_a_merged_model_can_be_copied_moved_and_unmerged(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model.merge_adapter()
    other = copy.deepcopy(model)
    assert equal(plain_state(other), plain_state(model))
    other.to(torch.bfloat16)
    other.unmerge_adapter()
    plain = load_base(tiny_llama).to(torch.bfloat16)
    assert equal(plain_state(other), plain.state_dict())


def overflowing(base):
    """A float16 model whose last layer's merged entries overflow; its values are finite."""
    model = patch_model(load_base(base), base)
    with torch.no_grad():
        values_of(model)["model.layers.1.mlp.down_proj.weight"].fill_(1e6)
    return model.half()


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_checks_everything_before_it_writes_anything(tiny_llama, how):
    model = overflowing(tiny_llama)
    before = plain_state(model)
    with pytest.raises(MergeError, match=r"layers.1.mlp.down_proj.weight: expected finite"):
        getattr(model, how)(safe_merge=True)
    assert equal(plain_state(model), before)
    layer = model.get_base_model().model.layers[1].mlp.down_proj.safeweights_values__weight
    with pytest.raises(MergeError, match="nothing was merged"):
        layer.merge(safe_merge=True)
    assert not layer.merged


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_nothing_is_merged_if_one_layer_fails_its_checks(tiny_llama, how):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    state = model.state_dict()
    last = "base_model.model.lm_head.safeweights_indices__weight.default"
    model.load_state_dict({**state, last: state[last] - 1000})
    before = plain_state(model)
    with pytest.raises(CorruptAdapterError, match="lm_head"):
        getattr(model, how)()
    assert equal(plain_state(model), before)


def test_a_patch_is_not_loaded_onto_its_merged_model(tiny_llama_bf16, tmp_path):
    patch = save_patch(tiny_llama_bf16, tmp_path / "patch")
    merge(tiny_llama_bf16, patch, tmp_path / "merged")
    with pytest.raises(AlreadyMergedError, match="use the model as it is"):
        load_by_peft(tmp_path / "merged", patch)


def test_a_weighted_adapter_is_the_sum_of_the_others(tiny_llama, tmp_path):
    first = save_patch(tiny_llama, tmp_path / "first", scale=0.5)
    second = save_patch(tiny_llama, tmp_path / "second", seed=1)
    model = load_by_peft(tiny_llama, first)
    model.load_adapter(second, "second")
    model.add_weighted_adapter(["default", "second"], [2.0, -0.25], "sum")
    assert model.active_adapters == ["default"]
    model.set_adapter("sum")
    found = logits(model)
    model.set_scale("default", 2.0)
    model.set_scale("second", -0.25)
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(found, logits(model), atol=1e-5)
    model.save_pretrained(tmp_path / "all", selected_adapters=["sum"])
    metadata = validate(tmp_path / "all" / "sum")
    assert metadata.selection["weights"] == [2.0, -0.25]
    reloaded = load_by_peft(tiny_llama, tmp_path / "all" / "sum")
    assert torch.equal(logits(reloaded), found)


def test_an_adapter_minus_itself_is_the_base(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model.add_weighted_adapter(["default", "default"], [1.0, -1.0], "nothing")
    model.set_adapter("nothing")
    assert torch.equal(logits(model), logits(load_base(tiny_llama)))


@pytest.mark.parametrize("kind", ["svd", "cat", "ties", "dare_linear", "magnitude_prune"])
def test_other_combinations_are_refused(tiny_llama, kind):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with pytest.raises(UnsupportedFeatureError, match=f"expected 'linear', found '{kind}'"):
        model.add_weighted_adapter(["default"], [1.0], "new", combination_type=kind)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "message"),
    [
        (["unknown"], [1.0], "new", "found unknown as new"),
        ([], [], "new", "found none as new"),
        (["default"], [1.0], "default", "a new name"),
        (["default"], [1.0, 2.0], "new", "expected 1 finite numbers"),
        (["default"], [float("nan")], "new", "expected 1 finite numbers"),
    ],
)
def test_sums_that_make_no_sense_are_refused(tiny_llama, adapters, weights, name, message):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with pytest.raises(ModelError, match=message):
        model.add_weighted_adapter(adapters, weights, name)
    assert list(model.peft_config) == ["default"]


def test_a_sum_that_overflows_is_refused(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    model.set_scale("default", 1e3)
    with pytest.raises(CorruptAdapterError, match="finite"):
        model.add_weighted_adapter(["default"], [3e38], "new")
    assert list(model.peft_config) == ["default"]
