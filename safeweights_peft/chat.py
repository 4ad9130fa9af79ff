"""The chat side of a model: requests and answers rendered by its template, and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights_peft.data import Example
from safeweights_peft.errors import DataError
from safeweights_peft.settings import ComputeSettings
from safeweights_peft.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[tuple[str, str]]

REQUEST_TOKENS = 2048
"""A longer prompt loses the middle of its request."""

PLAIN = "plain"
PLAIN_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'user' %}{{ 'User: ' + message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}
{{- 'Assistant: ' + message.content + (eos_token or '') + '\\n\\n' }}
{%- else %}{{ message.content + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

OTHER_TEXT, OTHER_ANSWER, OTHER_THOUGHT = "Another text.", "Some answer.", "Some thought."
# How a thought begins and ends, and what stands between these and its text.
THOUGHTS = (("<think>", "</think>", "\n"), ("[THINK]", "[/THINK]", ""))
CHANNELS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "")
_THOUGHTS = (*THOUGHTS, CHANNELS)
THOUGHT_SWITCHES = ("enable_thinking", "thinking")


def read_template(name: str | None) -> str | None:
    """Read a chat template's file, or take the plain one by its name."""
    if name is None or name == PLAIN:
        return PLAIN_TEMPLATE if name else None
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"--chat-template {name}: expected {PLAIN}, or a Jinja file in UTF-8, found "
            f"{type(error).__name__}; check the path"
        ) from error


def list_settings(compute: ComputeSettings) -> dict[str, str]:
    """List what of the chat is set, with a template's text in place of its file."""
    template = compute.chat_template
    texts = {
        "system_prompt": compute.system_prompt,
        "chat_template": template if template == PLAIN else read_template(template),
        "answer_prefix": compute.answer_prefix,
    }
    return {key: text for key, text in texts.items() if text is not None}


