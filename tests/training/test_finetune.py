"""Full fine-tuning under protection: what is learnt from, in which order, and what stays."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM, MllamaForCausalLM, MllamaTextConfig, Trainer
from transformers.utils import ModelOutput

from safeweights_peft.data import Example
from safeweights_peft.errors import BaseMismatchError, DataError, TrainingError
from safeweights_peft.modeling.answers import pads_behind
from safeweights_peft.settings import PreserveMethod, PreserveSettings
from safeweights_peft.training.finetune import (
    add_lora,
    collate_answers,
    compute_answer_loss,
    deal,
    find_linear,
    fine_tune,
)
from tests.tiny_jobs import Interrupted
from tests.tiny_models import COMMON
from tests.training.maps import entries, hooks, kept, load, make_map, moved, same, train
from tests.zoo.architectures import build_config, load_checkpoint_model, save_checkpoint

PAD = 256
LENGTHS = ((5, 3), (9, 1), (4, 6), (7, 7), (6, 2))
EXAMPLES = [
    Example(tuple(range(10, 10 + prompt)), tuple(range(90, 90 + answer)))
    for prompt, answer in LENGTHS
]
SETTINGS = PreserveSettings(steps=5, learning_rate=0.01, batch_size=2)


def mean_loss(model: nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Compute the mean loss of answer tokens one by one, each row alone."""
    losses = []
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        for position, token in enumerate(example.answer_ids, len(example.prompt_ids)):
            losses.append(-logits[position - 1].log_softmax(-1)[token])
    return torch.stack(losses).mean()


# BART computes all columns and shifts no labels, GIT and ProphetNet lose columns in their own loss.
@pytest.mark.parametrize("name", ["llama", "bart", "git", "prophetnet", "roberta", "mamba", "mpt"])
def test_the_loss_of_a_batch_is_that_of_its_answer_tokens_one_by_one(
    name: str, tmp_path: Path
) -> None:
    save_checkpoint(name, tmp_path)
    model = load_checkpoint_model(tmp_path, dtype=torch.float32)
    examples = EXAMPLES if pads_behind(model) else EXAMPLES[:1]
    batch = collate_answers(examples, PAD)
    labels = batch.pop("labels")
    loss = compute_answer_loss(model(**batch), labels)
    torch.testing.assert_close(loss, mean_loss(model, examples))


@pytest.mark.parametrize("pads", [True, False])
def test_a_step_learns_from_all_its_answer_tokens_alike_in_a_batch_or_row_by_row(
    pads: bool, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.training.finetune.pads_behind", lambda model: pads)
    safety_map, model, twin = make_map(tiny_llama), load(tiny_llama), load(tiny_llama)
    settings = PreserveSettings(steps=1, learning_rate=0.01, batch_size=5, warmup=0.0)
    gradients = {}

    def keep(self: Trainer, model: nn.Module, *_: Any) -> torch.Tensor:
        gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})
        return torch.tensor(1.0)

    monkeypatch.setattr(Trainer, "_clip_grad_norm", keep)
    losses = fine_tune(model, PAD, EXAMPLES, safety_map, settings, tmp_path / "work")
    expected = mean_loss(twin.requires_grad_(True), EXAMPLES)
    expected.backward()
    assert losses == [pytest.approx(expected.item(), rel=1e-4)]
    frozen = safety_map.indices
    for name, parameter in twin.named_parameters():
        if name not in frozen:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "jetmoe"])
