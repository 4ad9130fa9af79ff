"""SPA under LoRA: effective weights keep their frozen entries, and the others train as ever.

The oracle is a dense masked twin: the same model, whose LoRA layers make W + s·(M⊙BA) in full.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from transformers import TrainerCallback

from safeweights_peft import SafetyMap, SafetyPreservingCallback, merge, preserve, read_adapter
from safeweights_peft.training.preserve import compute_correction
from tests.tiny_jobs import Interrupted
from tests.training.maps import (
    BATCHES,
    DOWN,
    UP,
    entries,
    hooks,
    kept,
    load,
    make_map,
    make_sft_trainer,
    same,
)
from tests.training.test_preserve_trainer import make_trainer
from tests.training.twins import adapted, config, effective, layers, logits, twin
from tests.tuner.patches import save_patch
from tests.two_processes import run_in_two_processes

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, lr=0.01, weight_decay=0.1),
}


def lora_gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {
        name: parameter.grad
        for name, parameter in named
        if ".lora_" in name and parameter.grad is not None
    }


def backward(model: nn.Module, rows: Tensor = BATCHES[0]) -> tuple[Tensor, Tensor]:
    """Return the logits and the gradient of the embedded tokens, always with the same dropout."""
    torch.manual_seed(5)
    embedded = model.get_input_embeddings()(rows).detach().requires_grad_()
    output = model(inputs_embeds=embedded, labels=rows)
    output.loss.backward()
    return output.logits.detach(), embedded.grad


def check_like_twin(
    model: nn.Module, other: nn.Module, safety_map: SafetyMap, tolerance: float = 1e-4
) -> None:
    """Check outputs and all gradients against the dense masked twin's."""
    with preserve(model, safety_map):
        actual = backward(model)
    expected = backward(twin(other, safety_map))
    assert lora_gradients(model).keys() == lora_gradients(other).keys() != set()
    pairs = zip(
        [*actual, *lora_gradients(model).values()],
        [*expected, *lora_gradients(other).values()],
        strict=True,
    )
    for left, right in pairs:
        assert right.abs().max() > 0
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance * right.abs().max().item())


def train(model: nn.Module, make: MakeOptimizer = OPTIMIZERS["adamw"], steps: int = 20) -> None:
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    for rows in BATCHES[:steps]:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def base_kept(model: nn.Module, base: Path) -> bool:
    """Return whether the base's weights in LoRA layers have all their bits."""
    actual = {name: layer.base_layer.weight.detach() for name, layer in layers(model).items()}
    return same(actual, {name: load(base).get_parameter(name).detach() for name in actual})


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.3},
        {"r": 2, "lora_alpha": 4, "use_rslora": True},
        {"lora_bias": True, "r": 1},
        {"r": 40},  # more than the layers' own rank
    ],
    ids=lambda names: "-".join(names) or "plain",
)
def test_outputs_and_gradients_are_those_of_dense_masks(
    options: dict[str, Any], tiny_llama: Path
) -> None:
    safety_map = make_map(tiny_llama)
    model, other = adapted(tiny_llama, **options).train(), adapted(tiny_llama, **options).train()
    check_like_twin(model, other, safety_map)


def test_a_bfloat16_base_gives_those_of_dense_masks_up_to_its_own_rounding(
    tiny_llama_bf16: Path,
) -> None:
    model, other = adapted(tiny_llama_bf16), adapted(tiny_llama_bf16)
    assert model.get_parameter(f"base_model.model.{UP[:-7]}.lora_A.default.weight").dtype is (
        torch.float32
    )
    check_like_twin(model, other, make_map(tiny_llama_bf16), tolerance=0.03)


def test_adapters_in_bfloat16_give_those_of_dense_masks_up_to_rounding(
    tiny_llama_bf16: Path,
) -> None:
    models = [adapted(tiny_llama_bf16).to(torch.bfloat16) for _ in range(2)]
    check_like_twin(*models, make_map(tiny_llama_bf16), tolerance=0.06)
    assert {gradient.dtype for gradient in lora_gradients(models[0]).values()} == {torch.bfloat16}


