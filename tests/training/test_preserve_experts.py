"""SPA under a LoRA on parameters, as on fused experts: their frozen entries are the base's bits.

The oracle is the plain model, run on W + s·BA that is zero at the frozen entries of BA.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.optim import AdamW

from safeweights_peft import SafetyMap, SafetyPreservingCallback, preserve
from safeweights_peft.errors import UnsupportedFeatureError
from safeweights_peft.training.lora import plain_name
from safeweights_peft.training.preserve import compute_correction
from tests.training.maps import BATCHES, UP, entries, hooks, load, make_map, same
from tests.training.test_preserve_trainer import make_trainer
from tests.zoo.architectures import load_checkpoint_model, save_checkpoint

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(
    scope="module",
    params=[
        "mixtral",
        "deepseek_v2",  # beside dense layers, of whose names PEFT thinks its own
        "gpt_oss",  # (experts, inputs, outputs), and biases of two dimensions
        "jetmoe",  # a module that its parent indexes
        "llama4_text",  # called with a batch for each expert
    ],
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(request.param, path)
    return path


def adapted(base: Path, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(3)
    model = load_checkpoint_model(base, dtype=dtype)
    names = [name for name, each in model.named_parameters() if "expert" in name or each.dim() == 3]
    names = [name for name in names if model.get_parameter(name).dim() > 1 and "shared" not in name]
    return peft.get_peft_model(model, lora(names, **options))


def lora(names: list[str], **options: Any) -> peft.LoraConfig:
    defaults = {"r": 2, "target_modules": [], "init_lora_weights": False}
    return peft.LoraConfig(target_parameters=names, **defaults | options)


def wrappers(model: PeftModel) -> dict[str, ParamWrapper]:
    return {
        plain_name(f"{name}.{module.parameter_name}"): module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper)
    }


def effective(model: PeftModel, plain: nn.Module, safety_map: SafetyMap) -> dict[str, Tensor]:
    """Make W + s·(M⊙BA) of each wrapped parameter, with all active adapters."""
    result = {}
    for name, layer in wrappers(model).items():
        weight = plain.get_parameter(name).detach()
        for adapter in layer.active_adapters:
            mask = torch.ones_like(weight)
            mask.view(-1)[torch.from_numpy(safety_map.indices[name]).long()] = 0
            weight = weight + layer.get_delta_weight(adapter) * mask
        result[name] = weight
    return result


def run(model: nn.Module, weights: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Run a model, on other weights if any are given; return loss and logits."""
    inputs = {"input_ids": BATCHES[0], "labels": BATCHES[0]}
    output = torch.func.functional_call(model, weights or {}, (), inputs)
    return output.loss, output.logits.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: each.grad.clone() for name, each in named if each.grad is not None}


def check_like_effective(model: PeftModel, base: Path, safety_map: SafetyMap) -> None:
    """Check logits and gradients against the plain model on effective weights."""
    plain = load_checkpoint_model(base, dtype=torch.float32)
    unprotected = run(model)[1]
    with preserve(model, safety_map):
        loss, actual = run(model)
        loss.backward()
    found = gradients(model)
    model.zero_grad()
    loss, expected = run(plain, effective(model, plain, safety_map))
    loss.backward()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (unprotected - expected).abs().max() > 0.01
    assert found.keys() == gradients(model).keys() != set()
    for name, gradient in gradients(model).items():
        assert gradient.abs().max() > 0
        atol = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol)


