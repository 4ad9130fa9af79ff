"""Movement: what a plain loop of AdamW does to all weights, which then are as they were."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example, collate
from safeweights_peft.errors import TrainingError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.answers import find_layout
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.settings import TrainSettings
from safeweights_peft.training.losses import compute_losses, compute_targets
from safeweights_peft.training.movement import measure_movement
from safeweights_peft.training.refuse import deal_steps
from tests.tiny_jobs import BENIGN, HARMFUL, REFUSAL, Interrupted

SETTINGS = TrainSettings(
    steps=3, learning_rate=0.01, harmful_batch_size=2, benign_batch_size=3, retain_weight=1.0
)


class Base:
    """A tiny base, and examples to train it on."""

    def __init__(self, path: Path) -> None:
        source = resolve_base(str(path))
        self.model: PreTrainedModel = load_model(source, torch.float32)
        self.tokenizer = load_tokenizer(source)
        chat = Chat(self.tokenizer)
        self.harmful = [chat.encode_example(text, REFUSAL, 8) for text in HARMFUL]
        self.benign = [chat.encode_example(text, "Yes.", 4) for text in BENIGN]

    def measure(self, on_step=lambda step, **losses: None, **changes) -> dict[str, Tensor]:
        parameters, settings = eligible_parameters(self.model), replace(SETTINGS, **changes)
        examples: tuple[list[Example], list[Example]] = (self.harmful, self.benign)
        return measure_movement(
            self.model, parameters, self.tokenizer, *examples, settings, on_step
        )

    def train_plainly(self) -> dict[str, Tensor]:
        """Train in place: AdamW written out, on the losses of each step."""
        parameters = eligible_parameters(self.model)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        steps, pad = deal_steps(self.harmful, self.benign, (), SETTINGS), 256
        moments = {name: [torch.zeros(p.shape), torch.zeros(p.shape)] for name, p in before.items()}
        targets = [
            compute_targets(self.model, self.tokenizer, answers, SETTINGS) for _, answers in steps
        ]
        self.model.requires_grad_(True)
        for number, ((refusals, answers), target) in enumerate(zip(steps, targets, strict=True), 1):
            batch = collate(refusals + answers, pad, find_layout(self.model))
            loss = compute_losses(self.model, batch, target, SETTINGS).weigh(SETTINGS)
            gradients = torch.autograd.grad(loss, [*parameters.values()])
            with torch.no_grad():
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                    first, second = moments[name]
                    first.mul_(0.9).add_(0.1 * gradient)
                    second.mul_(0.999).add_(0.001 * gradient**2)
                    step = first / (1 - 0.9**number)
                    parameter -= 0.01 * step / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        return {name: p.detach() - before[name] for name, p in parameters.items()}


def test_movement_is_that_of_a_plain_loop(tiny_llama: Path) -> None:
    found, expected = Base(tiny_llama).measure(), Base(tiny_llama).train_plainly()
    assert found.keys() == expected.keys()
    for name, change in found.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_the_model_stays_as_it_was(tiny_llama: Path, is_broken_off: bool) -> None:
    base = Base(tiny_llama)
    base.model.get_parameter("model.norm.weight").requires_grad_(False)
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    required = {name: p.requires_grad for name, p in base.model.named_parameters()}

    def on_step(step: int, **losses: float) -> None:
        if is_broken_off and step == 2:
            raise Interrupted

    if is_broken_off:
        with pytest.raises(Interrupted):
            base.measure(on_step)
    else:
        assert all(change.any() for change in base.measure(on_step).values())
    for name, parameter in base.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.requires_grad == required[name], name
        assert parameter.grad is None, name


def test_the_rate_can_be_found_from_the_gain_of_a_step(tiny_llama: Path) -> None:
    base, steps = Base(tiny_llama), []

    def on_step(step: int, **losses: float) -> None:
        steps.append((step, losses["refusal"]))

    base.measure(on_step, learning_rate=None, step_gain=0.05, retain_weight=0.0)
    assert [step for step, _ in steps] == [1, 2, 3]
    assert steps[-1][1] < steps[0][1]


def test_a_loss_that_is_not_finite_is_refused(tiny_llama: Path) -> None:
    base = Base(tiny_llama)
    with pytest.raises(TrainingError, match="expected a finite loss, found nan"):
        base.measure(learning_rate=1e30)
