"""Batched answers of a model to requests, greedy or drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from safeweights_peft.chat import Chat
from safeweights_peft.data import Batching, Example, Layout, collate
from safeweights_peft.errors import EvaluationError
from safeweights_peft.modeling.answers import (
    answer_logits,
    find_layout,
    last_columns,
    refuse_failures,
)
from safeweights_peft.sources import Row


def generate_answers(
    model: PreTrainedModel,
    chat: Chat,
    requests: Sequence[Row | str],
    *,
    max_new_tokens: int,
    batch_size: int = 25,
    on_batch: Callable[[Sequence[Example]], None] = lambda _: None,
    seed: int | None = None,
) -> list[Example]:
    """Let a model answer requests, each on its own: greedily, or drawn at temperature 1."""
    if not requests:
        raise EvaluationError("prompts: expected at least one request, found none")
    prompts = [Example(chat.encode_prompt(request, max_new_tokens), ()) for request in requests]
    texts = [request if isinstance(request, str) else request.instruction for request in requests]
    _check_room(texts, prompts, find_layout(model).positions, max_new_tokens)
    return answer_prompts(
        model, chat.tokenizer, prompts, max_new_tokens, batch_size, on_batch, seed
    )


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    on_batch: Callable[[Sequence[Example]], None] = lambda _: None,
    seed: int | None = None,
) -> list[Example]:
    """Let a model go on from prompts, each on its own: greedily, or drawn if there is a seed."""
    layout = find_layout(model)
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].prompt_ids))
    config = _configure(model, tokenizer, max_new_tokens)
    if layout.batching is Batching.ALONE:
        batch_size = 1
    answers: dict[int, Example] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        noise = None if seed is None else _Noise(seed, rows)
        examples = _answer([prompts[row] for row in rows], model, config, layout, noise=noise)
        answers.update(zip(rows, examples, strict=True))
        on_batch(examples)
    return [answers[row] for row in range(len(prompts))]


def stream_answer(
    model: PreTrainedModel,
    chat: Chat,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    on_text: Callable[[str, bool], None],
) -> Example:
    """Let a model answer a prompt greedily; pass on the text as it is written, and if a thought."""
    layout, prompt = find_layout(model), Example(tuple(prompt_ids), ())
    if layout.positions is not None:
        max_new_tokens = min(max_new_tokens, layout.positions - len(prompt_ids))
    if max_new_tokens < 1:
        raise EvaluationError(
            f"conversation: expected fewer tokens than the {layout.positions} positions of the "
            f"model, found {len(prompt_ids)}; begin another"
        )
    config = _configure(model, chat.tokenizer, max_new_tokens)
    streamer = _Streamer(chat, prompt, on_text)
    (answer,) = _answer([prompt], model, config, layout, streamer)
    if not layout.generates:
        streamer.put(torch.tensor(prompt.prompt_ids))
        streamer.put(torch.tensor(answer.answer_ids))
        streamer.end()
    return answer


class _Streamer(BaseStreamer):
    """Passes on finished words, those of a thought apart from those of the answer."""

    def __init__(self, chat: Chat, prompt: Example, on_text: Callable[[str, bool], None]) -> None:
        self._chat, self._prompt, self._is_prompt = chat, prompt, True
        self._ids: list[int] = []
        self._passed = 0  # tokens
        self._thought: int | None = None  # tokens of the thought, once it has ended
        self._words = {
            is_thought: _Words(chat.tokenizer, on_text, is_thought) for is_thought in (True, False)
        }

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        if not self._chat.may_begin_thought(self._answer):
            self._pass_on()

    def end(self) -> None:
        """Pass on what is left."""
        self._pass_on()
        for words in self._words.values():
            words.end()

    @property
    def _answer(self) -> Example:
        return Example(self._prompt.prompt_ids, tuple(self._ids))

    def _pass_on(self) -> None:
        if self._thought is None:
            self._thought = self._chat.count_thought(self._answer)
        end = len(self._ids) if self._thought is None else self._thought
        if thought := self._ids[self._passed : end]:
            self._words[True].put(torch.tensor(thought))
        if answer := self._ids[max(self._passed, end) :]:
            self._words[True].end()
            self._words[False].put(torch.tensor(answer))
        self._passed = len(self._ids)


class _Words(TextStreamer):
    """Passes on finished words instead of printing them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str, bool], None],
        is_thought: bool,
    ) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text, self._is_thought = on_text, is_thought

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take the next piece."""
        if text:
            self._on_text(text, self._is_thought)


class _Noise(LogitsProcessor):
    """Adds Gumbel noise, under which the largest of the logits is a token drawn from them."""

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        # A generator for each row: neither the batch size nor the device changes the noise.
        states = (np.random.SeedSequence((seed, row)).generate_state(1) for row in rows)
        self._generators = [torch.Generator().manual_seed(int(state[0])) for state in states]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.stack(
            [self.draw(row, scores[row]) for row in range(len(self._generators))]
        )

    def draw(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        """Draw the noise of one row's next token, on the logits' device; ``(vocabulary,)``."""
        drawn = torch.empty(logits.shape[-1]).exponential_(generator=self._generators[row])
        return -drawn.clamp_min(torch.finfo(torch.float32).tiny).log().to(logits.device)


def _configure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Make the settings of a greedy answer."""
    # From the model's end tokens alone: its own settings, such as sampling, stay out.
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(find_end_tokens(model, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )


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
    prompts: Sequence[Example],
    model: PreTrainedModel,
    config: GenerationConfig,
    layout: Layout,
    streamer: _Streamer | None = None,
    noise: _Noise | None = None,
) -> list[Example]:
    if not layout.generates:
        return [
            _answer_without_cache(prompt, model, config, layout, noise, row)
            for row, prompt in enumerate(prompts)
        ]
    batch = collate(prompts, config.pad_token_id, layout).to(model.device)
    # `generate` refuses what a model doesn't know.
    knows_columns = "logits_to_keep" in signature(model.forward).parameters
    with refuse_failures(model):
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=config,
            **({"streamer": streamer} if streamer else {}),
            **({"logits_processor": [noise]} if noise else {}),
            **({"logits_to_keep": last_columns(1)} if knows_columns else {}),
        )
    width = batch.input_ids.shape[1]
    return [
        Example(prompt.prompt_ids, _cut(tuple(row), config.eos_token_id))
        for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True)
    ]


def _answer_without_cache(
    prompt: Example,
    model: PreTrainedModel,
    config: GenerationConfig,
    layout: Layout,
    noise: _Noise | None,
    row: int,
) -> Example:
    """Predict each token from all before it, where `generate` fails or counts other positions."""
    answer: tuple[int, ...] = ()
    while len(answer) < config.max_new_tokens and not {*answer[-1:]} & {*config.eos_token_id}:
        example = Example(prompt.prompt_ids, (*answer, config.pad_token_id))
        batch = collate([example], config.pad_token_id, layout).to(model.device)
        logits = answer_logits(model, batch)[0, -1]
        answer += (int((logits if noise is None else logits + noise.draw(row, logits)).argmax()),)
    return Example(prompt.prompt_ids, answer)


def _cut(ids: tuple[int, ...], ends: Sequence[int]) -> tuple[int, ...]:
    """Keep an answer up to and including its first end token; what follows is padding."""
    end = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]
