"""Sources of requests: built-in sets, files of any usual kind, and what `datasets` loads."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from safeweights_peft.errors import DataError
from safeweights_peft.fetching import public_name

BUILTIN = "builtin:"
BUILTIN_SETS = ("harmful_train", "harmful_eval", "benign_train", "boundary_train", "benign_eval")
LOOKS_HARMFUL = "looks-harmful"  # the category of benign requests near the boundary
# In order: JailbreakBench has the request in "Goal", and a title of it in "Behavior".
REQUEST_COLUMNS = (
    *("instruction", "prompt", "forbidden_prompt", "goal", "question", "behavior"),
    "messages",
)
# "target" is none of them: benchmarks have there how a harmful answer begins.
ANSWER_COLUMNS = ("output", "response", "completion", "answer", "messages")
CATEGORY_COLUMNS = ("category", "semanticcategory", "type")
CONTEXT_COLUMN = "contextstring"  # HarmBench's, of which a behavior speaks
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
    turns: tuple[tuple[str, str], ...] = ()  # before the request: roles and texts


class Source(NamedTuple):
    """Where requests are: PLACE[:CONFIG][:SPLIT][#COLUMN]."""

    place: str  # builtin:NAME, a path, or a Hub id
    parts: tuple[str, ...] = ()  # of a dataset: a split, or a configuration and a split
    column: str | None = None


def parse_source(source: str) -> Source:
    """Split a source; what exists by its whole name is that."""
    if Path(source).exists():
        return Source(source)
    place, mark, column = source.rpartition("#")
    if mark:
        return parse_source(place)._replace(column=column)
    if source.startswith(BUILTIN) or is_file_name(source):
        return Source(source)
    place, *parts = source.split(":")
    return Source(place, tuple(parts))


def is_file_name(source: str) -> bool:
    """Tell whether a source ends as the files do that are read here."""
    # A chat template is kept among a run's files, though no requests are in it.
    return Path(source.partition("#")[0]).suffix.lower() in {*_READERS, ".jinja"}


def is_missing(source: str) -> bool:
    """Tell whether a source looks like a path, and nothing is there: no hub is asked for it."""
    place = parse_source(source).place
    if place.startswith(BUILTIN) or Path(place).exists():
        return False
    is_path = is_file_name(place) or place.startswith((".", "/", "~"))
    return is_path or not _HUB_ID.fullmatch(place)


def with_column(source: str, column: str | None) -> str:
    """Name the column of requests in a source that names none itself."""
    is_named = source.startswith(BUILTIN) or parse_source(source).column is not None
    return source if column is None or is_named else f"{source}#{column}"


def public_source(source: str) -> str:
    """Name a source without its place."""
    place, _, column = parse_source(source)
    if Path(place).exists():
        return with_column(public_name(place), column)
    return os.path.basename(source) if is_file_name(source) else source


def read_rows(
    source: str, *, needs_output: bool = False, answers: Sequence[str] = ANSWER_COLUMNS
) -> list[Row]:
    """Read requests, with their answers where they have one, from any source."""
    place, _, column = parse_source(source)
    rows = [
        _row(item, f"{place}, row {position}", column, needs_output, answers)
        for position, item in _read_raw(source)
    ]
    if not rows:
        raise DataError(f"{place}: expected at least one row, found none; give another source")
    return rows


def source_digest(source: str) -> str:
    """Digest a source's content."""
    place = parse_source(source).place
    if not (place.startswith(BUILTIN) or Path(place).is_file()):
        return data_digest(read_rows(source))
    # The file's bytes, not its rows, so that others can check the digest with `sha256sum`.
    return f"sha256:{hashlib.sha256(_read_bytes(place)).hexdigest()}"


def _read_raw(source: str) -> Iterator[tuple[int, Any]]:
    place = parse_source(source).place
    if is_missing(source):
        raise DataError(f"{place}: expected a file, found none; check the path")
    if place.startswith(BUILTIN):
        return _read_json(_read_bytes(place), place)
    if not Path(place).is_file():
        return _read_datasets(source)
    if not (content := _read_bytes(place)).strip():
        raise DataError(
            f"{place}: expected at least one row, found none: the file is empty; give another "
            "source"
        )
    suffix = Path(place).suffix.lower()
    if suffix not in _READERS:
        raise DataError(
            f"{place}: expected a file that ends in {', '.join(_READERS)}, found {suffix!r}; "
            "rename it"
        )
    return _READERS[suffix](content, place)


def _read_bytes(place: str) -> bytes:
    """Read a file, of ours or the user's."""
    if not place.startswith(BUILTIN):
        return Path(place).read_bytes()
    name = place.removeprefix(BUILTIN)
    if name not in BUILTIN_SETS:
        raise DataError(
            f"{place}: expected one of {', '.join(BUILTIN_SETS)}, found {name!r}; "
            "name one of them, or give a file"
        )
    return (resources.files("safeweights_peft") / "prompts" / f"{name}.json").read_bytes()


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")  # some programs begin a file with a mark of it
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: expected UTF-8, found {error}; save it as UTF-8") from error


def _read_json(content: bytes, place: str) -> Iterator[tuple[int, Any]]:
    rows = _parse_json(_decode(content, place), place)
    if not isinstance(rows, list):
        raise DataError(
            f"{place}: expected a list of objects, found {type(rows).__name__}; "
            "wrap the rows in a list, or use .jsonl with one object a line"
        )
    return enumerate(rows, 1)


def _read_jsonl(content: bytes, place: str) -> Iterator[tuple[int, Any]]:
    for number, line in _read_lines(content, place):
        yield number, _parse_json(line, f"{place}, row {number}")


def _read_txt(content: bytes, place: str) -> Iterator[tuple[int, Any]]:
    for number, line in _read_lines(content, place):
        yield number, {REQUEST_COLUMNS[0]: line.strip()}


def _read_lines(content: bytes, place: str) -> Iterator[tuple[int, str]]:
    # At "\n" alone: texts may hold the other line ends of Unicode as they are.
    lines = _decode(content, place).split("\n")
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    # Not only JSONDecodeError: a number may have too many digits, and lists too many lists inside.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON, found {error}; correct the file") from error


def _read_table(delimiter: str) -> Callable[[bytes, str], Iterator[tuple[int, Any]]]:
    def read(content: bytes, place: str) -> Iterator[tuple[int, Any]]:
        # Line ends are the module's to find: within quotes, some are part of a text.
        text = io.StringIO(_decode(content, place), newline="")
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        try:
            yield from enumerate(reader, 1)
        except csv.Error as error:
            raise DataError(
                f"{place}, line {reader.line_num}: expected a table with a header, found {error}; "
                "correct the file"
            ) from error

    return read


def _read_parquet(content: bytes, place: str) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{place}: expected a Parquet file, found {' '.join(str(error).split())[:200]}; "
            "fetch it again"
        ) from error
    return enumerate(rows, 1)


