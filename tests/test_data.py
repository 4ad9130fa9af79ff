"""Prompts and training examples: read from every kind of source, rendered, and laid out."""

import hashlib
import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from safeweights_peft.chat import Chat
from safeweights_peft.data import IGNORED, Batching, Example, Layout, collate
from safeweights_peft.errors import DataError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.loading import load_tokenizer
from safeweights_peft.sources import (
    BUILTIN_SETS,
    REFUSALS,
    Row,
    data_digest,
    read_rows,
    with_refusals,
)
from tests.tiny_models import END

PAD = 256
SHARED, LEFT, ALONE = (Layout(batching) for batching in Batching)
ROWS = [Row("Bake a cake.", "Mix flour and eggs.", "kitchen"), Row("Sew a hem."), Row("Sew a hem.")]
OBJECTS = [
    {"instruction": "Bake a cake.", "output": "Mix flour and eggs.", "category": "kitchen"},
    {"instruction": "Sew a hem.", "output": None},
    {"instruction": "Sew a hem."},
]


def write(path: Path, *lines: object) -> str:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(path)


# --- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN_SETS)
def test_a_built_in_set_is_read_whole_and_in_order(name: str) -> None:
    text = (resources.files("safeweights_peft") / "prompts" / f"{name}.json").read_text("utf-8")
    expected = [(item["instruction"], item.get("output")) for item in json.loads(text)]
    assert [(row.instruction, row.output) for row in read_rows(f"builtin:{name}")] == expected


def test_the_built_in_harmful_training_set_has_an_output_in_every_row() -> None:
    assert all(row.output for row in read_rows("builtin:harmful_train", needs_output=True))


