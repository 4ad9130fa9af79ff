"""Requests and answers: read from files, rendered by a chat template, laid out in batches."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safeweights_peft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin:"
BUILTIN_SETS = ("harmful_train", "harmful_eval", "benign_train", "benign_eval")
FILE_SUFFIXES = (".json", ".jsonl")
CATEGORY_COLUMNS = ("category", "Category", "SemanticCategory", "type")
"""Where data sets of requests have the category of a row."""
IGNORED = -100
OTHER_TEXT = "Another text."
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "Sorry, but I won't help with this.",
    "I'm not able to help with that.",
)


@dataclass(frozen=True)
class Row:
    """One request of a user, with the answer to learn if there is one."""

    instruction: str
    output: str | None = None
    category: str | None = None  # rates are told by it too


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


def read_rows(source: str, *, needs_output: bool = False) -> list[Row]:
    """Read requests from a built-in set, a JSON or JSONL file, or the datasets library."""
    raw = _read_raw(source)
    rows = [_row(item, f"{source}, row {position}", needs_output) for position, item in raw]
    if not rows:
        raise DataError(f"{source}: expected at least one row, found none; give another source")
    return rows


def _is_file(source: str) -> bool:
    return source.startswith(BUILTIN) or Path(source).suffix in FILE_SUFFIXES


def _read_raw(source: str) -> list[tuple[int, Any]]:
    if _is_file(source):
        return _parse(_read_bytes(source), source, lines=source.endswith(".jsonl"))
    return _read_datasets(source)


def _read_bytes(source: str) -> bytes:
    """Read the file of a source, of ours or the user's."""
    if source.startswith(BUILTIN):
        name = source.removeprefix(BUILTIN)
        if name not in BUILTIN_SETS:
            raise DataError(
                f"{source}: expected one of {', '.join(BUILTIN_SETS)}, found {name!r}; "
                "name one of them, or give a file"
            )
        return (resources.files("safeweights_peft") / "prompts" / f"{name}.json").read_bytes()
    if not Path(source).is_file():
        raise DataError(f"{source}: expected a file, found none; check the path")
    return Path(source).read_bytes()


def source_digest(source: str) -> str:
    """Digest a source's content."""
    if not _is_file(source):
        return data_digest(read_rows(source))
    # The file's bytes, not its rows, so that others can check the digest with `sha256sum`.
    return f"sha256:{hashlib.sha256(_read_bytes(source)).hexdigest()}"


def _parse(content: bytes, source: str, *, lines: bool) -> list[tuple[int, Any]]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8, found {error}; save it as UTF-8") from error
    if lines:  # at "\n" alone: JSON texts may hold the other line ends of Unicode as they are
        numbered = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(n, _parse_json(line, f"{source}, row {n}")) for n, line in numbered]
    rows = _parse_json(text, source)
    if not isinstance(rows, list):
        raise DataError(
            f"{source}: expected a list of objects, found {type(rows).__name__}; "
            "wrap the rows in a list, or use .jsonl with one object a line"
        )
    return list(enumerate(rows, 1))


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    # Not only JSONDecodeError: a number may have too many digits, and lists too many lists inside.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON, found {error}; correct the file") from error


def _read_datasets(source: str) -> list[tuple[int, Any]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        dataset = load_dataset(name, split=split or "train")
    except Exception as error:
        raise DataError(
            f"{source}: expected {BUILTIN}NAME, a .json or .jsonl file, or a datasets id, "
            f"found {type(error).__name__}: {error}; check the spelling and the network"
        ) from error
    return list(enumerate(dataset, 1))


def _row(item: Any, where: str, needs_output: bool) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected an object, found {type(item).__name__}; correct it")
    for field in ("instruction", "output"):
        value, is_needed = item.get(field), needs_output or field == "instruction"
        if is_needed and (not isinstance(value, str) or not value.strip()):
            raise DataError(
                f"{where}: expected a non-empty text in '{field}', found {value!r}; "
                f"give every row the field '{field}'"
            )
        # JSON may hold half a character, which no tokenizer reads and no file takes.
        if isinstance(value, str) and (half := LONE_SURROGATE.search(value)):
            raise DataError(
                f"{where}: expected whole characters in '{field}', found half of one, "
                f"{half.group()!r}; correct the row"
            )
    output = item.get("output")
    has_output = isinstance(output, str) and output.strip()
    categories = (item.get(column) for column in CATEGORY_COLUMNS)
    category = next((text for text in categories if isinstance(text, str) and text.strip()), None)
    return Row(item["instruction"], output if has_output else None, category)


def with_refusals(rows: Sequence[Row]) -> list[Row]:
    """Give each request without an answer a short refusal, in turn."""
    return [
        row if row.output else Row(row.instruction, REFUSALS[position % len(REFUSALS)])
        for position, row in enumerate(rows)
    ]


def data_digest(rows: Sequence[Row]) -> str:
    """Digest rows in their order."""
    text = json.dumps([[row.instruction, row.output] for row in rows])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


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
