"""SPA under LoRA: effective weights keep their frozen entries, and the others train as ever.

The oracle is a dense masked twin: the same model, whose LoRA layers make W + s·(M⊙BA) in full.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from safeweights_peft import (
    SafetyMap,
    SafetyPreservingCallback,
    merge,
    preserve,
    read_adapter,
)
from safeweights_peft.training import lora_correction
from safeweights_peft.training.lora import FrozenLayer, FrozenPattern, LoraCorrection
from tests.tiny_jobs import Interrupted
from tests.training.maps import BATCHES, DOWN, UP, entries, hooks, kept, load, make_map, same
from tests.training.test_preserve_trainer import make_trainer
from tests.tuner.patches import save_patch

LINEAR = r".*\.(?:q|k|v|o|up|down|gate)_proj"
Masks = dict[str, Tensor]
MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, lr=0.01, weight_decay=0.1),
}


def config(**options: Any) -> LoraConfig:
    """Adapters that move every linear layer from the start."""
    defaults = {"r": 4, "target_modules": LINEAR, "init_lora_weights": False}
    return LoraConfig(**defaults | options)


def adapted(base: Path, dtype: torch.dtype | str = "auto", **options: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(load(base, dtype=dtype), config(**options))


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Finds the LoRA layers, by the plain model's names of their weights."""
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return {
        f"{name.removeprefix(prefix)}.weight": each
        for name, each in model.named_modules()
        if isinstance(each, LoraLinear)
    }


def masks(model: nn.Module, safety_map: SafetyMap) -> Masks:
    """Makes dense masks of the map's entries in LoRA layers, and empty ones of other layers."""
    dense = {}
    for name, layer in layers(model).items():
        dense[name] = torch.zeros_like(layer.base_layer.weight, dtype=torch.bool)
        indices = safety_map.indices.get(name, np.empty(0, np.int32))
        dense[name].view(-1)[torch.from_numpy(indices)] = True
    return dense


def masked_delta(layer: LoraLinear, adapter: str, mask: Tensor) -> Tensor:
    delta = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    return torch.where(mask, 0, delta) * layer.scaling[adapter]


def twin(model: nn.Module, safety_map: SafetyMap) -> nn.Module:
    """Lets LoRA layers do the same with dense masks, in the slow, obvious way."""
    dense = masks(model, safety_map)
    for name, layer in layers(model).items():

        def forward(x: Tensor, layer: LoraLinear = layer, mask: Tensor = dense[name]) -> Tensor:
            output = layer.base_layer(x)
            for adapter in [each for each in layer.active_adapters if each in layer.lora_A]:
                source = layer.lora_dropout[adapter](x.to(layer.lora_A[adapter].weight.dtype))
                output = output + F.linear(source, masked_delta(layer, adapter, mask))
                if layer.lora_bias[adapter]:
                    output = output + layer.lora_B[adapter].bias * layer.scaling[adapter]
            return output.to(x.dtype)

        layer.forward = forward
    return model


def effective(model: PeftModel, base: Path, safety_map: SafetyMap) -> nn.Module:
    """Makes the plain model of weights W + s·(M⊙BA)."""
    plain, dense = load(base), masks(model, safety_map)
    with torch.no_grad():
        for name, layer in layers(model).items():
            weight = plain.get_parameter(name)
            weight += masked_delta(layer, "default", dense[name]).to(weight.dtype)
    return plain


def logits(model: nn.Module) -> Tensor:
    mode = model.training
    with torch.no_grad():
        result = model.eval()(input_ids=BATCHES[-1]).logits
    model.train(mode)
    return result


def lora_gradients(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: each.grad for name, each in named if ".lora_" in name and each.grad is not None}


def backward(model: nn.Module, rows: Tensor = BATCHES[0]) -> tuple[Tensor, Tensor]:
    """Gives the logits and the gradient of the embedded tokens, always with the same dropout."""
    torch.manual_seed(5)
    embedded = model.get_input_embeddings()(rows).detach().requires_grad_()
    output = model(inputs_embeds=embedded, labels=rows)
    output.loss.backward()
    return output.logits.detach(), embedded.grad


def check_like_twin(
    model: nn.Module, other: nn.Module, safety_map: SafetyMap, tolerance: float = 1e-4
) -> None:
    """Checks outputs and all gradients against the dense masked twin's."""
    with preserve(model, safety_map):
        found = backward(model)
    expected = backward(twin(other, safety_map))
    assert lora_gradients(model).keys() == lora_gradients(other).keys() != set()
    pairs = zip(
        [*found, *lora_gradients(model).values()],
        [*expected, *lora_gradients(other).values()],
        strict=True,
    )
    for left, right in pairs:
        assert right.abs().max() > 0
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance * right.abs().max().item())


def train(model: nn.Module, make: MakeOptimizer = OPTIMIZERS["adamw"], steps: int = 20) -> None:
    optimizer = make([each for each in model.parameters() if each.requires_grad])
    for rows in BATCHES[:steps]:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def base_kept(model: nn.Module, base: Path) -> bool:
    """Tells whether the base's weights in LoRA layers have their bits, all of them."""
    found = {name: layer.base_layer.weight.detach() for name, layer in layers(model).items()}
    return same(found, {name: load(base).get_parameter(name).detach() for name in found})


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
    ids=lambda each: "-".join(each) or "plain",
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
    assert {each.dtype for each in lora_gradients(models[0]).values()} == {torch.bfloat16}


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
        found = logits(model)
    torch.testing.assert_close(found, logits(twin(model, safety_map)))


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


