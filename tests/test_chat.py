"""The chat side: system prompts, templates of base and reasoning models, long requests."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from safeweights_peft.chat import PLAIN, REQUEST_TOKENS, Chat, read_template
from safeweights_peft.data import Example
from safeweights_peft.errors import DataError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.loading import load_tokenizer
from safeweights_peft.sources import Row

# Written for these tests, in the tags of the models that they are named after.

QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' + cue }}{% endif %}"
)
MAGISTRAL = (
    "{% if messages[0].role != 'system' %}[SYSTEM_PROMPT]First think, [THINK]so[/THINK]."
    "[/SYSTEM_PROMPT]{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
GPT_OSS = (
    "<|start|>system<|message|>Reasoning: medium<|end|>"
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else "
    "'<|end|>') }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SWITCHED = (
    "{% if enable_thinking is defined and not enable_thinking %}/no_think {% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CLOSED = "<think>\n\n</think>\n\n"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_base(str(tiny_llama)))


def encode(chat: Chat, text: str) -> tuple[int, ...]:
    return tuple(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("template", "prefix", "before", "end"),
    [
        (QWEN3, CLOSED, f"<|im_start|>assistant\n{CLOSED}", "<|im_end|>"),
        (R1.replace("cue", r"'<think>\n'"), "\n</think>\n\n", f"<|Assistant|>{CLOSED}", "<|end|>"),
        (R1.replace("cue", "'<think>'"), "\n\n</think>\n\n", f"<|Assistant|>{CLOSED}", "<|end|>"),
        (R1.replace("cue", "''"), CLOSED, f"<|Assistant|>{CLOSED}", "<|end|>"),
        (MAGISTRAL, "[THINK][/THINK]", "[/INST][THINK][/THINK]", "</s>"),
        (
            GPT_OSS,
            "<|channel|>final<|message|>",
            "<|start|>assistant<|channel|>final<|message|>",
            "<|return|>",
        ),
    ],
    ids=["Qwen3", "R1", "R1 without a line", "R1 unforced", "Magistral", "gpt-oss"],
)
def test_a_thought_is_closed_before_the_answer(
    tokenizer, template: str, prefix: str, before: str, end: str
) -> None:
    chat = Chat(tokenizer, template=template)
    assert chat.answer_prefix == prefix
    assert chat.describe() == repr(prefix)
    assert chat.render_prompt("Hi").endswith(before)
    example = chat.encode_example("Hi", "Hello.", 100)
    assert example.prompt_ids == encode(chat, chat.render_prompt("Hi"))
    assert chat.tokenizer.decode(example.answer_ids) == "Hello." + end


def test_a_switch_that_rewrites_the_system_prompt_is_used_and_said(tokenizer) -> None:
    chat = Chat(tokenizer, template=SWITCHED)
    assert chat.render_prompt("Hi") == "/no_think <user>Hi</><assistant>"
    assert chat.describe() == "enable_thinking=false"
    assert tokenizer.decode(chat.encode_example("Hi", "Yes.", 99).answer_ids) == "Yes.</>"


def test_a_switch_may_also_close_the_thought_in_the_cue_alone(tokenizer) -> None:
    closed = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    cue = "{% if add_generation_prompt %}<assistant>"
    chat = Chat(tokenizer, template=SWITCHED.replace(cue, cue + closed))
    assert chat.render_prompt("Hi") == "/no_think <user>Hi</><assistant><think></think>"
    assert tokenizer.decode(chat.encode_example("Hi", "Yes.", 99).answer_ids) == "Yes.</>"


def test_a_template_without_thoughts_is_left_alone(tokenizer) -> None:
    chat = Chat(tokenizer)
    assert chat.answer_prefix == ""
    assert chat.describe() is None
    messages = [{"role": "user", "content": "Hi"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.render_prompt("Hi") == expected


@pytest.mark.parametrize("template", [QWEN3, R1.replace("cue", r"'<think>\n'"), GPT_OSS])
def test_a_prefix_that_is_given_stands_for_the_one_that_is_found(tokenizer, template: str) -> None:
    bare, sure = (Chat(tokenizer, template=template, answer_prefix=text) for text in ("", "Sure: "))
    assert bare.describe() is None
    assert sure.render_prompt("Hi") == bare.render_prompt("Hi") + "Sure: "
    assert tokenizer.decode(sure.encode_example("Hi", "Yes.", 4).answer_ids) == "Yes."


@pytest.mark.parametrize(
    ("template", "text", "answer", "is_cut"),
    [
        (QWEN3, "<think>\nHm.\n</think>\n\nNo.", "\n\nNo.", False),
        (QWEN3, "<think>\nHm, I could", "", True),
        (QWEN3, "A <think> is a tag.", "A <think> is a tag.", False),
        (R1.replace("cue", r"'<think>\n'"), "Hm.\n</think>\n\nNo.", "\n\nNo.", False),
        (R1.replace("cue", r"'<think>\n'"), "Hm, I could refuse", "", True),
        (MAGISTRAL, "[THINK]Hm.[/THINK]No.", "No.", False),
        (GPT_OSS, "<|channel|>analysis<|message|>Hm.<|end|>", "", True),
        (
            GPT_OSS,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>No.",
            "No.",
            False,
        ),
    ],
)
def test_an_answer_is_read_without_its_thought(
    tokenizer, template: str, text: str, answer: str, is_cut: bool
) -> None:
    chat = Chat(tokenizer, template=template, answer_prefix="")
    example = Example(chat.encode_prompt("Hi"), encode(chat, text))
    assert (chat.read(example), chat.is_in_thought(example)) == (answer, is_cut)


# --- system prompts, turns, base models --------------------------------------------------------


def test_a_system_prompt_stands_before_every_request_that_has_none(tokenizer) -> None:
    chat = Chat(tokenizer, "Be brief.", R1.replace("cue", "''"), "")
    assert chat.render_prompt("Hi") == "Be brief.<|User|>Hi<|Assistant|>"
    turns = (("user", "Hi"), ("assistant", "Yes?"))
    row = Row("Bake.", turns=turns)
    expected = "<|User|>Hi<|Assistant|>Yes?<|end|><|User|>Bake.<|Assistant|>"
    assert chat.render_prompt(row) == "Be brief." + expected
    own = replace(row, turns=(("system", "Be kind."), *turns))
    assert chat.render_prompt(own) == "Be kind." + expected


def test_a_template_that_takes_no_system_prompt_is_refused(tokenizer) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    with pytest.raises(DataError, match="TemplateError: no system"):
        Chat(tokenizer, "Be brief.", template).encode_prompt("Hi")


def test_a_base_model_has_a_plain_template(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="give --chat-template plain if it is a base model"):
        Chat(tokenizer).encode_prompt("Hi")
    chat = Chat(tokenizer, "Be brief.", read_template(PLAIN))
    assert chat.render_prompt("Hi").endswith("Be brief.\n\nUser: Hi\n\nAssistant:")
    example = chat.encode_example("Hi", "Hello.", 100)
    assert tokenizer.decode(example.answer_ids) == " Hello." + tokenizer.eos_token
    assert chat.describe() is None


def test_a_template_is_read_from_a_file_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(QWEN3, encoding="utf-8")
    assert read_template(str(path)) == QWEN3
    assert read_template(None) is None
    with pytest.raises(DataError, match=r"--chat-template .*absent: expected plain, or a Jinja"):
        read_template(str(tmp_path / "absent"))


# --- long requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "answer", "room"), [(None, 32, REQUEST_TOKENS), (200, 50, 150)]
)
def test_a_long_request_loses_its_middle(
    tokenizer, positions: int | None, answer: int, room: int
) -> None:
    chat = Chat(tokenizer, positions=positions)
    text = "Begin. " + "so " * 2000 + "The end."
    ids = chat.encode_prompt(text, answer)
    assert room - 8 <= len(ids) <= room
    rendered = tokenizer.decode(ids)
    assert "Begin. so" in rendered
    assert " … " in rendered
    assert "so The end." in rendered
    assert chat.cut == {text}
    assert chat.encode_prompt("Hi", answer) == Chat(tokenizer).encode_prompt("Hi")
    assert chat.cut == {text}
    example = chat.encode_example(text, "Yes.", answer)
    assert len(example.prompt_ids) + len(example.answer_ids) <= room + answer
