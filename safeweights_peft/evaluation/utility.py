"""The cost of a patch on harmless requests: drift from the base, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.data import IGNORED, Batch, Example, Layout, collate
from safeweights_peft.errors import EvaluationError
from safeweights_peft.modeling.answers import answer_logits, find_layout

Patched = Callable[[], AbstractContextManager[PreTrainedModel]]
"""Opens a patched model; it may be the base itself, patched while the context lasts."""


MAX_LOSS = 700
"""Of a larger one the exponential, which is the perplexity, is beyond Python's floats."""


@dataclass(frozen=True)
class Utility:
    """Closeness to the base on its own answers to harmless requests."""

    kl: float  # mean over answer tokens of KL(base || model), in nats; 0 for the base itself
    perplexity: float  # exp of the mean negative log-likelihood of the answers under the model
    tokens: int


@torch.inference_mode()
def measure_utility(
    base: PreTrainedModel,
    answers: Sequence[Example],
    pad_token_id: int,
    patched: Patched | None = None,
    *,
    batch_size: int = 10,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Utility:
    """Score the base's answers under the base and under a patched model, or the base alone."""
    kl = loss = 0.0
    tokens = 0
    for batch in _batches(answers, pad_token_id, find_layout(base), batch_size):
        batch = batch.to(base.device)
        scored = batch.answer_ids != IGNORED
        log_q = log_p = F.log_softmax(answer_logits(base, batch)[scored], -1)
        if patched is not None:
            # Switched for each batch: one batch of the base's log-probabilities is all that is
            # kept, where those of all answers would fill the memory.
            with patched() as model:
                log_q = F.log_softmax(answer_logits(model, batch)[scored], -1)
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
    if loss / tokens > MAX_LOSS:
        raise EvaluationError(
            f"answers: expected a loss of at most {MAX_LOSS} nats/token, found "
            f"{loss / tokens:.0f}; check the weights, such a model is broken"
        )
    return Utility(kl / tokens, math.exp(loss / tokens), tokens)


def _batches(
    answers: Sequence[Example], pad_token_id: int, layout: Layout, size: int
) -> Iterator[Batch]:
    ordered = sorted(answers, key=lambda example: len(example.prompt_ids))
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size], pad_token_id, layout)
