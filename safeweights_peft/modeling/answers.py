"""Logits that predict answers, and the layout in which a model computes them right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from safeweights_peft.data import Batch, Batching, Example, Layout, collate

# Two rows of one start, of which the first is padded in any batch. A few tokens tell: what a model
# gets wrong it gets wrong at the first column of padding. Only windows longer than these rows stay
# unseen, so `_can_share` asks for those.
PROBE_START, PROBE_RESTS, PROBE_ANSWERS = 3, (1, 4), (3, 2)
# The gap that is still rounding: this many times the noise of the model itself, but at most what
# rounding ever makes, as the noise of a model that reads ahead has no bound. Where padding is not
# ignored, tiny models of 100 architectures show at least 0.1, or a cache that tells.
NOISE_FACTOR, LEAST_NOISE, LARGEST_GAP = 4.0, 1e-6, 0.1

_layouts: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def answer_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute the float32 logits that predict a batch's answers; ``(B, A, vocabulary)``."""
    if batch.is_alone:
        return _stack_rows(model, batch)
    # A system prompt is the same in all rows: it is computed once, not once per row, where the
    # model keeps plain keys and values of its past. Gradients flow through them all the same.
    past = None
    if batch.shared and len(batch.input_ids) > 1:
        past = _compute_past(model, batch)
        past.batch_repeat_interleave(len(batch.input_ids))
    return _forward(model, batch, past)


def _stack_rows(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Run each row without padding, and lay the logits side by side."""
    width = batch.answer_ids.shape[1]
    rows = []
    for row in batch.split():
        missing = width - row.answer_ids.shape[1]
        rows.append(F.pad(_forward(model, row)[0], (0, 0, 0, missing)))
    return torch.stack(rows)


def _forward(model: nn.Module, batch: Batch, past: DynamicCache | None = None) -> torch.Tensor:
    start, count = batch.shared if past else 0, batch.answer_ids.shape[1]
    columns = last_columns(count + 1)[:-1]
    logits = model(
        input_ids=batch.input_ids[:, start:],
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids[:, start:],
        past_key_values=past,
        use_cache=past is not None,
        logits_to_keep=columns,
    ).logits
    # Some models don't know `logits_to_keep`, and compute the logits of all columns.
    return (logits if logits.shape[1] == count else logits[:, columns]).float()


def last_columns(count: int) -> torch.Tensor:
    """Name the last columns of a batch in the form for which a model computes logits fastest."""
    # For a number, transformers takes a view of the hidden states, and of a view torch copies the
    # whole output matrix once per row: half of a short step's time.
    return torch.arange(-count, 0)


def _compute_past(model: nn.Module, batch: Batch) -> Any:
    """Compute the shared columns once; None for a model that returns no past."""
    columns = slice(0, batch.shared)
    output = model(
        input_ids=batch.input_ids[:1, columns],
        position_ids=batch.position_ids[:1, columns],
        use_cache=True,
        logits_to_keep=last_columns(1),
    )
    return getattr(output, "past_key_values", None)


def find_layout(model: nn.Module) -> Layout:
    """Find how a model takes several rows at once; a check that runs it, once per model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base not in _layouts:
        with torch.no_grad(), _without_dropout(base):
            _layouts[base] = Layout(_find_batching(base), _find_positions(base))
    return _layouts[base]


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _find_batching(model: PreTrainedModel) -> Batching:
    examples = _make_probe(model.config.get_text_config().vocab_size)
    row, count = examples[0], PROBE_ANSWERS[0]

    def run(rows: list[Example], batching: Batching) -> torch.Tensor:
        batch = collate(rows, row.prompt_ids[0], Layout(batching)).to(model.device)
        return answer_logits(model, batch)[0, :count]

    alone = run([row], Batching.ALONE)
    # The same row twice, and longer: without padding, so this changes nothing but how a causal
    # model's sums are rounded.
    longer = Example(row.prompt_ids, row.answer_ids * 2)
    noise = float(_measure_gaps(run([longer, longer], Batching.LEFT), alone).max())
    noise = max(noise, torch.finfo(model.dtype).eps, LEAST_NOISE)
    limit = min(NOISE_FACTOR * noise, LARGEST_GAP)

    def is_right(batching: Batching) -> bool:
        is_shared = batching is Batching.SHARED
        if is_shared and not _can_share(model, examples):
            return False
        # The median: where rounding sends a token to another expert, one position may be far off.
        # Plain keys and values can be read on; a state that was made beside padding need not.
        gap = _measure_gaps(run(examples, batching), alone).median()
        return bool(gap <= limit) and (is_shared or _generates_alike(model, examples, limit))

    for batching in (Batching.SHARED, Batching.LEFT):
        try:
            if is_right(batching):
                return batching
        # A model that has run the row alone, and fails now, has a cache or masks for no batch.
        except Exception:
            continue
    return Batching.ALONE


def _generates_alike(model: PreTrainedModel, examples: list[Example], limit: float) -> bool:
    """Find whether the tokens after the first are predicted in a batch as they are alone."""
    prompts = [Example(example.prompt_ids, ()) for example in examples]
    pad_token_id = prompts[0].prompt_ids[0]
    config = GenerationConfig(do_sample=False, max_new_tokens=3, pad_token_id=pad_token_id)

    def run(rows: list[Example]) -> tuple[list[int], list[torch.Tensor]]:
        batch = collate(rows, pad_token_id, Layout(Batching.LEFT)).to(model.device)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, batch.input_ids.shape[1] :].tolist()
        return tokens, [logits[0].float() for logits in output.logits]

    (tokens, found), (own, expected) = run(prompts), run(prompts[:1])
    gaps = [
        float(_measure_gaps(found[step], expected[step]))
        for step in range(1, len(found))
        if tokens[:step] == own[:step]  # else rounding has chosen other tokens to go on from
    ]
    return min(gaps, default=0.0) <= limit  # the least, for the same reason as the median above