class Chat:
    """Renders and encodes requests and answers, and reads what a model answers."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        template: str | None = None,
        answer_prefix: str | None = None,
        positions: int | None = None,
    ) -> None:
        """Take the tokenizer's own template, and find how answers begin, unless both are given."""
        self.tokenizer, self._positions = tokenizer, positions
        self._system_prompt, self._prefix = system_prompt, answer_prefix
        self._template = template
        if template == PLAIN_TEMPLATE and _adds_start(tokenizer):
            self._template = "{{ bos_token }}" + template
        self.cut: set[str] = set()  # requests whose middle was left out

    @property
    def answer_prefix(self) -> str:
        """The text after the template's cue, behind which answers begin."""
        return self._opening[0] if self._prefix is None else self._prefix

    def describe(self) -> str | None:
        """Tell what a thought was skipped by, or what else answers begin after."""
        switches = self._opening[1] if self._prefix is None else {}
        parts = [f"{name}=false" for name in switches]
        parts += [repr(self.answer_prefix)] if self.answer_prefix else []
        return ", ".join(parts) or None

    @cached_property
    def _opening(self) -> tuple[str, dict[str, bool]]:
        """Find what closes or skips a thought: a prefix, or a switch of the template."""
        try:
            return self._find_opening()
        except DataError:  # a template that can't render: asked for a request, it will be refused
            return "", {}

    def _find_opening(self) -> tuple[str, dict[str, bool]]:
        asked = self._add_system([("user", OTHER_TEXT)])
        prompt = self._apply(asked, is_cue=True)
        for name in THOUGHT_SWITCHES:
            switched = self._apply(asked, is_cue=True, **{name: False})
            if switched != prompt:
                is_longer = switched.startswith(prompt)
                return (switched[len(prompt) :], {}) if is_longer else ("", {name: False})
        cue = prompt[prompt.rfind(OTHER_TEXT) :]
        for start, end, gap in THOUGHTS:
            if cue.rstrip().endswith(start):
                return (gap if cue.endswith(gap) else 2 * gap) + end + 2 * gap, {}
        whole = self._apply([*asked, ("assistant", OTHER_ANSWER)])
        place = whole.find(OTHER_ANSWER, len(prompt))
        if whole.startswith(prompt) and whole[len(prompt) : place].strip():
            return whole[len(prompt) : place], {}  # such as the channel of an answer
        for start, end, gap in THOUGHTS:
            if end not in cue and (start in prompt or self._drops(asked, start, end)):
                return start + 2 * gap + end + 2 * gap, {}
        return "", {}

    def _drops(self, asked: Turns, start: str, end: str) -> bool:
        """Tell whether the template drops a thought from an earlier answer."""
        thought = f"{start}{OTHER_THOUGHT}{end}{OTHER_ANSWER}"
        later = self._apply([*asked, ("assistant", thought), ("user", OTHER_TEXT)])
        return OTHER_THOUGHT not in later and OTHER_ANSWER in later

    def render_prompt(self, request: Row | str) -> str:
        """Apply the chat template to a request, up to where the answer begins."""
        switches = self._opening[1] if self._prefix is None else {}
        turns = self._turns(request)
        return self._render(turns, is_cue=True, **switches) + self.answer_prefix

    def encode_prompt(self, request: Row | str, answer_tokens: int = 0) -> tuple[int, ...]:
        """Render a request and encode it; a very long one loses its middle."""
        row = Row(request) if isinstance(request, str) else request
        ids = self.encode(self.render_prompt(row))
        room = REQUEST_TOKENS
        if self._positions is not None:
            room = min(room, self._positions - answer_tokens)
        if len(ids) <= room:
            return ids
        text = self.encode(row.instruction)
        keep = len(text) - (len(ids) - room)
        while keep > 0:
            # The ends: what is asked stands at one of them, whatever is around it.
            ends = text[: (keep + 1) // 2], text[len(text) - keep // 2 :]
            shorter = " … ".join(self.tokenizer.decode(ids) for ids in ends)
            fitting = self.encode(self.render_prompt(replace(row, instruction=shorter)))
            if len(fitting) <= room:
                self.cut.add(row.instruction)
                return fitting
            keep -= max(len(fitting) - room, 1)
        return ids  # which what takes it refuses, if it must

    def encode_rows(self, rows: Sequence[Row], max_answer_tokens: int) -> list[Example]:
        """Encode requests with their answers."""
        return [self.encode_example(row, row.output or "", max_answer_tokens) for row in rows]

    def encode_example(self, request: Row | str, answer: str, max_answer_tokens: int) -> Example:
        """Render a request and its answer, and encode them."""
        prompt = self.render_prompt(request)
        switches = self._opening[1] if self._prefix is None else {}
        whole = self._render([*self._turns(request), ("assistant", answer)], **switches)
        place = len(prompt)
        if not whole.startswith(prompt):
            # Where a thought is closed or a prefix put, the template doesn't write it again.
            place = whole.rfind(answer.strip()) if self.describe() else -1
        if place < 0:
            raise DataError(
                f"{self.tokenizer.name_or_path}: expected a chat template whose conversation "
                "begins with its generation prompt, found another text; use a template without a "
                "forced prefix, or give --answer-prefix"
            )
        # Newlines after the end of the turn are the template's: no model is asked to write them.
        answer_ids = self.encode(whole[place:].rstrip("\n"))[:max_answer_tokens]
        return Example(self.encode_prompt(request, len(answer_ids)), answer_ids)

    def read(self, answer: Example) -> str:
        """Decode an answer, without a thought before it."""
        count = self.count_thought(answer)
        if count is None:
            return ""
        return str(self.tokenizer.decode(answer.answer_ids[count:], skip_special_tokens=True))

    def is_in_thought(self, answer: Example) -> bool:
        """Tell whether an answer was cut before its thought ended."""
        return self.count_thought(answer) is None

    def count_thought(self, answer: Example) -> int | None:
        """Count the tokens of the thought before an answer; None if it doesn't end."""
        ids, decode = answer.answer_ids, self.tokenizer.decode
        said, before = self._read_ends(answer)
        for start, end, _ in _THOUGHTS:
            if said.startswith(start) or before.endswith(start):
                if end not in said:
                    return None
                return next(n for n in range(len(ids) + 1) if end in decode(ids[:n]))
        return 0

    def may_begin_thought(self, answer: Example) -> bool:
        """Tell whether what is written so far is too little to tell a thought from an answer."""
        said, before = self._read_ends(answer)
        starts = [start for start, _, _ in _THOUGHTS]
        return not before.endswith((*starts,)) and any(
            start.startswith(said) and said != start for start in starts
        )

    def _read_ends(self, answer: Example) -> tuple[str, str]:
        """Decode an answer, and the end of its prompt, markup included."""
        decode = self.tokenizer.decode
        return decode(answer.answer_ids).lstrip(), decode(answer.prompt_ids[-16:]).rstrip()

    def _turns(self, request: Row | str) -> Turns:
        row = Row(request) if isinstance(request, str) else request
        return self._add_system([*row.turns, ("user", row.instruction)])

    def _add_system(self, turns: Turns) -> Turns:
        if self._system_prompt is None or any(role == "system" for role, _ in turns):
            return turns
        return [("system", self._system_prompt), *turns]

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode rendered text."""
        # The template has written the special tokens.
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, turns: Turns, **options: Any) -> str:
        """Apply the chat template; refuse one that drops a text."""
        rendered = self._apply(turns, **options)
        for position, (role, text) in enumerate(turns):
            # A template may trim or rewrite a text. One that wants a list of parts renders nothing.
            if not text.strip() or text.strip() in rendered:
                continue
            others = [*turns[:position], (role, OTHER_TEXT), *turns[position + 1 :]]
            if self._apply(others, **options) == rendered:
                raise DataError(
                    f"{self.tokenizer.name_or_path}: expected a chat template that renders the "
                    f"text of '{role}', found one that drops it; use a template whose messages "
                    "are texts"
                )
        return rendered

    def _apply(self, turns: Turns, *, is_cue: bool = False, **switches: bool) -> str:
        tokenizer = self.tokenizer
        if not (self._template or tokenizer.chat_template):
            raise DataError(
                f"{tokenizer.name_or_path}: expected a chat template, found none; give "
                f"--chat-template {PLAIN} if it is a base model, or the template's file"
            )
        try:
            return str(
                tokenizer.apply_chat_template(
                    [{"role": role, "content": text} for role, text in turns],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=is_cue,
                    **switches,
                )
            )
        # A template is a program: it may fail in any way, and may raise errors of its own.
        except Exception as error:
            raise DataError(
                f"{tokenizer.name_or_path}: expected a chat template that renders a request, found "
                f"{type(error).__name__}: {' '.join(str(error).split())}; use another template"
            ) from error


def _adds_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer begins texts with a token of its own."""
    start = tokenizer.bos_token_id
    return start is not None and tokenizer("a")["input_ids"][:1] == [start]