def test_under_autocast_the_frozen_part_is_taken_out_in_float32(tiny_llama: Path) -> None:
    safety_map, model, other = make_map(tiny_llama), adapted(tiny_llama), adapted(tiny_llama)
    with torch.autocast("cpu", torch.bfloat16):
        check_like_twin(model, other, safety_map, tolerance=0.06)


def test_two_adapters_at_once_are_both_corrected(tiny_llama: Path) -> None:
    def make() -> nn.Module:
        model = adapted(tiny_llama)
        model.add_adapter("second", config(r=2, lora_alpha=7, target_modules=["up_proj"]))
        model.base_model.set_adapter(["default", "second"])
        return model

    check_like_twin(make(), make(), make_map(tiny_llama))


def test_an_adapter_that_is_made_active_later_is_corrected_too(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    model.add_adapter("second", config(r=2))
    with preserve(model, safety_map):
        model.set_adapter("second")
        actual = logits(model)
    torch.testing.assert_close(actual, logits(twin(model, safety_map)))


def test_lora_that_transformers_has_put_in_is_corrected(tiny_llama: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        model = load(tiny_llama)
        model.add_adapter(config())
        return model

    check_like_twin(make(), make(), make_map(tiny_llama))


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama, lora_dropout=0.3).train()
    other = adapted(tiny_llama, lora_dropout=0.3).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_like_twin(model, other, safety_map)


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_a_head_tied_to_the_embedding_is_corrected_at_the_embeddings_entries(
    tiny_tied_llama: Path,
) -> None:
    safety_map = make_map(tiny_tied_llama, ["model.embed_tokens.weight"])
    options = {"target_modules": ["lm_head"], "dtype": torch.float32}
    model, other = adapted(tiny_tied_llama, **options), adapted(tiny_tied_llama, **options)
    safety_map.indices["lm_head.weight"] = safety_map.indices["model.embed_tokens.weight"]
    other = twin(other, safety_map)
    del safety_map.indices["lm_head.weight"]
    with preserve(model, safety_map):
        torch.testing.assert_close(logits(model), logits(other))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_leaves_the_effective_weights_at_the_maps_entries(
    make: MakeOptimizer, tiny_llama: Path
) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    before = logits(model)
    with preserve(model, safety_map):
        train(model, make)
        actual = logits(model)
    torch.testing.assert_close(actual, logits(effective(model, tiny_llama, safety_map)))
    assert not torch.allclose(actual, before, atol=0.1)
    assert not torch.allclose(actual, logits(model), atol=0.1)  # it is what the hooks do
    assert base_kept(model, tiny_llama)


def test_with_the_adapter_disabled_the_output_is_bitwise_the_bases(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    with preserve(model, safety_map), model.disable_adapter():
        assert torch.equal(logits(model), logits(load(tiny_llama)))


def test_generation_runs_on_the_preserved_weights(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    with preserve(model, safety_map):
        actual = model.generate(input_ids=BATCHES[0], **options)
    plain = effective(model, tiny_llama, safety_map)
    assert torch.equal(actual, plain.generate(input_ids=BATCHES[0], **options))


def test_two_identical_runs_are_bitwise_equal(tiny_llama: Path) -> None:
    safety_map, models = make_map(tiny_llama), [adapted(tiny_llama) for _ in range(2)]
    for model in models:
        with preserve(model, safety_map):
            train(model, steps=5)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_entries_of_a_merged_patch_are_preserved_like_a_maps(
    tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(save_patch(tiny_llama, tmp_path / "patch"))
    merge(tiny_llama, tmp_path / "patch", tmp_path / "merged")
    model = adapted(tmp_path / "merged")
    with preserve(model, tmp_path / "patch"):
        train(model, steps=5)
        actual = logits(model)
    torch.testing.assert_close(actual, logits(effective(model, tmp_path / "merged", adapter)))


def test_modules_that_are_saved_beside_lora_keep_the_maps_entries(tiny_llama: Path) -> None:
    safety_map, name = make_map(tiny_llama), "lm_head.weight"
    model = adapted(tiny_llama, modules_to_save=["lm_head"])
    copy = model.base_model.model.lm_head.modules_to_save["default"].weight
    before = copy.detach().clone()
    with preserve(model, safety_map):
        train(model)
        frozen = torch.from_numpy(safety_map.indices[name])
        assert torch.equal(copy.flatten()[frozen], before.flatten()[frozen])
        assert (copy != before).float().mean() > 0.5
    assert torch.equal(copy.flatten()[frozen], before.flatten()[frozen])


def test_copies_of_an_adapter_that_is_made_active_later_keep_the_maps_entries(
    tiny_llama: Path,
) -> None:
    safety_map, name = make_map(tiny_llama), "lm_head.weight"
    model = adapted(tiny_llama, modules_to_save=["lm_head"])
    model.add_adapter("second", config(modules_to_save=["lm_head"]))
    copy = model.base_model.model.lm_head.modules_to_save["second"].weight
    before, frozen = copy.detach().clone(), torch.from_numpy(safety_map.indices[name])
    with preserve(model, safety_map):
        model.set_adapter("second")
        train(model, steps=5)
    assert torch.equal(copy.flatten()[frozen], before.flatten()[frozen])
    assert not torch.equal(copy, before)


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_a_copy_of_a_tied_head_keeps_the_embeddings_entries(tiny_tied_llama: Path) -> None:
    safety_map = make_map(tiny_tied_llama, ["model.embed_tokens.weight"])
    model = adapted(tiny_tied_llama, dtype=torch.float32, modules_to_save=["lm_head"])
    copy = model.base_model.model.lm_head.modules_to_save["default"].weight
    frozen = torch.from_numpy(safety_map.indices["model.embed_tokens.weight"])
    before = copy.detach().clone()
    with preserve(model, safety_map):
        train(model, steps=5)
    assert torch.equal(copy.flatten()[frozen], before.flatten()[frozen])
    assert not torch.equal(copy, before)


def test_base_weights_that_train_beside_lora_keep_the_maps_entries(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    model.requires_grad_(True)
    with preserve(model, safety_map):
        train(model, steps=5)
    plain = model.unload()
    assert kept(plain, tiny_llama, safety_map)
    assert not torch.equal(plain.get_parameter(UP), load(tiny_llama).get_parameter(UP))


def in_parallel(model: PeftModel) -> nn.Module:
    return DataParallel(model)


def compiled_in_part(model: PeftModel) -> nn.Module:
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").compile(backend="eager")
    return model


@pytest.mark.parametrize("wrap", [in_parallel, compiled_in_part])
def test_layers_are_corrected_under_a_wrapper_and_only_meanwhile(
    wrap: Callable[[PeftModel], nn.Module], tiny_llama: Path
) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    wrapped = wrap(model)
    unprotected = logits(wrapped)
    with preserve(wrapped, safety_map):
        actual = logits(wrapped)
    torch.testing.assert_close(actual, logits(effective(model, tiny_llama, safety_map)))
    torch.testing.assert_close(logits(wrapped), unprotected)


def test_all_hooks_are_gone_at_the_end(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, modules_to_save=["lm_head"])
    before = hooks(model)
    with preserve(model, make_map(tiny_llama)):
        assert hooks(model) >= before + 2 * len(layers(model))
        train(model, steps=1)
    assert hooks(model) == before


def test_all_hooks_are_gone_after_an_exception(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    before = hooks(model)
    with pytest.raises(Interrupted), preserve(model, make_map(tiny_llama)):
        raise Interrupted
    assert hooks(model) == before


def test_parameters_that_the_adapter_leaves_alone_are_counted_in_a_warning(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(tiny_llama, target_modules=["up_proj"])
    with preserve(model, make_map(tiny_llama, [UP, DOWN])):
        pass
    (record,) = caplog.records
    assert record.message.startswith(f"{DOWN}: expected a parameter that requires gradients")
    assert "1 of the safety map's 2 parameters" in record.message


def test_an_adapter_that_touches_nothing_of_the_map_is_told_in_a_warning(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(tiny_llama, target_modules=["q_proj"])
    with caplog.at_level(logging.WARNING), preserve(model, make_map(tiny_llama, [UP, DOWN])):
        pass
    (record,) = caplog.records
    assert "all of the safety map's 2 parameters are not trained anyway" in record.message


def test_nothing_is_logged_where_lora_is_on_all_that_the_map_holds(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with preserve(adapted(tiny_llama), make_map(tiny_llama, [UP, DOWN])):
        pass
    assert not caplog.records


def test_the_correction_takes_out_what_merging_adds_to_the_maps_entries(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    train(model, steps=3)
    correction = compute_correction(model, safety_map)
    assert correction.keys() == layers(model).keys()
    before = entries(load(tiny_llama), safety_map)
    merged = entries(model.merge_and_unload(), safety_map)
    for name, values in correction.items():
        assert values.dtype is torch.float32
        assert values.abs().max() > 0.1
        torch.testing.assert_close(merged[name] + values, before[name], rtol=0, atol=1e-5)


def test_a_correction_may_be_asked_for_under_protection_and_for_one_adapter_of_many(
    tiny_llama: Path,
) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    model.add_adapter("second", config(target_modules=["up_proj"]))
    with preserve(model, safety_map):
        correction = compute_correction(model, safety_map, adapter="second")
    assert {name.split(".")[-2] for name in correction} == {"up_proj"}
    assert len(correction[UP]) == len(safety_map.indices[UP])


class Probe(TrainerCallback):
    """Note at each step whether the model is the plain one with effective weights."""

    def __init__(self, base: Path, safety_map: SafetyMap) -> None:
        self.base, self.safety_map = base, safety_map
        self.preserved: list[bool] = []

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        expected = logits(effective(model, self.base, self.safety_map))
        self.preserved.append(torch.allclose(logits(model), expected, rtol=1e-4, atol=1e-4))


def test_a_trainer_keeps_the_effective_weights_at_the_maps_entries(
    tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    before, probe = hooks(model), Probe(tiny_llama, safety_map)
    trainer = make_trainer(model, SafetyPreservingCallback(safety_map), tmp_path)
    trainer.add_callback(probe)
    trainer.train()
    assert probe.preserved == [True] * 6
    assert base_kept(model, tiny_llama)
    assert hooks(model) == before


def test_a_resumed_training_ends_bitwise_like_a_straight_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map, options = make_map(tiny_llama), {"lora_dropout": 0.2}
    straight, resumed = adapted(tiny_llama, **options), adapted(tiny_llama, **options)
    make_trainer(straight, SafetyPreservingCallback(safety_map), tmp_path).train()
    trainer = make_trainer(resumed, SafetyPreservingCallback(safety_map), tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(resumed.state_dict(), straight.state_dict())


@pytest.mark.slow
def test_a_trl_trainer_keeps_the_effective_weights_at_the_maps_entries(
    tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map = make_map(tiny_llama)
    probe = Probe(tiny_llama, safety_map)
    callbacks = [SafetyPreservingCallback(safety_map), probe]
    trainer = make_sft_trainer(load(tiny_llama), tmp_path, callbacks, peft_config=config())
    trainer.train()
    assert probe.preserved == [True] * 3
    assert base_kept(trainer.model, tiny_llama)


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def work(rank: int, base: Path, folder: Path, safety_map: SafetyMap) -> None:
    model = adapted(base)
    wrapped = DistributedDataParallel(model)
    optimizer = SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1
    )
    with preserve(wrapped, safety_map):
        for rows in BATCHES[:3]:
            half = rows[rank : rank + 1]
            wrapped(input_ids=half, labels=half).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save(lora_weights(model), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_what_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    run_in_two_processes(work, tmp_path, tiny_llama, tmp_path, safety_map)
    with preserve(model, safety_map):
        train(model, lambda p: SGD(p, lr=0.1), steps=3)
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (0, 1))
    assert same(first, second)
    for name, weight in lora_weights(model).items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-5)
