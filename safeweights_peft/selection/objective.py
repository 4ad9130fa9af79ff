"""What the score of an entry is a derivative of: the safety S of a model's answers.

A `SafetyObjective` is differentiable and reads logits; a `Judge` (in `evaluation`) reads text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.data import IGNORED, Example, collate
from safeweights_peft.errors import SelectionError
from safeweights_peft.modeling.answers import answer_logits


class SafetyObjective(Protocol):
    """An expected safety score S(theta) that can be differentiated, one batch at a time."""

    def __len__(self) -> int:
        """Count the terms that `terms` yields."""
        ...

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield scalars whose gradients sum to that of S(theta), or to an estimate of it."""
        ...


class ReferenceObjective:
    """Mean log-likelihood of a wished answer; needs no judge.

    S(theta) = mean over examples of (1 / T) sum over t of log p_theta(y_t | x, y_<t), where x is
    a request and y an answer of T tokens. With harmful requests and refusals it stands in for the
    judge's score J of arXiv 2604.08297 (ESI's S); with benign ones and the model's own answers it
    tells what the model is useful for.
    """

    def __init__(self, examples: Sequence[Example], pad_token_id: int, batch_size: int = 8) -> None:
        """Sort the examples by length, so that little is padded."""
        if not examples:
            raise SelectionError("examples: expected at least one request, found none")
        ordered = sorted(examples, key=lambda example: len(example.prompt_ids))
        self._batches = [
            ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)
        ]
        self._count = len(ordered)
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        """Count the batches."""
        return len(self._batches)

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield each batch's share of the mean log-likelihood."""
        for examples in self._batches[start:]:
            batch = collate(examples, self._pad_token_id).to(model.device)
            logits = answer_logits(model, batch)
            losses = F.cross_entropy(
                logits.transpose(1, 2), batch.answer_ids, ignore_index=IGNORED, reduction="none"
            )
            lengths = (batch.answer_ids != IGNORED).sum(-1)
            yield -(losses.sum(-1) / lengths).sum() / self._count