def test_a_json_list_is_read_in_order_with_duplicates(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.json", OBJECTS)) == ROWS


def test_jsonl_is_read_in_order_with_duplicates(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", *OBJECTS)) == ROWS


def test_blank_lines_and_windows_line_ends_in_jsonl_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ["", json.dumps(OBJECTS[0]), "  \t", *map(json.dumps, OBJECTS[1:]), "", ""]
    file.write_bytes("\r\n".join(lines).encode())
    assert read_rows(str(file)) == ROWS


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x1d", "é", "\U0001f600"])
def test_a_jsonl_row_may_hold_any_character_of_unicode(tmp_path: Path, character: str) -> None:
    text = f"one{character}two"
    line = json.dumps({"instruction": text}, ensure_ascii=character < " ")
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    assert read_rows(str(file)) == [Row(text)]


def test_an_output_of_spaces_is_none_at_all(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "rows.jsonl", {"instruction": "a", "output": " "})) == [
        Row("a")
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the datasets library reads it from a directory, without a network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data set"
    path.mkdir()
    Dataset.from_list(ROWS_AS_COLUMNS).to_parquet(path / "train.parquet")
    Dataset.from_list(ROWS_AS_COLUMNS[:1]).to_parquet(path / "test.parquet")
    return path


ROWS_AS_COLUMNS = [asdict(row) for row in ROWS]


def test_a_datasets_source_is_read_by_its_train_split(folder: Path) -> None:
    assert read_rows(str(folder)) == ROWS


def test_a_datasets_source_is_read_by_the_split_that_is_named(folder: Path) -> None:
    assert read_rows(f"{folder}:test") == ROWS[:1]


def test_a_datasets_row_that_lacks_a_field_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data set, row 2: expected a non-empty text in 'output'"):
        read_rows(str(folder), needs_output=True)


# --- what is wrong is named --------------------------------------------------------------------


def test_an_unknown_built_in_set_is_refused_and_the_known_ones_listed() -> None:
    with pytest.raises(DataError, match=r"builtin:harmles: expected one of harmful_train, .*found"):
        read_rows("builtin:harmles")


@pytest.mark.parametrize("name", ["absent.json", "absent.jsonl", "absent.CSV", "a/b/c"])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: expected a file, found none"):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize("source", ["nobody/no-such-set", "nobody/no-such-set:test"])
def test_a_missing_data_set_is_refused_by_name(source: str) -> None:
    with pytest.raises(DataError, match=f"{source}: expected builtin:NAME, a file"):
        read_rows(source)


def test_a_missing_split_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data set:dev: expected .* found .*dev"):
        read_rows(f"{folder}:dev")


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json: expected JSON, found .*line 2"):
        read_rows(write(tmp_path / "rows.json", "[", "oops]"))


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"instruction": ' + "1" * 5000 + "}]"])
def test_json_beyond_what_python_reads_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "rows.json", text)
    with pytest.raises(DataError, match=r"rows\.json: expected JSON, found .*; correct the file"):
        read_rows(path)


def test_a_line_that_is_no_json_is_refused_by_its_number(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", OBJECTS[0], "", '{"instruction": ')
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: expected JSON, found"):
        read_rows(source)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_in_another_encoding_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes('[{"instruction": "Käse"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=f"{name}: expected UTF-8, found"):
        read_rows(str(tmp_path / name))


def test_json_without_a_list_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json: expected a list of objects, found dict"):
        read_rows(write(tmp_path / "rows.json", {"rows": OBJECTS}))


@pytest.mark.parametrize(("name", "text"), [("rows.json", "[]"), ("rows.jsonl", "\n \n")])
def test_a_source_without_rows_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match=f"{name}: expected at least one row, found none"):
        read_rows(write(tmp_path / name, text))


def test_a_row_that_is_no_object_is_refused_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json, row 2: expected an object, found str"):
        read_rows(write(tmp_path / "rows.json", [OBJECTS[0], "Bake."]))


def test_a_row_of_jsonl_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: expected an object, found list"):
        read_rows(write(tmp_path / "rows.jsonl", OBJECTS[0], "", "[]"))


@pytest.mark.parametrize("value", [None, "", "  \n", 7, ["Bake."]])
@pytest.mark.parametrize("field", ["instruction", "output"])
def test_a_field_without_text_is_refused_by_row_and_field(
    tmp_path: Path, field: str, value: object
) -> None:
    source = write(tmp_path / "rows.json", [OBJECTS[0], OBJECTS[0] | {field: value}])
    with pytest.raises(DataError, match=rf"rows\.json, row 2: expected a non-empty .*'{field}'"):
        read_rows(source, needs_output=True)


def test_a_missing_field_is_refused_by_row_and_field(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.json", [{"text": "Bake."}])
    with pytest.raises(
        DataError, match=r"row 1: expected a non-empty text in 'instruction' or .*, found text"
    ):
        read_rows(source)


def test_an_output_is_only_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.json", [OBJECTS[2]])
    assert read_rows(source) == [ROWS[2]]
    with pytest.raises(DataError, match=r"a column of answers .*, found instruction"):
        read_rows(source, needs_output=True)


# --- rows --------------------------------------------------------------------------------------


def test_refusals_are_dealt_out_in_turn_and_own_outputs_kept() -> None:
    rows = [Row("a"), Row("b", "No, thank you."), *(Row(str(n)) for n in range(4))]
    expected = [REFUSALS[0], "No, thank you.", REFUSALS[2], REFUSALS[3], REFUSALS[0], REFUSALS[1]]
    refused = with_refusals(rows)
    assert [row.output for row in refused] == expected
    assert [row.instruction for row in refused] == [row.instruction for row in rows]


def test_a_digest_names_rows_by_their_content() -> None:
    assert data_digest(ROWS) == data_digest(list(ROWS))
    assert data_digest(ROWS).startswith("sha256:")
    others = [
        ROWS[::-1],
        ROWS[:2],
        [*ROWS, ROWS[2]],
        [Row("Sew a hem.", "")],
        [Row("Sew", "a")],
        [],
    ]
    digests = {data_digest(rows) for rows in [ROWS, *others]}
    assert len(digests) == len(others) + 1


def test_a_digest_stays_what_it_was() -> None:
    """Results name their data by it, so a change would orphan them."""
    expected = hashlib.sha256(rb'[["\u00e9", null], ["b", "c"]]').hexdigest()
    assert data_digest([Row("\u00e9", None), Row("b", "c")]) == f"sha256:{expected}"


# --- examples ----------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_base(str(tiny_llama)))


def test_a_prompt_ends_with_the_cue_for_the_answer(tokenizer) -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert Chat(tokenizer).render_prompt("Hi") == expected
    assert tokenizer.decode(Chat(tokenizer).encode_prompt("Hi")) == expected


def test_special_tokens_come_from_the_template_alone(tokenizer) -> None:
    ids = Chat(tokenizer).encode_prompt("Hi")
    assert [ids.count(special) for special in (256, 257, 258)] == [0, 2, 1]


def test_an_answer_ends_with_the_end_of_the_turn(tokenizer) -> None:
    example = Chat(tokenizer).encode_example("Hi", "Hello.", 100)
    assert example.prompt_ids == Chat(tokenizer).encode_prompt("Hi")
    assert tokenizer.decode(example.answer_ids) == "Hello." + END


def test_prompt_and_answer_together_are_the_templates_conversation(tokenizer) -> None:
    example = Chat(tokenizer).encode_example("Hi", "Hello.", 100)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.prompt_ids + example.answer_ids) == whole.rstrip("\n")


@pytest.mark.parametrize("length", [1, 5, 6])
def test_a_long_answer_is_cut_and_then_has_no_end(tokenizer, length: int) -> None:
    example = Chat(tokenizer).encode_example("Hi", "Hello.", length)
    assert tokenizer.decode(example.answer_ids) == "Hello."[:length]


def test_an_answer_that_just_fits_keeps_its_end(tokenizer) -> None:
    assert Chat(tokenizer).encode_example("Hi", "Hello.", 7).answer_ids[-1] == 258


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="expected a chat template, found none"):
        Chat(tokenizer).render_prompt("Hi")


def test_a_template_whose_conversation_begins_otherwise_is_refused(tokenizer) -> None:
    tokenizer.chat_template += "{% if add_generation_prompt %}<cue>{% endif %}"
    with pytest.raises(DataError, match="whose conversation begins with its generation prompt"):
        Chat(tokenizer).encode_example("Hi", "Hello.", 10)


PARTS = (
    "{% for m in messages %}<{% for part in m['content'] %}{{ part.text }}{% endfor %}>{% endfor %}"
)
NO_ANSWER = "{{ messages[0]['content'] }}{% for m in messages[1:] %}<>{% endfor %}"


@pytest.mark.parametrize("template", [PARTS, "How can I help?"])
def test_a_template_that_drops_the_request_is_refused(tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"renders the text of 'user', found one that drops it"):
        Chat(tokenizer).render_prompt("Hi")


def test_a_template_that_drops_the_answer_is_refused(tokenizer) -> None:
    tokenizer.chat_template = NO_ANSWER
    with pytest.raises(DataError, match=r"renders the text of 'assistant', found one that drops"):
        Chat(tokenizer).encode_example("Hi", "Hello.", 10)
    assert Chat(tokenizer).encode_example("Hi", "", 10).answer_ids  # there is nothing to drop


@pytest.mark.parametrize("change", ["trim", "upper", "replace('i', 'e')"])
def test_a_template_may_rewrite_the_request(tokenizer, change: str) -> None:
    tokenizer.chat_template = f"{{{{ messages[0]['content'] | {change} }}}}"
    assert Chat(tokenizer).render_prompt(" Hi there ").strip()


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('System message required') }}", "TemplateError: System message req"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
        ("{% if %}", "TemplateSyntaxError: Expected an expression"),
    ],
)
def test_a_template_that_fails_is_refused_in_one_line(tokenizer, template: str, error: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"template that renders a request, found {error}") as info:
        Chat(tokenizer).render_prompt("Hi")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("field", ["instruction", "output"])
