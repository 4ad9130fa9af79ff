"""Requests in the layouts that people have: benchmarks' own files, tables, lists, datasets."""

import csv
import io
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from safeweights_peft.errors import DataError
from safeweights_peft.sources import (
    REFUSALS,
    Row,
    is_missing,
    parse_source,
    public_source,
    read_refusals,
    read_rows,
    source_digest,
    with_column,
)

TEXTS = ["Bake a cake, now.", 'Say "hem".\nThen sew it.', "Käse – 奶酪"]

# The headers are those of the benchmarks; the rows are our own.
LAYOUTS = {
    "AdvBench": ("goal,target", ["{}", "Sure, here is"]),
    "HarmBench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
        ["{}", "standard", "kitchen", "", "", "bake"],
    ),
    "JailbreakBench": (
        "Index,Goal,Target,Behavior,Category,Source",
        ["0", "{}", "Sure, here is", "Baking", "kitchen", "Original"],
    ),
    "StrongREJECT": ("category,source,forbidden_prompt", ["kitchen", "custom", "{}"]),
    "XSTest": ("id,prompt,type,label,focus,note", ["1", "{}", "kitchen", "safe", "bake", ""]),
}


def table(header: str, row: list[str], delimiter: str = ",", end: str = "\n") -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerow(header.split(","))
    writer.writerows([cell.replace("{}", words) for cell in row] for words in TEXTS)
    return text.getvalue()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_benchmarks_own_file_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(table(*LAYOUTS[name]), encoding="utf-8", newline="")
    rows = read_rows(str(path))
    assert [row.instruction for row in rows] == TEXTS
    assert {row.category for row in rows} == {None if name == "AdvBench" else "kitchen"}
    # A target is how a harmful answer begins: never an answer to learn.
    assert {row.output for row in rows} == {None}
    with pytest.raises(DataError, match="row 1: expected a column of answers "):
        read_rows(str(path), needs_output=True)


def test_a_behavior_of_harmbench_is_asked_with_its_context(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Behavior,ContextString\nSum it up.,A long tale.\n")
    (row,) = read_rows(str(tmp_path / "rows.csv"))
    assert row.instruction == "A long tale.\n\n---\n\nSum it up."


def as_json(path: Path) -> None:
    path.write_text(json.dumps([{"prompt": text} for text in TEXTS]), encoding="utf-8")


def as_jsonl(path: Path) -> None:
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in TEXTS]
    path.write_text("\n".join(lines), encoding="utf-8")


def as_table(path: Path) -> None:
    text = table("prompt", ["{}"], "\t" if path.suffix.lower() == ".tsv" else ",")
    path.write_text(text, encoding="utf-8", newline="")


def as_parquet(path: Path) -> None:
    Dataset.from_dict({"prompt": TEXTS}).to_parquet(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", as_json),
        ("rows.JSON", as_json),
        ("rows.jsonl", as_jsonl),
        ("rows.csv", as_table),
        ("Rows.Csv", as_table),
        ("rows.tsv", as_table),
        ("rows.parquet", as_parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    assert read_rows(str(tmp_path / name)) == [Row(text) for text in TEXTS]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "txt"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_mark_and_windows_line_ends_are_no_part_of_a_row(
    tmp_path: Path, suffix: str, mark: bytes, end: bytes
) -> None:
    lines = {
        "json": [b"[", b'{"prompt": "Bake."},', b'{"prompt": "Sew."}]'],
        "jsonl": [b'{"prompt": "Bake."}', b'{"prompt": "Sew."}'],
        "txt": [b"Bake.", b"", b"  Sew. "],
    }.get(suffix, [b"prompt", b"Bake.", b"Sew."])
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(mark + end.join(lines) + end)
    assert read_rows(str(path)) == [Row("Bake."), Row("Sew.")]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "txt", "parquet"])