@contextmanager
def seen(model: PeftModel, safety_map: SafetyMap) -> Iterator[list[dict[str, Tensor]]]:
    """Note the frozen entries that each forward pass of the experts runs on."""
    passes: list[dict[str, Tensor]] = []
    layers = wrappers(model)

    def note(module: nn.Module, _: Any) -> None:
        passes.append(
            {
                name: getattr(module, layer.parameter_name)
                .detach()
                .flatten()[torch.from_numpy(safety_map.indices[name]).long()]
                for name, layer in layers.items()
                if layer.get_base_layer() is module
            }
        )

    modules = {layer.get_base_layer() for layer in layers.values()}
    handles = [module.register_forward_pre_hook(note) for module in modules]
    yield passes
    for handle in handles:
        handle.remove()


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)
    for rows in BATCHES[:steps]:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_logits_and_gradients_are_those_of_effective_weights(base: Path) -> None:
    model = adapted(base)
    check_like_effective(model, base, make_map(base, list(wrappers(model))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_pass_of_a_training_runs_on_the_bases_bits(dtype: torch.dtype, base: Path) -> None:
    model = adapted(base, dtype)
    safety_map, before = make_map(base, list(wrappers(model))), hooks(model)
    expected = entries(load_checkpoint_model(base, dtype=dtype), safety_map)
    with preserve(model, safety_map), seen(model, safety_map) as passes:
        train(model)
    assert len(passes) >= 3
    for found in passes:
        assert same(found, {name: expected[name] for name in found})
    assert {name for found in passes for name in found} == expected.keys()
    assert hooks(model) == before
    assert same(entries(model.unload(), safety_map), expected)


def test_merged_and_corrected_entries_are_the_bases(base: Path) -> None:
    model = adapted(base)
    safety_map = make_map(base, list(wrappers(model)))
    correction = compute_correction(model, safety_map)
    assert correction.keys() == safety_map.indices.keys()
    before = entries(load_checkpoint_model(base, dtype=torch.float32), safety_map)
    merged = entries(model.merge_and_unload(), safety_map)
    for name, values in correction.items():
        assert (merged[name] - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(merged[name] + values, before[name], rtol=0, atol=1e-6)


def test_two_adapters_at_once_are_corrected_together(tiny_mixtral: Path) -> None:
    model = adapted(tiny_mixtral)
    model.add_adapter("second", lora(list(wrappers(model)), r=3))
    model.base_model.set_adapter(["default", "second"])
    check_like_effective(model, tiny_mixtral, make_map(tiny_mixtral, list(wrappers(model))))


def test_experts_that_train_beside_their_lora_keep_the_maps_entries(tiny_mixtral: Path) -> None:
    model = adapted(tiny_mixtral)
    safety_map = make_map(tiny_mixtral, list(wrappers(model)))
    model.requires_grad_(True)
    with preserve(model, safety_map), seen(model, safety_map) as passes:
        train(model)
    before = load(tiny_mixtral, dtype=torch.float32)
    expected = entries(before, safety_map)
    assert same(passes[-1], {name: expected[name] for name in passes[-1]})
    plain = model.unload()
    assert same(entries(plain, safety_map), expected)
    assert not any(torch.equal(plain.get_parameter(n), before.get_parameter(n)) for n in expected)


@pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tiny_mixtral: Path) -> None:
    model = adapted(tiny_mixtral).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check_like_effective(model, tiny_mixtral, make_map(tiny_mixtral, list(wrappers(model))))


def test_with_the_adapter_disabled_the_output_is_bitwise_the_bases(tiny_mixtral: Path) -> None:
    model = adapted(tiny_mixtral)
    with (
        preserve(model, make_map(tiny_mixtral, list(wrappers(model)))),
        model.disable_adapter(),
    ):
        assert torch.equal(run(model)[1], run(load(tiny_mixtral, dtype=torch.float32))[1])


def test_a_callback_keeps_experts_under_lora(tiny_mixtral: Path, tmp_path: Path) -> None:
    model = adapted(tiny_mixtral)
    safety_map, before = make_map(tiny_mixtral, list(wrappers(model))), hooks(model)
    expected = entries(load(tiny_mixtral, dtype=torch.float32), safety_map)
    with seen(model, safety_map) as passes:
        make_trainer(model, SafetyPreservingCallback(safety_map), tmp_path).train()
    assert passes
    assert all(same(found, {name: expected[name] for name in found}) for found in passes)
    assert hooks(model) == before


def test_a_linear_layers_weight_that_is_a_target_parameter_is_corrected_alike(
    tiny_llama: Path,
) -> None:
    model = peft.get_peft_model(load(tiny_llama), lora(["mlp.up_proj.weight"]))
    safety_map = make_map(tiny_llama, list(wrappers(model)))
    assert UP in safety_map.indices
    check_like_effective(model, tiny_llama, safety_map)


def test_a_map_of_experts_that_no_lora_touches_needs_no_correction(tiny_mixtral: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    safety_map = make_map(tiny_mixtral, [name])
    model = peft.get_peft_model(
        load(tiny_mixtral), lora(["layers.1.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj"])
    )
    assert len(wrappers(model)) == 2
    before = hooks(model)
    with preserve(model, safety_map):
        assert hooks(model) == before + 2  # of the guard and of the watch, none of a correction
    assert compute_correction(model, safety_map) == {}


def test_a_second_map_over_the_same_parameter_is_refused(tiny_mixtral: Path) -> None:
    model = adapted(tiny_mixtral)
    up, down = (f"model.layers.0.mlp.{own}" for own in EXPERTS)
    with preserve(model, make_map(tiny_mixtral, [up])):
        with preserve(model, make_map(tiny_mixtral, [down])):
            pass
        message = r"^model\.layers\.0\.mlp\.experts.*: expected a LoRA layer that no other map"
        with (
            pytest.raises(UnsupportedFeatureError, match=message),
            preserve(model, make_map(tiny_mixtral, [up], seed=1)),
        ):
            pass
