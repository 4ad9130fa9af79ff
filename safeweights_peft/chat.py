"""Requests and answers rendered by a chat template, and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safeweights_peft.data import Example
from safeweights_peft.errors import DataError
from safeweights_peft.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OTHER_TEXT = "Another text."


def render_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> str:
    """Apply the chat template to a request, up to the cue for the answer."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{tokenizer.name_or_path}: expected a chat template, found none; set "
            "tokenizer.chat_template and save the tokenizer beside the model"
        )
    return _render(tokenizer, [("user", instruction)], add_generation_prompt=True)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[tuple[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Apply the chat template to turns, of a role and a text each; refuse one that drops a text."""

    def apply(texts: Sequence[str]) -> str:
        messages = [
            {"role": role, "content": text} for (role, _), text in zip(turns, texts, strict=True)
        ]
        try:
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        # A template is a program: it may fail in any way, and may raise errors of its own.
        except Exception as error:
            raise DataError(
                f"{tokenizer.name_or_path}: expected a chat template that renders a request, found "
                f"{type(error).__name__}: {' '.join(str(error).split())}; use another template"
            ) from error
        return str(rendered)

    texts = [text for _, text in turns]
    rendered = apply(texts)
    for position, (role, text) in enumerate(turns):
        # A template may trim or rewrite a text. One that wants a list of parts renders nothing.
        if not text.strip() or text.strip() in rendered:
            continue
        if apply([*texts[:position], OTHER_TEXT, *texts[position + 1 :]]) == rendered:
            raise DataError(
                f"{tokenizer.name_or_path}: expected a chat template that renders the text of "
                f"'{role}', found one that drops it; use a template whose messages are texts"
            )
    return rendered


def encode_prompt(tokenizer: PreTrainedTokenizerBase, instruction: str) -> tuple[int, ...]:
    """Render a request and encode it."""
    return _encode(tokenizer, render_prompt(tokenizer, instruction))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    # The template has written the special tokens.
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_answer_tokens: int
) -> list[Example]:
    """Encode requests with their answers."""
    return [
        encode_example(tokenizer, row.instruction, row.output or "", max_answer_tokens)
        for row in rows
    ]


def encode_example(
    tokenizer: PreTrainedTokenizerBase, instruction: str, answer: str, max_answer_tokens: int
) -> Example:
    """Render a request and its answer, and encode them."""
    prompt = render_prompt(tokenizer, instruction)
    conversation = _render(tokenizer, [("user", instruction), ("assistant", answer)])
    if not conversation.startswith(prompt):
        raise DataError(
            f"{tokenizer.name_or_path}: expected a chat template whose conversation begins with "
            "its generation prompt, found another text; use a template without a forced prefix"
        )
    # Newlines after the end of the turn are the template's: no model is asked to write them.
    answer_ids = _encode(tokenizer, conversation[len(prompt) :].rstrip("\n"))
    return Example(_encode(tokenizer, prompt), answer_ids[:max_answer_tokens])