_READERS: Mapping[str, Callable[[bytes, str], Iterator[tuple[int, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_table(","),
    ".tsv": _read_table("\t"),
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}


def _read_datasets(source: str) -> Iterator[tuple[int, Any]]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    place, parts, _ = parse_source(source)
    *configs, split = parts or ("train",)
    try:
        if len(configs) > 1:
            raise ValueError(f"{len(parts)} parts behind the name")
        if (
            any((Path(place) / f"dataset_{kind}.json").is_file() for kind in ("info", "dict"))
            or (Path(place) / "state.json").is_file()
        ):
            dataset = load_from_disk(place)
            dataset = dataset[split] if isinstance(dataset, DatasetDict) else dataset
        else:
            # From its fourth version on, the library runs no code of a dataset.
            dataset = load_dataset(place, *configs, split=split)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{source}: expected {BUILTIN}NAME, a file ({', '.join(_READERS)}), or a datasets id, "
            f"as ID:SPLIT or ID:CONFIG:SPLIT, found {type(error).__name__}: {reason}; check the "
            "spelling and the network"
        ) from error
    return enumerate(dataset, 1)


def _row(
    item: Any, where: str, column: str | None, needs_output: bool, answers: Sequence[str]
) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected an object, found {type(item).__name__}; correct it")
    columns = {str(key).strip().lower(): key for key in item}
    fields = {name: item[key] for name, key in columns.items()}
    name = _find_column(fields, column, where)
    turns = _read_turns(fields.get(name))
    answer = turns.pop()[1] if turns and turns[-1][0] == "assistant" else None
    if "messages" not in answers:
        answer = None
    if turns and turns[-1][0] != "user":
        raise DataError(
            f"{where}: expected a request of the user as the last turn, or before the last answer, "
            f"found one of {turns[-1][0]!r}; correct the row"
        )
    request = turns.pop()[1] if turns else fields.get(name)
    request = _check_text(request, columns.get(name, name), where, is_needed=True)
    context = fields.get(CONTEXT_COLUMN)
    if name == "behavior" and isinstance(context, str) and context.strip():
        request = f"{context}\n\n---\n\n{request}"  # as HarmBench itself asks
    key = next((key for key in answers if fields.get(key) and key != name), "output")
    if answer is None:
        answer = fields.get(key)
        if said := _read_turns(answer):
            answer = said[-1][1]
    if needs_output and answer is None and not fields.keys() & set(answers):
        raise DataError(
            f"{where}: expected a column of answers ({', '.join(answers)}), found "
            f"{', '.join(map(str, item))[:200]}; give rows with one"
        )
    answer = _check_text(answer, columns.get(key, key), where, is_needed=needs_output)
    texts = (fields.get(column) for column in CATEGORY_COLUMNS)
    category = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    return Row(request, answer or None, category, tuple(turns))


def _find_column(fields: Mapping[str, Any], column: str | None, where: str) -> str:
    """Find the column of the request, by lower case."""
    if column is not None:
        if column.lower() in fields:
            return column.lower()
        raise DataError(
            f"{where}: expected a column {column!r}, found {', '.join(fields)[:200]}; name one of "
            "them behind #"
        )
    if found := next((name for name in REQUEST_COLUMNS if name in fields), None):
        return found
    raise DataError(
        f"{where}: expected a non-empty text in '{REQUEST_COLUMNS[0]}' or "
        f"{', '.join(REQUEST_COLUMNS[1:])}, found {', '.join(fields)[:200] or 'no column'}; name "
        "the column: SOURCE#COLUMN"
    )


def _read_turns(value: Any) -> list[tuple[str, str]]:
    """Read a conversation: a list of messages with a role and a text each; else nothing."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return []
    turns = [(turn.get("role"), turn.get("content")) for turn in value]
    return turns if all(isinstance(part, str) for turn in turns for part in turn) else []


def _check_text(value: Any, column: str, where: str, *, is_needed: bool) -> str:
    """Return a text, empty where there is none and none is needed."""
    has_text = isinstance(value, str) and value.strip()
    if is_needed and not has_text:
        raise DataError(
            f"{where}: expected a non-empty text in '{column}', found {repr(value)[:80]}; "
            f"give every row the field '{column}'"
        )
    # JSON may hold half a character, which no tokenizer reads and no file takes.
    if isinstance(value, str) and (half := LONE_SURROGATE.search(value)):
        raise DataError(
            f"{where}: expected whole characters in '{column}', found half of one, "
            f"{half.group()!r}; correct the row"
        )
    return value if has_text else ""


def read_refusals(source: str) -> list[Row]:
    """Read harmful requests with a refusal each: their own `output`, or one of ours."""
    # No other answer is taken for a refusal: logs of harmful answers have them in the same columns.
    return with_refusals(read_rows(source, answers=ANSWER_COLUMNS[:1]))


def with_refusals(rows: Sequence[Row]) -> list[Row]:
    """Give each request without an answer a short refusal, in turn."""
    return [
        row if row.output else replace(row, output=REFUSALS[position % len(REFUSALS)])
        for position, row in enumerate(rows)
    ]


def data_digest(rows: Sequence[Row]) -> str:
    """Digest rows in their order."""
    content = [[row.instruction, row.output, *([row.turns] if row.turns else [])] for row in rows]
    text = json.dumps(content)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
