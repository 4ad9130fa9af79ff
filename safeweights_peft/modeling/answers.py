"""Logits that predict answers, and no others."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from safeweights_peft.data import Batch


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the float32 logits that predict a batch's answers; ``(B, A, vocabulary)``."""
    # A system prompt is the same in all rows: it is computed once, not once per row, where the
    # model keeps plain keys and values of its past. Gradients flow through them all the same.
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
    """Name the last columns of a batch in the form for which a model computes logits fastest."""
    # For a number, transformers takes a view of the hidden states, and of a view torch copies the
    # whole output matrix once per row: half of a short step's time.
    return torch.arange(-count, 0)


def _shared_past(model: nn.Module, batch: Batch) -> DynamicCache | None:
    """Compute the shared columns once; None for a model with another kind of memory."""
    columns = slice(0, batch.shared)
    past = model(
        input_ids=batch.input_ids[:1, columns],
        position_ids=batch.position_ids[:1, columns],
        use_cache=True,
        logits_to_keep=last_columns(1),
    ).past_key_values
    # A sliding window or a recurrent state isn't repeated for each row by what follows.
    if not isinstance(past, DynamicCache) or {type(x) for x in past.layers} != {DynamicLayer}:
        return None
    past.batch_repeat_interleave(len(batch.input_ids))
    return past