@pytest.mark.parametrize("pads", [True, False])
def test_experts_are_balanced_where_the_config_asks_as_by_the_models_own_loss(
    name: str, pads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.training.finetune.pads_behind", lambda model: pads)
    save_checkpoint(name, tmp_path / "base")
    expected, losses = {}, {}
    for is_asked in (False, True):
        model = load_checkpoint_model(tmp_path / "base", dtype=torch.float32)
        model.config.output_router_logits = model.output_router_logits = is_asked
        settings = PreserveSettings(steps=1, batch_size=2, warmup=0.0)
        parts = []
        for rows in [EXAMPLES[:2]] if pads else [[row] for row in EXAMPLES[:2]]:
            batch = collate_answers(rows, PAD) | {"logits_to_keep": 0}
            labels = batch["input_ids"].clone()
            labels[:, : -batch["labels"].shape[1]] = -100
            labels[:, -batch["labels"].shape[1] :] = batch["labels"]
            parts.append((model(**batch | {"labels": labels}).loss, (labels != -100).sum()))
        total = sum(count for _, count in parts)
        expected[is_asked] = sum(loss.item() * count.item() for loss, count in parts) / total.item()
        safety_map = make_map(tmp_path / "base", [find_linear(model)[0][0] + ".weight"])
        (losses[is_asked],) = fine_tune(
            model, PAD, EXAMPLES[:2], safety_map, settings, tmp_path / f"work{is_asked}"
        )
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[True] - losses[False] > 1e-3


@pytest.mark.parametrize("count", [None, torch.tensor(0), torch.tensor(3)])
def test_a_batch_without_answers_teaches_nothing(count: torch.Tensor | None) -> None:
    logits = torch.randn(2, 4, 7, requires_grad=True)
    labels = torch.full((2, 4), -100)
    loss = compute_answer_loss(ModelOutput(logits=logits), labels, count)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_row_longer_than_a_models_positions_is_refused(tmp_path: Path) -> None:
    save_checkpoint("gpt2", tmp_path / "base")
    model = load_checkpoint_model(tmp_path / "base", dtype=torch.float32)
    safety_map = make_map(tmp_path / "base", ["transformer.h.0.mlp.c_fc.weight"])
    rows = [*EXAMPLES, Example((1,) * 500, (2,) * 13)]
    with pytest.raises(DataError, match=r"expected at most 512 tokens .* found 500 \+ 13"):
        fine_tune(model, PAD, rows, safety_map, SETTINGS, tmp_path / "work")


def test_logits_begin_where_the_first_answer_is_predicted() -> None:
    batch = collate_answers(EXAMPLES, PAD)
    width = batch["input_ids"].shape[1]
    assert width == 14
    assert batch["logits_to_keep"].tolist() == list(range(3 - width, 0))
    assert batch["labels"].shape == (5, width - 3)


def test_every_example_is_dealt_before_any_comes_again() -> None:
    dealt = deal(EXAMPLES, PreserveSettings(steps=4, batch_size=5))
    assert set(Counter(dealt).values()) == {4}


def test_batches_are_dealt_for_every_step_however_few_examples_there_are() -> None:
    settings = PreserveSettings(steps=40, batch_size=3)
    assert len(deal(EXAMPLES[:2], settings)) == 120


def test_rows_of_like_length_stand_in_one_batch() -> None:
    examples = [Example((1,) * 5, (2,) * n) for n in range(1, 61)]
    dealt = deal(examples, PreserveSettings(steps=10, batch_size=6))
    lengths = [[len(example.answer_ids) for example in dealt[i : i + 6]] for i in range(0, 60, 6)]
    assert all(max(batch) - min(batch) == 5 for batch in lengths)
    assert lengths != sorted(lengths)


def test_another_seed_deals_in_another_order() -> None:
    settings = [PreserveSettings(steps=4, batch_size=5, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (deal(EXAMPLES, option) for option in settings)
    assert first == again
    assert first != other


def test_all_weights_move_but_those_of_the_map(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    losses = fine_tune(model, PAD, EXAMPLES, safety_map, SETTINGS, tmp_path / "work")
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert kept(model, tiny_llama, safety_map)
    assert moved(model, tiny_llama)


def test_weights_stay_in_float32_where_products_are_computed_in_bfloat16(
    tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map, wide, narrow = make_map(tiny_llama), load(tiny_llama), load(tiny_llama)
    fine_tune(wide, PAD, EXAMPLES, safety_map, SETTINGS, tmp_path / "wide")
    fine_tune(narrow, PAD, EXAMPLES, safety_map, SETTINGS, tmp_path / "narrow", torch.bfloat16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.float32}
    assert not same(narrow.state_dict(), wide.state_dict())
    assert kept(narrow, tiny_llama, safety_map)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_broken_off_anywhere_ends_bitwise_like_a_straight_one(
    stop: int, tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map, straight, resumed = make_map(tiny_llama), load(tiny_llama), load(tiny_llama)

    def on_step(step: int, **losses: float) -> None:
        if step == stop:
            raise Interrupted

    job = PAD, EXAMPLES, safety_map, SETTINGS
    losses = fine_tune(straight, *job, tmp_path / "straight")
    with pytest.raises(Interrupted):
        fine_tune(load(tiny_llama), *job, tmp_path / "broken", on_step=on_step)
    assert fine_tune(resumed, *job, tmp_path / "broken") == losses
    assert same(resumed.state_dict(), straight.state_dict())


def test_a_finished_run_called_again_trains_no_further(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, first, second = make_map(tiny_llama), load(tiny_llama), load(tiny_llama)
    losses = fine_tune(first, PAD, EXAMPLES, safety_map, SETTINGS, tmp_path)
    assert fine_tune(second, PAD, EXAMPLES, safety_map, SETTINGS, tmp_path) == losses
    assert same(first.state_dict(), second.state_dict())


def test_no_hook_is_left_after_a_run_that_was_broken_off(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    before, frozen = hooks(model), entries(model, safety_map)

    def on_step(step: int, **losses: float) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        fine_tune(model, PAD, EXAMPLES, safety_map, SETTINGS, tmp_path, on_step=on_step)
    assert hooks(model) == before
    assert same(entries(model, safety_map), frozen)


def test_a_loss_that_is_not_finite_ends_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    model = load(tiny_llama)
    safety_map = make_map(tiny_llama, ["model.layers.0.mlp.up_proj.weight"])
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"^step 1: expected a finite loss, found nan; lower"):
        fine_tune(model, PAD, EXAMPLES, safety_map, SETTINGS, tmp_path)


def test_no_examples_are_refused() -> None:
    with pytest.raises(TrainingError, match="expected at least one, found none"):
        deal([], SETTINGS)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = load(tiny_llama)
    train(model, steps=1)
    with pytest.raises(BaseMismatchError, match="safety map was made for"):
        fine_tune(model, PAD, EXAMPLES, make_map(tiny_llama), SETTINGS, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_what_lora_leaves_is_named_by_number_where_it_goes_on_other_layers() -> None:
    config = MllamaTextConfig(**COMMON, cross_attention_layers=[1])
    with torch.device("meta"):
        targets, left = find_linear(MllamaForCausalLM(config))
    assert {target.split(".")[2] for target in targets} == {"0"}
    assert "model.layers.*.cross_attn.q_proj.weight" in left
    assert "model.layers.1.mlp.up_proj.weight" in left


@pytest.mark.parametrize(
    ("architecture", "layer", "is_trained"),
    [
        ("falcon", "query_key_value", True),
        ("deepseek_v4", "o_a_proj", False),
        ("mamba", "in_proj", True),
        ("mamba", "out_proj", False),  # whose weight the kernels of Mamba read past LoRA
    ],
)
def test_lora_goes_beside_what_multiplies_by_its_weight_and_is_called(
    architecture: str, layer: str, is_trained: bool
) -> None:
    model = AutoModelForCausalLM.from_config(build_config(architecture))
    state = torch.random.get_rng_state()
    targets, left = find_linear(model)
    assert any(name.endswith(f".{layer}") for name in targets) is is_trained
    assert any(name.endswith(f".{layer}.weight") for name in left) is not is_trained
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("deepseek_v2", "mlp.gate_proj"),  # PEFT would train fused experts in its place
        ("deepseek_v2", "shared_experts.gate_proj"),
        ("laguna", "shared_experts.gate_proj"),  # PEFT would not find it again
    ],
)
def test_lora_leaves_layers_that_peft_takes_for_others(architecture: str, layer: str) -> None:
    model = AutoModelForCausalLM.from_config(build_config(architecture))
    targets, left = find_linear(model)
    assert any(name.endswith(".self_attn.o_proj") for name in targets)
    assert not any(name.endswith(f".{layer}") for name in targets)
    assert any(name.endswith(f".{layer}.weight") for name in left)
    adapted = add_lora(model, PreserveSettings(method=PreserveMethod.LORA))
    assert not any(isinstance(module, ParamWrapper) for module in adapted.modules())
