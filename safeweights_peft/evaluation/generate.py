"""Batched greedy answers of a model to requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.data import Example, collate, encode_prompt
from safeweights_peft.errors import EvaluationError
from safeweights_peft.modeling.answers import last_columns


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 25,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[Example]:
    """Let a model answer requests greedily, each on its own."""
    if not instructions:
        raise EvaluationError("prompts: expected at least one request, found none")
    prompts = [Example(encode_prompt(tokenizer, text), ()) for text in instructions]
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].prompt_ids))
    # From the model's end tokens alone: its own settings, such as sampling, stay out.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(find_end_tokens(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: dict[int, Example] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        examples = _answer([prompts[row] for row in rows], model, config)
        answers.update(zip(rows, examples, strict=True))
        on_batch(len(rows))
    return [answers[row] for row in range(len(prompts))]


def find_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Find the tokens with which a model ends an answer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, list) else [ends])


@torch.inference_mode()
def _answer(
    prompts: Sequence[Example], model: PreTrainedModel, config: GenerationConfig
) -> list[Example]:
    batch = collate(prompts, config.pad_token_id).to(model.device)
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        generation_config=config,
        logits_to_keep=last_columns(1),
    )
    width = batch.input_ids.shape[1]
    return [
        Example(prompt.prompt_ids, _cut(tuple(row), config.eos_token_id))
        for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True)
    ]


def _cut(ids: tuple[int, ...], ends: Sequence[int]) -> tuple[int, ...]:
    """Keep an answer up to and including its first end token; what follows is padding."""
    end = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]