@contextmanager
def corrected(layer: LoraLinear, indices: Tensor) -> Iterator[None]:
    """Corrects a layer by itself."""
    pattern = FrozenPattern.lay_out(indices, tuple(layer.base_layer.weight.shape))
    correction = LoraCorrection(FrozenLayer("layer", layer, pattern))
    correction.attach()
    yield
    correction.detach()


@pytest.fixture(params=[torch.int32, torch.int64])
def indices(request: pytest.FixtureRequest) -> Tensor:
    """The first and the last entry of 40 x 60, and some rows and columns without any."""
    return torch.tensor([0, 1, 59, 60, 777, 1200, 1201, 2399], dtype=request.param)


@pytest.fixture
def layer() -> LoraLinear:
    torch.manual_seed(0)
    return LoraLinear(nn.Linear(60, 40), "default", config(), r=3)


@pytest.mark.parametrize("shape", [(60,), (1, 60), (7, 60), (2, 3, 60), (0, 60)])
def test_inputs_of_any_shape_and_rows_without_entries_are_no_exception(
    shape: tuple[int, ...], indices: Tensor, layer: LoraLinear
) -> None:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask.view(-1)[indices.long()] = True
    input = torch.randn(shape)
    expected = layer.base_layer(input) + F.linear(input, masked_delta(layer, "default", mask))
    with corrected(layer, indices):
        torch.testing.assert_close(layer(input), expected)


class LargestResult(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_sparse_csr:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_operation_makes_a_tensor_as_large_as_the_weight(
    indices: Tensor, layer: LoraLinear
) -> None:
    input = torch.randn(2, 60, requires_grad=True)
    with corrected(layer, indices), LargestResult() as seen:
        layer.lora_B["default"](layer.lora_A["default"](input)).sum().backward()
    assert input.grad is not None
    assert 0 < seen.largest < 40 * 60 / 4


@pytest.mark.parametrize(("dtype", "expected"), [(torch.int32, 8), (torch.int64, 16)])
def test_a_correction_holds_eight_bytes_per_entry_and_four_per_row_and_column(
    dtype: torch.dtype, expected: int
) -> None:
    indices = torch.arange(0, 1_000_000, 100, dtype=dtype)
    pattern = FrozenPattern.lay_out(indices, (500, 2000))
    parts = [
        part
        for each in (pattern.by_row, pattern.by_column)
        for part in (each.crow_indices(), each.col_indices(), each.values())
    ]
    storages = [each.untyped_storage() for each in parts]
    held = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
    assert held <= expected * len(indices) + expected / 2 * (500 + 2000 + 2) + 2 * 4


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_leaves_the_effective_weights_at_the_maps_entries(
    make: MakeOptimizer, tiny_llama: Path
) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    before = logits(model)
    with preserve(model, safety_map):
        train(model, make)
        found = logits(model)
    torch.testing.assert_close(found, logits(effective(model, tiny_llama, safety_map)))
    assert not torch.allclose(found, before, atol=0.1)
    assert not torch.allclose(found, logits(model), atol=0.1)  # it is what the hooks do
    assert base_kept(model, tiny_llama)


def test_with_the_adapter_disabled_the_output_is_bitwise_the_bases(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    with preserve(model, safety_map), model.disable_adapter():
        assert torch.equal(logits(model), logits(load(tiny_llama)))


def test_generation_runs_on_the_preserved_weights(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    with preserve(model, safety_map):
        found = model.generate(input_ids=BATCHES[0], **options)
    plain = effective(model, tiny_llama, safety_map)
    assert torch.equal(found, plain.generate(input_ids=BATCHES[0], **options))


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
        found = logits(model)
    torch.testing.assert_close(found, logits(effective(model, tmp_path / "merged", adapter)))


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
        found = logits(wrapped)
    torch.testing.assert_close(found, logits(effective(model, tiny_llama, safety_map)))
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
    correction = lora_correction(model, safety_map)
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
        correction = lora_correction(model, safety_map, adapter="second")
    assert {name.split(".")[-2] for name in correction} == {"up_proj"}
    assert len(correction[UP]) == len(safety_map.indices[UP])


class Probe(TrainerCallback):
    """Notes at each step whether the model is the plain one with effective weights."""

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
    from trl import SFTConfig, SFTTrainer  # slow to import

    safety_map = make_map(tiny_llama)
    probe = Probe(tiny_llama, safety_map)
    trainer = SFTTrainer(
        model=load(tiny_llama),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            learning_rate=0.01,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=None,  # a deprecated name, which TRL sets
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": ["Clean up the barn", "Water the plants"] * 8}),
        callbacks=[SafetyPreservingCallback(safety_map), probe],
        peft_config=config(),
    )
    trainer.train()
    assert probe.preserved == [True] * 3
    assert base_kept(trainer.model, tiny_llama)


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in model.state_dict().items() if ".lora_" in name}


def work(rank: int, base: Path, folder: Path, safety_map: SafetyMap) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = adapted(base)
    wrapped = DistributedDataParallel(model)
    optimizer = SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    with preserve(wrapped, safety_map):
        for rows in BATCHES[:3]:
            half = rows[rank : rank + 1]
            wrapped(input_ids=half, labels=half).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.save(lora_weights(model), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, model = make_map(tiny_llama), adapted(tiny_llama)
    mp.spawn(work, (tiny_llama, tmp_path, safety_map), nprocs=2)
    with preserve(model, safety_map):
        train(model, lambda p: SGD(p, lr=0.1), steps=3)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    assert same(first, second)
    for name, each in lora_weights(model).items():
        torch.testing.assert_close(first[name], each, rtol=1e-4, atol=1e-5)
