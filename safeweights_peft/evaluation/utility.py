"""What a patch costs on harmless requests: drift from the base model, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.data import IGNORED, Batch, Example, collate
from safeweights_peft.errors import EvaluationError
from safeweights_peft.modeling.answers import answer_logits


@dataclass(frozen=True)
class Utility:
    """Closeness to the base model on the base's own answers to harmless requests.

    Attributes:
        kl: mean over answer tokens of KL(base || model), in nats; 0 for the base itself.
        perplexity: exp of the mean negative log-likelihood of the answers under the model.
        tokens: how many answer tokens were scored.
    """

    kl: float
    perplexity: float
    tokens: int


@torch.inference_mode()
def measure_utility(
    model: PreTrainedModel,
    base: PreTrainedModel,
    answers: Sequence[Example],
    pad_token_id: int,
    *,
    batch_size: int = 10,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Utility:
    """Score the base's answers under both models."""
    kl = loss = 0.0
    tokens = 0
    for batch in _batches(answers, pad_token_id, batch_size):
        batch = batch.to(model.device)
        scored = batch.answer_ids != IGNORED
        log_p = F.log_softmax(answer_logits(base, batch)[scored], -1)
        log_q = log_p if model is base else F.log_softmax(answer_logits(model, batch)[scored], -1)
        kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        loss += F.nll_loss(log_q, batch.answer_ids[scored], reduction="sum").item()
        tokens += int(scored.sum())
        on_batch(len(scored))
    if not tokens:
        raise EvaluationError("answers: expected at least one token, found none")
    if not math.isfinite(kl + loss):
        raise EvaluationError(
            "answers: expected finite likelihoods, found NaN or infinity; compute in float32 or "
            "bfloat16, and check the weights"
        )
    return Utility(kl / tokens, math.exp(loss / tokens), tokens)


def _batches(answers: Sequence[Example], pad_token_id: int, size: int) -> Iterator[Batch]:
    ordered = sorted(answers, key=lambda example: len(example.prompt_ids))
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size], pad_token_id)