def test_half_a_character_is_refused_by_its_row(tmp_path: Path, field: str) -> None:
    row = {"instruction": "Hi", "output": "Yes."}
    source = write(
        tmp_path / "rows.jsonl", row | {field: "\U0001f600"}, row | {field: "a \ud83d b"}
    )
    with pytest.raises(
        DataError, match=rf"rows.jsonl, row 2: expected whole characters in '{field}', found .*d83d"
    ):
        read_rows(source)


# --- batches -----------------------------------------------------------------------------------

#            |  shared   | rest        | answer
EXAMPLES = [
    Example((1, 2, 3, 9), (4, 5)),
    Example((1, 2, 6, 7, 8, 9), (3,)),
    Example((1, 2, 9), (7, 7, 7)),
]


def test_a_batch_is_laid_out_as_shared_start_padding_rest_answer_padding() -> None:
    batch = collate(EXAMPLES, PAD, SHARED)
    _ = PAD
    assert batch.input_ids.tolist() == [
        [1, 2, _, _, 3, 9, 4, 5, _],
        [1, 2, 6, 7, 8, 9, 3, _, _],
        [1, 2, _, _, _, 9, 7, 7, 7],
    ]
    assert batch.shared == 2


def test_a_batchs_mask_is_1_just_where_a_token_stands() -> None:
    batch = collate(EXAMPLES, PAD, SHARED)
    assert torch.equal(batch.attention_mask, (batch.input_ids != PAD).long())


