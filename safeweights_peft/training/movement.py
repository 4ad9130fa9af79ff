"""What a few steps of dense training by SET's loss do to weights, from which they are scored.

Source: arXiv 2110.07560 (LT-SFT), which keeps the entries that moved most, and trains them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.data import Example, collate
from safeweights_peft.errors import TrainingError
from safeweights_peft.modeling.answers import find_layout, without_dropout
from safeweights_peft.modeling.tensors import require_gradients
from safeweights_peft.settings import TrainSettings
from safeweights_peft.training.losses import compute_losses, compute_targets
from safeweights_peft.training.refuse import deal_steps, find_learning_rate


def measure_movement(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    settings: TrainSettings,
    on_step: Callable[..., None] = lambda step, **losses: None,
) -> dict[str, Tensor]:
    """Train parameters, in float32, and return how far entries moved; the model stays as it was."""
    with _training(model, parameters) as originals, without_dropout(model):
        rate = settings.learning_rate or find_learning_rate(model, tokenizer, harmful, settings)
        optimizer = torch.optim.AdamW(parameters.values(), rate, weight_decay=0.0)
        steps, layout = deal_steps(harmful, benign, (), settings), find_layout(model)
        kept = list(dict.fromkeys(example for _, answers in steps for example in answers))
        targets = compute_targets(model, tokenizer, kept, settings, harmful)
        place = {example: row for row, example in enumerate(kept)}
        for step, (refusals, answers) in enumerate(steps, 1):
            batch = collate(refusals + answers, tokenizer.pad_token_id, layout).to(model.device)
            picked = targets.pick([place[example] for example in answers]).to(model.device)
            losses = compute_losses(model, batch, picked, settings)
            loss = losses.weigh(settings)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"step {step}: expected a finite loss, found {loss.item()}; use another score"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step(step, refusal=losses.refusal.item(), retain=losses.retain.item())
        return {
            name: parameter.detach() - originals[name] for name, parameter in parameters.items()
        }


@contextmanager
def _training(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    """Let parameters alone be trained for a while; what is yielded are copies of them as now."""
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with require_gradients(model, parameters.values()):
            yield originals
    finally:
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(originals[name])
