"""Encoded requests and answers, laid out in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from safeweights_peft.errors import DataError

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A conversation of one turn as token ids."""

    prompt_ids: tuple[int, ...]  # with the cue for the answer
    answer_ids: tuple[int, ...]  # with the end of the turn, unless the answer was cut


class Batching(StrEnum):
    """Ways to run several rows so that each gets the logits that it gets alone."""

    SHARED = "shared"  # the start that prompts share once for all; padding behind it
    LEFT = "left"  # padding before everything, for what counts columns or keeps a state
    ALONE = "alone"  # one row after another


@dataclass(frozen=True)
class Layout:
    """What a model needs of a batch; `modeling.answers.find_layout` finds it."""

    batching: Batching
    positions: int | None = None  # tokens that a row may have; None if any number
    generates: bool = True  # whether the model's own `generate` predicts what its forward does


@dataclass(frozen=True)
class Batch:
    """B examples side by side, so that all answers start in the same column."""

    # A row is: the tokens with which all prompts begin (the template's system prompt), padding,
    # the rest of the prompt (its last token at least), the answer, padding. So logits of answers
    # are one slice, and the shared start can be computed once. In other layouts than the shared
    # one that start is empty.
    input_ids: torch.Tensor  # (B, P + A)
    attention_mask: torch.Tensor  # (B, P + A), 0 at padding
    position_ids: torch.Tensor  # (B, P + A), counted over each row's own tokens
    answer_ids: torch.Tensor  # (B, A), `IGNORED` after an answer's end
    shared: int  # columns at the start that are the same in all rows
    is_alone: bool = False  # whether each row must run by itself

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            answer_ids=self.answer_ids.to(device),
        )

    def split(self) -> Iterator[Batch]:
        """Yield each row as a batch without padding."""
        for row, mask in enumerate(self.attention_mask.bool()):
            answer = self.answer_ids[row : row + 1]
            yield Batch(
                self.input_ids[row : row + 1, mask],
                self.attention_mask[row : row + 1, mask],
                self.position_ids[row : row + 1, mask],
                answer[:, answer[0] != IGNORED],
                shared=0,
                is_alone=True,
            )


def shuffle_endlessly(examples: Sequence[Example], generator: torch.Generator) -> Iterator[Example]:
    """Yield examples in random order, all of them before any comes again."""
    while True:
        for position in torch.randperm(len(examples), generator=generator).tolist():
            yield examples[position]


def collate(examples: Sequence[Example], pad_token_id: int, layout: Layout) -> Batch:
    """Lay examples side by side so that all answers start in the same column."""
    check_lengths(examples, layout.positions)
    shared = 0
    if layout.batching is Batching.SHARED:
        shared = _shared_start([example.prompt_ids for example in examples])
    width = max(len(example.prompt_ids) for example in examples)
    length = max(len(example.answer_ids) for example in examples)
    input_ids = torch.full((len(examples), width + length), pad_token_id)
    mask = torch.zeros_like(input_ids)
    answers = torch.full((len(examples), length), IGNORED)
    for row, example in enumerate(examples):
        rest = example.prompt_ids[shared:] + example.answer_ids
        start, end = width + shared - len(example.prompt_ids), width + len(example.answer_ids)
        input_ids[row, :shared] = torch.tensor(example.prompt_ids[:shared])
        input_ids[row, start:end] = torch.tensor(rest)
        mask[row, :shared] = mask[row, start:end] = 1
        answers[row, : len(example.answer_ids)] = torch.tensor(example.answer_ids)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Batch(
        input_ids, mask, positions, answers, shared, is_alone=layout.batching is Batching.ALONE
    )


def check_lengths(examples: Sequence[Example], positions: int | None) -> None:
    """Refuse a row for which a model has too few positions."""
    for example in examples:
        prompt, answer = len(example.prompt_ids), len(example.answer_ids)
        # Past the end of the table a CPU raises IndexError, and a GPU is lost to the process.
        if positions is not None and prompt + answer > positions:
            raise DataError(
                f"a request: expected at most {positions} tokens with its answer, all the "
                f"positions that the model has, found {prompt} + {answer}; shorten it, or leave "
                "it out"
            )


def _shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """Count the leading tokens that all prompts share, but leave each a token of its own."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    differing = (n for n, tokens in enumerate(columns) if len(set(tokens)) > 1)
    return next(differing, min(len(prompt) for prompt in prompts) - 1)