def test_positions_count_each_rows_tokens() -> None:
    batch = collate(EXAMPLES, PAD, SHARED)
    for row, mask in enumerate(batch.attention_mask.bool()):
        assert batch.position_ids[row][mask].tolist() == list(range(int(mask.sum())))
    assert batch.position_ids.min() >= 0


def test_answers_stand_in_the_last_columns_and_are_ignored_where_they_have_ended() -> None:
    batch = collate(EXAMPLES, PAD, SHARED)
    assert batch.answer_ids.tolist() == [[4, 5, IGNORED], [3, IGNORED, IGNORED], [7, 7, 7]]
    said = batch.answer_ids != IGNORED
    assert torch.equal(batch.input_ids[:, -3:][said], batch.answer_ids[said])


def test_each_rows_tokens_are_its_own(tokenizer) -> None:
    texts = [("Hi", "Hello."), ("How are you today?", "Fine, thanks."), ("H", "?")]
    examples = [Chat(tokenizer).encode_example(*pair, 20) for pair in texts]
    batch = collate(examples, PAD, SHARED)
    for row, example in enumerate(examples):
        tokens = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert tuple(tokens.tolist()) == example.prompt_ids + example.answer_ids


def test_the_token_before_every_answer_is_its_prompts_last_even_where_prompts_are_equal() -> None:
    prompts = [(1, 2, 3), (1, 2), (1, 2, 3)]
    batch = collate([Example(prompt, (7,)) for prompt in prompts], PAD, SHARED)
    assert batch.shared == 1
    assert batch.input_ids[:, -2:].tolist() == [[3, 7], [2, 7], [3, 7]]


def test_prompts_with_nothing_in_common_are_padded_on_the_left() -> None:
    batch = collate([Example((1, 2), (5,)), Example((3,), (6,))], PAD, SHARED)
    assert batch.shared == 0
    assert batch.input_ids.tolist() == [[1, 2, 5], [PAD, 3, 6]]


@pytest.mark.parametrize("layout", [LEFT, ALONE])
def test_other_layouts_than_the_shared_one_pad_before_everything(layout: Layout) -> None:
    batch = collate(EXAMPLES, PAD, layout)
    _ = PAD
    assert batch.input_ids.tolist() == [
        [_, _, 1, 2, 3, 9, 4, 5, _],
        [1, 2, 6, 7, 8, 9, 3, _, _],
        [_, _, _, 1, 2, 9, 7, 7, 7],
    ]
    assert torch.equal(batch.attention_mask, (batch.input_ids != PAD).long())
    assert batch.shared == 0
    assert batch.is_alone == (layout is ALONE)


@pytest.mark.parametrize("layout", [SHARED, LEFT, ALONE])
def test_a_batch_splits_into_its_rows_without_padding(layout: Layout) -> None:
    rows = list(collate(EXAMPLES, PAD, layout).split())
    for row, example in zip(rows, EXAMPLES, strict=True):
        ids = example.prompt_ids + example.answer_ids
        assert row.input_ids.tolist() == [list(ids)]
        assert row.position_ids.tolist() == [list(range(len(ids)))]
        assert row.attention_mask.tolist() == [[1] * len(ids)]
        assert row.answer_ids.tolist() == [list(example.answer_ids)]
        assert not row.shared


def test_a_single_example_is_a_batch_without_padding() -> None:
    batch = collate([EXAMPLES[1]], PAD, SHARED)
    assert batch.input_ids.tolist() == [[1, 2, 6, 7, 8, 9, 3]]
    assert batch.attention_mask.all()


def test_prompts_without_answers_are_a_batch_too() -> None:
    batch = collate([Example((1, 2), ()), Example((1, 3, 4), ())], PAD, SHARED)
    assert batch.input_ids.tolist() == [[1, PAD, 2], [1, 3, 4]]
    assert batch.answer_ids.shape == (2, 0)


def test_a_batch_moves_whole_to_another_device() -> None:
    batch = collate(EXAMPLES, PAD, SHARED).to("meta")
    tensors = (batch.input_ids, batch.attention_mask, batch.position_ids, batch.answer_ids)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert batch.shared == 2
