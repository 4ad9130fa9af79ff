"""Batched greedy answers of a model to requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.chat import encode_prompt
from safeweights_peft.data import Batching, Example, Layout, collate
from safeweights_peft.errors import EvaluationError
from safeweights_peft.modeling.answers import (
    answer_logits,
    find_layout,
    last_columns,
    refuse_failures,
)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 25,
    on_batch: Callable[[Sequence[Example]], None] = lambda _: None,
) -> list[Example]:
    """Let a model answer requests greedily, each on its own."""
    if not instructions:
        raise EvaluationError("prompts: expected at least one request, found none")
    prompts = [Example(encode_prompt(tokenizer, text), ()) for text in instructions]
    _check_room(instructions, prompts, find_layout(model).positions, max_new_tokens)
    return answer_prompts(model, tokenizer, prompts, max_new_tokens, batch_size, on_batch)


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[Sequence[Example]], None] = lambda _: None,
) -> list[Example]:
    """Let a model go on from prompts greedily, each on its own."""
    layout = find_layout(model)
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].prompt_ids))
    # From the model's end tokens alone: its own settings, such as sampling, stay out.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(find_end_tokens(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
    if layout.batching is Batching.ALONE:
        batch_size = 1
    answers: dict[int, Example] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        examples = _answer([prompts[row] for row in rows], model, config, layout)
        answers.update(zip(rows, examples, strict=True))
        on_batch(examples)
    return [answers[row] for row in range(len(prompts))]


def _check_room(
    instructions: Sequence[str], prompts: Sequence[Example], positions: int | None, count: int
) -> None:
    """Refuse a request that leaves no room for its answer among a model's positions."""
    for instruction, prompt in zip(instructions, prompts, strict=True):
        if positions is not None and len(prompt.prompt_ids) + count > positions:
            raise EvaluationError(
                f"request {' '.join(instruction.split())[:40]!r}: expected at most "
                f"{positions - count} tokens, as the model has {positions} positions and its "
                f"answer may take {count}, found {len(prompt.prompt_ids)}; shorten it, or leave "
                "it out"
            )


def find_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Find the tokens with which a model ends an answer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, list) else [ends])


@torch.inference_mode()
def _answer(
    prompts: Sequence[Example], model: PreTrainedModel, config: GenerationConfig, layout: Layout
) -> list[Example]:
    if not layout.generates:
        return [_answer_without_cache(prompt, model, config, layout) for prompt in prompts]
    batch = collate(prompts, config.pad_token_id, layout).to(model.device)
    # `generate` refuses what a model doesn't know.
    knows_columns = "logits_to_keep" in signature(model.forward).parameters
    with refuse_failures(model):
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            **({"logits_to_keep": last_columns(1)} if knows_columns else {}),
        )
    width = batch.input_ids.shape[1]
    return [
        Example(prompt.prompt_ids, _cut(tuple(row), config.eos_token_id))
        for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True)
    ]


def _answer_without_cache(
    prompt: Example, model: PreTrainedModel, config: GenerationConfig, layout: Layout
) -> Example:
    """Predict each token from all before it, where `generate` fails or counts other positions."""
    answer: tuple[int, ...] = ()
    while len(answer) < config.max_new_tokens and not {*answer[-1:]} & {*config.eos_token_id}:
        row = Example(prompt.prompt_ids, (*answer, config.pad_token_id))
        batch = collate([row], config.pad_token_id, layout).to(model.device)
        answer += (int(answer_logits(model, batch)[0, -1].argmax()),)
    return Example(prompt.prompt_ids, answer)


def _cut(ids: tuple[int, ...], ends: Sequence[int]) -> tuple[int, ...]:
    """Keep an answer up to and including its first end token; what follows is padding."""
    end = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]
