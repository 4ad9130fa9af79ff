"""Movement: what a plain loop does to a rank-1 LoRA; the model then is as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeweights_peft.chat import Chat
from safeweights_peft.data import collate
from safeweights_peft.errors import TrainingError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.answers import find_layout
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.settings import PreserveSettings, TrainSettings
from safeweights_peft.training.finetune import add_lora, find_linear
from safeweights_peft.training.losses import compute_losses, compute_targets
from safeweights_peft.training.movement import measure_movement
from safeweights_peft.training.refuse import deal_steps
from tests.tiny_jobs import BENIGN, HARMFUL, REFUSAL, Interrupted

SETTINGS = TrainSettings(
    steps=3,
    learning_rate=0.01,
    warmup_steps=0,
    shrink=0.0,
    harmful_batch_size=2,
    benign_batch_size=3,
    retain_weight=1.0,
)


class Base:
    """A tiny base, and examples to train it on."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        source = resolve_base(str(path))
        self.model: PreTrainedModel = load_model(source, dtype)
        self.tokenizer = load_tokenizer(source)
        chat = Chat(self.tokenizer)
        self.harmful = [chat.encode_example(text, REFUSAL, 8) for text in HARMFUL]
        self.benign = [chat.encode_example(text, "Yes.", 4) for text in BENIGN]

    def measure(
        self, work_dir: Path, on_step=lambda step, **losses: None, **changes
    ) -> dict[str, Tensor]:
        """Measure the movement of all weights that a LoRA moves."""
        settings = replace(SETTINGS, **changes)
        with measure_movement(
            *(self.model, self.tokenizer, self.harmful, self.benign, settings, work_dir, on_step)
        ) as found:
            return dict(found)

    def train_plainly(self) -> dict[str, Tensor]:
        """Train by AdamW written out, on the losses of each step; multiply the matrices."""
        steps, pad = deal_steps(self.harmful, self.benign, (), SETTINGS), 256
        targets = [
            compute_targets(self.model, self.tokenizer, answers, SETTINGS) for _, answers in steps
        ]
        wrapped = add_lora(self.model, PreserveSettings(rank=1, seed=SETTINGS.seed))
        trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        first, second = ({n: torch.zeros_like(p) for n, p in trained.items()} for _ in "ab")
        for number, ((refusals, answers), target) in enumerate(zip(steps, targets, strict=True)):
            batch = collate(refusals + answers, pad, find_layout(self.model))
            loss = compute_losses(self.model, batch, target, SETTINGS).weigh(SETTINGS)
            gradients = torch.autograd.grad(loss, [*trained.values()])
            rate = 0.01 * (1 + torch.cos(torch.tensor(torch.pi * number / len(steps)))) / 2
            with torch.no_grad():
                for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                    first[name].mul_(0.9).add_(0.1 * gradient)
                    second[name].mul_(0.999).add_(0.001 * gradient**2)
                    step = first[name] / (1 - 0.9 ** (number + 1))
                    size = (second[name] / (1 - 0.999 ** (number + 1))).sqrt() + 1e-8
                    parameter -= rate * step / size
        moved = {}
        for name, matrix in trained.items():
            if "lora_B" in name:
                other = trained[name.replace("lora_B", "lora_A")]
                own = name.removeprefix("base_model.model.").replace(".lora_B.default", "")
                moved[own] = 2 * (matrix @ other).detach()  # alpha is twice the rank
        return moved


def test_movement_is_that_of_a_plain_loop(tiny_llama: Path, tmp_path: Path) -> None:
    found, expected = Base(tiny_llama).measure(tmp_path), Base(tiny_llama).train_plainly()
    assert found.keys() == expected.keys()
    assert found.keys() == {f"{name}.weight" for name in find_linear(Base(tiny_llama).model)[0]}
    for name, change in found.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_the_model_stays_as_it_was(tiny_llama: Path, tmp_path: Path, is_broken_off: bool) -> None:
    base = Base(tiny_llama)
    base.model.get_parameter("model.norm.weight").requires_grad_(False)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    required = {name: p.requires_grad for name, p in base.model.named_parameters()}

    def on_step(step: int, **losses: float) -> None:
        if is_broken_off and step == 2:
            raise Interrupted

    if is_broken_off:
        with pytest.raises(Interrupted):
            base.measure(tmp_path, on_step)
    else:
        assert all(change.any() for change in base.measure(tmp_path, on_step).values())
    after = dict(base.model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == required[name], name
        assert parameter.grad is None, name
    assert not hasattr(base.model, "peft_config")
    assert not base.model.training
    assert base.model.config.use_cache


def test_weights_of_16_bits_move_by_steps_that_they_would_round_away(
    tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    base = Base(tiny_llama_bf16, torch.bfloat16)
    found = base.measure(tmp_path, learning_rate=1e-6)
    assert all(change.dtype == torch.float32 and change.any() for change in found.values())


def test_an_interrupted_movement_resumes_to_the_same_bits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeweights_peft.training.finetune.SAVE_SECONDS", 0)
    whole, steps = Base(tiny_llama).measure(tmp_path / "whole"), []

    def break_off(step: int, **losses: float) -> None:
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        Base(tiny_llama).measure(tmp_path / "parts", break_off)
    resumed = Base(tiny_llama).measure(
        tmp_path / "parts", lambda step, **losses: steps.append(step)
    )
    assert steps[0] > 1
    assert all(torch.equal(resumed[name], change) for name, change in whole.items())


def test_the_rate_can_be_found_from_the_gain_of_a_step(tiny_llama: Path, tmp_path: Path) -> None:
    base, steps = Base(tiny_llama), []

    def on_step(step: int, **losses: float) -> None:
        steps.append((step, losses["refusal"]))

    base.measure(tmp_path, on_step, learning_rate=None, step_gain=0.05, retain_weight=0.0)
    assert [step for step, _ in steps] == [1, 2, 3]
    assert steps[-1][1] < steps[0][1]


def test_a_loss_that_is_not_finite_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    base = Base(tiny_llama)
    with pytest.raises(TrainingError, match="expected a finite loss, found nan"):
        base.measure(tmp_path, learning_rate=1e30)