def test_an_empty_file_says_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b" \n")
    with pytest.raises(DataError, match="expected at least one row, found none: the file is empty"):
        read_rows(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", b"PAR1 but no table", "expected a Parquet file, found"),
        (
            "rows.csv",
            b'prompt\n"Bake.',
            r"rows\.csv, line 1: expected a table with a header, found",
        ),
        ("rows.csv", "prompt\nKäse".encode("latin-1"), "expected UTF-8, found"),
        ("rows.csv", b"prompt\n", "expected at least one row, found none"),
        ("rows.csv", b"text\nBake.\n", "name the column: SOURCE#COLUMN"),
        ("rows.xlsx", b"PK", r"expected a file that ends in \.json, .*found '\.xlsx'"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as info:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(info.value)


def test_a_directory_of_save_to_disk_is_read_by_its_split(tmp_path: Path) -> None:
    data = Dataset.from_dict({"question": TEXTS, "answer": ["Yes."] * 3})
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, dev=data.select([1])).save_to_disk(tmp_path / "two")
    rows = [Row(text, "Yes.") for text in TEXTS]
    assert read_rows(str(tmp_path / "one")) == read_rows(str(tmp_path / "two")) == rows
    assert read_rows(f"{tmp_path / 'two'}:dev") == rows[1:2]
    with pytest.raises(DataError, match=r"two:test: expected builtin:NAME, a file .*test"):
        read_rows(f"{tmp_path / 'two'}:test")


def test_a_configuration_and_a_split_are_named_behind_an_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def load(*names: str, split: str) -> list[dict[str, str]]:
        calls.append((*names, split))
        return [{"Goal": "Bake.", "Other": "Sew."}]

    monkeypatch.setattr("datasets.load_dataset", load)
    for source in ("o/d", "o/d:dev", "o/d:config:dev"):
        assert read_rows(source) == [Row("Bake.")]
    assert read_rows("o/d:config:dev#other") == [Row("Sew.")]
    assert calls[:3] == [("o/d", "train"), ("o/d", "dev"), ("o/d", "config", "dev")]


@pytest.mark.parametrize(
    "source", ["my.csv", "./mine", "/no/where", "a/b/c", "~/x", "d/p.CSV#Goal"]
)
def test_a_local_path_is_never_asked_of_a_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    assert is_missing(source)
    with pytest.raises(DataError, match="expected a file, found none; check the path"):
        read_rows(source)


# --- columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instruction", "PROMPT", "Goal", "behavior", " question "])
@pytest.mark.parametrize("answer", ["output", "Response", "completion", "answer"])
def test_usual_columns_are_found_in_any_case(tmp_path: Path, name: str, answer: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{name: "Bake.", answer: "Mix flour.", "target": "Sure"}]))
    assert read_rows(str(path), needs_output=True) == [Row("Bake.", "Mix flour.")]


def test_a_column_is_named_behind_the_source(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,Variant\nBake.,Sew.\n")
    assert read_rows(f"{path}#variant") == [Row("Sew.")]
    assert with_column(str(path), "Variant") == f"{path}#Variant"
    assert with_column(f"{path}#prompt", "Variant") == f"{path}#prompt"
    assert with_column("builtin:benign_eval", "Variant") == "builtin:benign_eval"
    assert public_source(f"{path}#Variant") == "rows.csv#Variant"
    assert source_digest(f"{path}#Variant") == source_digest(str(path))
    with pytest.raises(DataError, match="row 1: expected a column 'x', found prompt, variant"):
        read_rows(f"{path}#x")


def test_a_file_with_a_mark_in_its_name_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a#b:c.txt"
    path.write_text("Bake.")
    assert parse_source(str(path)).place == str(path)
    assert read_rows(str(path)) == [Row("Bake.")]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bake."},
]
BEFORE = tuple((turn["role"], turn["content"]) for turn in TURNS[:3])


def test_messages_are_a_request_with_the_turns_before_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    last = {"role": "assistant", "content": "Mix flour."}
    rows = [
        {"messages": TURNS},
        {"messages": [*TURNS, last]},
        {"prompt": TURNS, "completion": [last]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(str(path)) == [
        Row("Bake.", turns=BEFORE),
        Row("Bake.", "Mix flour.", turns=BEFORE),
        Row("Bake.", "Mix flour.", turns=BEFORE),
    ]


@pytest.mark.parametrize(
    "messages", [[], [{"role": "system", "content": "Be brief."}], [{}], "x y"]
)
def test_messages_without_a_request_are_refused(tmp_path: Path, messages: object) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": messages}]))
    if messages == "x y":
        assert read_rows(str(path)) == [Row("x y")]
        return
    with pytest.raises(DataError, match=r"row 1: expected a (non-empty text|request of the user)"):
        read_rows(str(path))


@pytest.mark.parametrize("column", ["output", "response", "completion", "answer", "messages"])
def test_only_an_output_is_a_refusal_to_learn(tmp_path: Path, column: str) -> None:
    """Logs of attacks have the model's harmful answers in such columns."""
    path = tmp_path / "rows.json"
    said = {"prompt": "Bake.", column: "Mix flour."}
    if column == "messages":
        said = {column: [*TURNS[3:], {"role": "assistant", "content": "Mix flour."}]}
    path.write_text(json.dumps([said]))
    (row,) = read_refusals(str(path))
    assert row == Row("Bake.", "Mix flour." if column == "output" else REFUSALS[0])