def _make_probe(vocabulary: int) -> list[Example]:
    """Make rows of tokens from the middle of a vocabulary, away from those that mean images."""
    length = PROBE_START + sum(PROBE_RESTS) + sum(PROBE_ANSWERS)
    tokens = iter((torch.arange(length) * 37 % (vocabulary // 2) + vocabulary // 4).tolist())
    start = tuple(islice(tokens, PROBE_START))
    return [
        Example(start + tuple(islice(tokens, rest)), tuple(islice(tokens, answer)))
        for rest, answer in zip(PROBE_RESTS, PROBE_ANSWERS, strict=True)
    ]


def _measure_gaps(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Measure the distance of logits at each position, in units of their spread there."""
    spread = expected.std(-1).clamp_min(torch.finfo(expected.dtype).tiny)
    return (found - expected).square().mean(-1).sqrt() / spread


def _can_share(model: PreTrainedModel, examples: list[Example]) -> bool:
    """Find whether a model's past is plain keys and values, of all tokens before."""
    config = model.config.get_text_config()
    # A cache whose config has no layer types doesn't know a window that is an architecture's own.
    has_window = any(
        name.endswith(("window", "window_size")) and type(value) is int and value > 0
        for name, value in vars(config).items()
    )
    if has_window and not getattr(config, "layer_types", None):
        return False
    past = _compute_past(model, collate(examples, 0, Layout(Batching.SHARED)).to(model.device))
    # A recurrent state isn't repeated for each row by what follows, and padding stands in a
    # window; nor is what a subclass keeps beside its layers repeated.
    return type(past) is DynamicCache and {type(x) for x in past.layers} == {DynamicLayer}


def _find_positions(model: PreTrainedModel) -> int | None:
    """Find how many positions a model has a table of; None where it computes any."""
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not count:
        return None
    tokens = set(model.get_input_embeddings().modules())
    tables = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module not in tokens
    ]
    # GPT-J and its kin keep sines in a buffer. OPT and its kin have two rows more than positions.
    tables += [buffer for buffer in model.buffers() if buffer.ndim == 2]
    return count if any(count <= len(table) <= count + 2 for table in tables) else None
