"""Answers as models compute them: the logits that predict them, and no others."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from transformers import (
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer


class AnswerBatch(Protocol):
    """Prompts and answers side by side; `data.Batch` is one and explains them."""

    @property
    def input_ids(self) -> torch.Tensor:
        """(B, P + A) token ids."""
        ...

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, P + A), 1 where a token stands."""
        ...

    @property
    def position_ids(self) -> torch.Tensor:
        """(B, P + A), counted over each row's tokens."""
        ...

    @property
    def answer_ids(self) -> torch.Tensor:
        """(B, A) answers, padded on the right."""
        ...

    @property
    def shared(self) -> int:
        """How many leading columns are the same in all rows."""
        ...


def answer_logits(model: nn.Module, batch: AnswerBatch) -> torch.Tensor:
    """Compute the logits that predict the answers; no others are materialised.

    Columns that all rows share (a system prompt) are computed once, not once per row, where the
    model keeps plain keys and values of its past; gradients flow through them all the same.
    """
    past = _shared_past(model, batch) if batch.shared and len(batch.input_ids) > 1 else None
    start = batch.shared if past else 0
    output = model(
        input_ids=batch.input_ids[:, start:],
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids[:, start:],
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=last_columns(batch.answer_ids.shape[1] + 1)[:-1],
    )
    return output.logits.float()


def last_columns(count: int) -> torch.Tensor:
    """Name the last columns of a batch in the form for which a model computes logits fastest.

    Told a number instead, transformers takes a view of the hidden states, for which torch copies
    the whole output matrix once per row: half of a short step's time.
    """
    return torch.arange(-count, 0)


def _shared_past(model: nn.Module, batch: AnswerBatch) -> DynamicCache | None:
    """Compute the shared columns once; None for a model with another kind of memory."""
    columns = slice(0, batch.shared)
    past = model(
        input_ids=batch.input_ids[:1, columns],
        position_ids=batch.position_ids[:1, columns],
        use_cache=True,
        logits_to_keep=last_columns(1),
    ).past_key_values
    if not isinstance(past, DynamicCache) or {type(each) for each in past.layers} != {DynamicLayer}:
        return None
    past.batch_repeat_interleave(len(batch.input_ids))
    return past
