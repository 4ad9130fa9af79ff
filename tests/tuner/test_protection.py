"""A safety map loaded by PEFT to train under: its entries keep their bits, and nothing is added."""

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch.optim.optimizer import _global_optimizer_post_hooks

from safeweights_peft import (
    BaseMismatchError,
    CorruptAdapterError,
    ModelError,
    SafetyMap,
    UnsupportedFeatureError,
    write_map,
)
from tests.tiny_models import save_tiny_llama
from tests.training.maps import BATCHES, hooks, kept, load, make_map, moved, same, train
from tests.tuner.patches import save_patch


@pytest.fixture(autouse=True)
def no_hooks_of_earlier_models() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def safety_map(tiny_llama: Path) -> SafetyMap:
    return make_map(tiny_llama)


@pytest.fixture
def map_dir(safety_map: SafetyMap, tmp_path: Path) -> Path:
    write_map(tmp_path / "map", safety_map)
    return tmp_path / "map"


def protected(base: Path, map_dir: Path) -> PeftModel:
    return PeftModel.from_pretrained(load(base), str(map_dir), is_trainable=True)


def test_a_maps_entries_keep_their_bits_while_the_rest_trains(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path
) -> None:
    model = protected(tiny_llama, map_dir)
    train(model)
    assert kept(model.get_base_model(), tiny_llama, safety_map)
    assert moved(model.get_base_model(), tiny_llama)


def test_the_base_itself_is_protected_too_so_a_trainer_may_have_it(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path
) -> None:
    base = load(tiny_llama)
    PeftModel.from_pretrained(base, str(map_dir), is_trainable=True)
    train(base)
    assert kept(base, tiny_llama, safety_map)


def test_the_model_computes_what_the_base_does(tiny_llama: Path, map_dir: Path) -> None:
    model = protected(tiny_llama, map_dir)
    logits = model(input_ids=BATCHES[0]).logits
    assert torch.equal(logits, load(tiny_llama)(input_ids=BATCHES[0]).logits)


def test_peft_finds_the_base_by_itself(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path
) -> None:
    model = AutoPeftModelForCausalLM.from_pretrained(str(map_dir), is_trainable=True)
    train(model)
    assert kept(model.get_base_model(), tiny_llama, safety_map)


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_unloading_gives_the_trained_base_and_ends_the_protection(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path, end: str
) -> None:
    model = protected(tiny_llama, map_dir)
    train(model)
    base = getattr(model, end)()
    assert kept(base, tiny_llama, safety_map)
    assert hooks(base) == 0
    train(base)
    assert not kept(base, tiny_llama, safety_map)


def test_several_maps_protect_together_and_are_deleted_one_by_one(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path, tmp_path: Path
) -> None:
    other = make_map(tiny_llama, seed=1)
    write_map(tmp_path / "other", other)
    model = protected(tiny_llama, map_dir)
    model.load_adapter(str(tmp_path / "other"), "other", is_trainable=True)
    base = model.get_base_model()
    train(model)
    assert kept(base, tiny_llama, safety_map)
    assert kept(base, tiny_llama, other)
    model.delete_adapter("other")
    train(model)
    assert kept(base, tiny_llama, safety_map)
    assert not kept(base, tiny_llama, other)


def test_what_was_trained_is_saved_from_the_base(
    tiny_llama: Path, map_dir: Path, tmp_path: Path
) -> None:
    model = protected(tiny_llama, map_dir)
    train(model)
    model.get_base_model().save_pretrained(tmp_path / "trained")
    trained = dict(model.get_base_model().named_parameters())
    assert same(dict(load(tmp_path / "trained").named_parameters()), trained)


def test_saving_the_map_in_place_of_the_trained_model_is_refused(
    tiny_llama: Path, map_dir: Path, tmp_path: Path
) -> None:
    model = protected(tiny_llama, map_dir)
    with pytest.raises(UnsupportedFeatureError, match="what was trained is the base: save it with"):
        model.save_pretrained(str(tmp_path / "saved"))


def test_a_map_for_inference_is_refused(tiny_llama: Path, map_dir: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="give is_trainable=True"):
        PeftModel.from_pretrained(load(tiny_llama), str(map_dir))


def test_transformers_own_way_of_loading_never_runs_unprotected(
    tiny_llama: Path, map_dir: Path
) -> None:
    base = load(tiny_llama)
    base.load_adapter(str(map_dir), is_trainable=True)
    with pytest.raises(ModelError, match="expected a loaded safety map, found its config alone"):
        base(input_ids=BATCHES[0])


def test_a_config_without_its_map_never_runs_unprotected(tiny_llama: Path, map_dir: Path) -> None:
    config = PeftConfig.from_pretrained(str(map_dir))
    config.inference_mode = False
    model = get_peft_model(load(tiny_llama), config)
    with pytest.raises(ModelError, match="expected a loaded safety map, found its config alone"):
        model(input_ids=BATCHES[0])


def test_a_patch_beside_a_map_is_refused_and_the_map_goes_on(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path, tmp_path: Path
) -> None:
    patch = save_patch(tiny_llama, tmp_path / "patch")
    model = protected(tiny_llama, map_dir)
    with pytest.raises(UnsupportedFeatureError, match="merge the patch first"):
        model.load_adapter(str(patch), "patch")
    assert list(model.peft_config) == ["default"]
    train(model)
    assert kept(model.get_base_model(), tiny_llama, safety_map)


def test_a_map_beside_a_patch_is_refused(tiny_llama: Path, map_dir: Path, tmp_path: Path) -> None:
    patch = save_patch(tiny_llama, tmp_path / "patch")
    model = PeftModel.from_pretrained(load(tiny_llama), str(patch))
    with pytest.raises(UnsupportedFeatureError, match="merge the patch first"):
        model.load_adapter(str(map_dir), "map", is_trainable=True)
    assert list(model.peft_config) == ["default"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("by_peft", [True, False])
def test_lora_that_is_added_later_never_trains_unprotected(
    tiny_llama: Path, map_dir: Path, by_peft: bool
) -> None:
    base = protected(tiny_llama, map_dir).get_base_model()
    config = LoraConfig(target_modules=["up_proj"])
    model = get_peft_model(base, config) if by_peft else base
    if not by_peft:
        base.add_adapter(config)
    with pytest.raises(UnsupportedFeatureError, match="without adapters of other methods"):
        model(input_ids=BATCHES[0])
    with torch.no_grad():
        assert model(input_ids=BATCHES[0]).logits.isfinite().all()


def test_a_copy_never_trains_unprotected(tiny_llama: Path, map_dir: Path) -> None:
    twin = copy.deepcopy(protected(tiny_llama, map_dir))
    with pytest.raises(UnsupportedFeatureError, match="load the safety map into that model"):
        twin(input_ids=BATCHES[0])
    with torch.no_grad():
        assert twin(input_ids=BATCHES[0]).logits.isfinite().all()


def test_a_part_of_the_base_stays_protected_when_the_rest_is_gone(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path
) -> None:
    backbone = protected(tiny_llama, map_dir).get_base_model().model
    gc.collect()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.01, weight_decay=0.1)
    for rows in BATCHES[:3]:
        backbone(input_ids=rows).last_hidden_state.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = load(tiny_llama).model
    for name, indices in safety_map.indices.items():
        if name.startswith("model."):
            own = name.removeprefix("model.")
            now, then = (
                module.get_parameter(own).detach().flatten() for module in (backbone, before)
            )
            assert torch.equal(now[indices], then[indices]), name
            assert not torch.equal(now, then), name


def test_what_is_saved_holds_the_entries_whoever_moved_them(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path, tmp_path: Path
) -> None:
    base = protected(tiny_llama, map_dir).get_base_model()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 1  # as an optimizer of copies does
    base.save_pretrained(tmp_path / "trained")
    assert kept(load(tmp_path / "trained"), tiny_llama, safety_map)


def test_a_part_of_a_model_never_runs_under_a_config_alone(tiny_llama: Path, map_dir: Path) -> None:
    config = PeftConfig.from_pretrained(str(map_dir))
    config.inference_mode = False
    model = get_peft_model(load(tiny_llama), config)
    with pytest.raises(ModelError, match="found its config alone"):
        model.get_base_model().model(input_ids=BATCHES[0])


def test_a_dropped_model_takes_its_protection_along(tiny_llama: Path, map_dir: Path) -> None:
    before = len(_global_optimizer_post_hooks)
    model = protected(tiny_llama, map_dir)
    parameter = weakref.ref(next(model.parameters()))
    assert len(_global_optimizer_post_hooks) == before + 1
    del model
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before
    assert parameter() is None


def test_the_protection_outlives_what_peft_put_around_the_base(
    tiny_llama: Path, safety_map: SafetyMap, map_dir: Path
) -> None:
    base = protected(tiny_llama, map_dir).get_base_model()
    gc.collect()
    train(base)
    assert kept(base, tiny_llama, safety_map)


def test_where_training_goes_and_how_to_save_it_is_told(
    tiny_llama: Path, map_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    protected(tiny_llama, map_dir)
    assert "give a Trainer model.get_base_model()" in caplog.text


def test_another_base_is_refused_and_left_without_hooks(map_dir: Path, tmp_path: Path) -> None:
    other = load(save_tiny_llama(tmp_path / "other", seed=1))
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(other, str(map_dir), is_trainable=True)
    assert hooks(other) == 0


def test_a_corrupt_map_is_refused_and_leaves_no_hooks(tiny_llama: Path, map_dir: Path) -> None:
    file = map_dir / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    base = load(tiny_llama)
    with pytest.raises(CorruptAdapterError, match="do not use this adapter"):
        PeftModel.from_pretrained(base, str(map_dir), is_trainable=True)
    assert hooks(base) == 0
