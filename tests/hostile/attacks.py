"""The attack list: each entry breaks a sound adapter in one way, and says what must be told of it.

``message`` is a pattern of what every strict reader says, naming the file or the tensor. ``stage``
is how much has to be read to see it: the config, the header of the tensors' file, or the tensors.
"""

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import zstandard

from safeweights_peft.delta import DTYPES
from tests.hostile.edits import (
    CONFIG,
    CONTENT,
    INDICES,
    OTHER,
    TENSORS,
    VICTIM,
    Config,
    Edit,
    add,
    block,
    bomb,
    coded,
    config,
    drop,
    entry,
    float_planes,
    frame,
    gap_frame,
    head,
    header,
    header_text,
    hole,
    hole_of_rows,
    insert,
    link,
    missing,
    only_pickles,
    overlap,
    put,
    raw,
    record,
    rename,
    repeat,
    replace,
    sized,
    swap,
    top,
    twice_in_header,
    without,
)


class Stage(IntEnum):
    """How much of an adapter has to be read to see what is wrong with it."""

    CONFIG = 1
    HEADER = 2
    TENSORS = 3


@dataclass(frozen=True)
class Attack:
    """One way to break an adapter.

    Attributes:
        name: What it is, for a test's id.
        edit: What it does to a copy of a sound adapter.
        message: Pattern of what a reader must say; it names the file or the tensor.
        stage: How much has to be read to see it.
        kinds: Which adapters it is tried on.
    """

    name: str
    edit: Edit
    message: str
    stage: Stage
    kinds: tuple[str, ...] = ("patch", "map")


def _list(stage: Stage, file: str, *attacks: tuple) -> list[Attack]:
    place = rf"{file.replace('.', '[.]')}.*"
    return [
        Attack(name, edit, place + message, stage, *rest) for name, edit, message, *rest in attacks
    ]


def double_block(content: Config) -> None:
    """Let two blocks hold the same entries."""
    content["tensors"][VICTIM]["blocks"] *= 2


def infinite(text: bytes) -> bytes:
    """Give a scale that JSON libraries read as infinity."""
    return text.replace(b'"scale": 1.0', b'"scale": 1e999')


def selected(value: bytes) -> Callable[[bytes], bytes]:
    """Put a value where the config is free to hold any."""
    return lambda text: text.replace(b'"selection": {}', b'"selection": {"a": ' + value + b"}")


def wide(folder: Path) -> None:
    """Say of the victim that it needs indices of 64 bits."""
    record(shape=[2**31])(folder)


def one(array: np.ndarray) -> list[bytes]:
    """Compress all bytes as one frame."""
    return [frame(array.tobytes())]


def three(array: np.ndarray) -> list[bytes]:
    """Forget the highest bytes."""
    return [frame(plane) for plane in float_planes(array)[:3]]


def nans(array: np.ndarray) -> list[bytes]:
    """Hide a NaN in planes."""
    array[2] = np.nan
    return [frame(plane) for plane in float_planes(array)]


def with_dictionary(content: bytes) -> bytes:
    """Compress with a dictionary that the reader lacks."""
    samples = [bytes([n % 7, n % 5, n % 3]) * 20 for n in range(200)]
    return frame(content, dict_data=zstandard.train_dictionary(512, samples), write_dict_id=True)


def streams(change: Callable[[Config], object]) -> Edit:
    """Store gaps, then change which streams the record has."""

    def apply(folder: Path) -> None:
        gap_frame(frame)(folder)
        config(lambda content: change(content["tensors"][VICTIM]["streams"]))(folder)

    return apply


SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
WIDE_FRAME = b"\x28\xb5\x2f\xfd\x40\xa8" + (77).to_bytes(2, "little") + b"\x01\0\0"
"""A frame of a window of 2**31 bytes, with the content size 77 + 256, and an empty block."""

RECORD = f"{VICTIM}: "
BAD_KEY = f"{RECORD}key: expected printable names"
SMUGGLED = "base_model.model.model.layers.0.mlp.up_proj.weight"
SCORES_OF_OTHER = "base_model.model.model.norm.safeweights_scores__bias"
CONFIG_FIELDS = _list(
    Stage.CONFIG,
    CONFIG,
    ("version 2", top(format_version=2), "format_version: expected 1, found 2"),
    ("version true", top(format_version=True), "format_version: expected int, found bool"),
    ("version text", top(format_version="1"), "format_version: expected"),
    ("version huge", top(format_version=10**4000), "format_version: expected 1, found 10000"),
    ("no version", without("format_version"), "format_version: expected int, found nothing"),
    ("no method", without("peft_type"), "peft_type: expected .*SAFEWEIGHTS"),
    ("another mode", top(mode="exec"), "mode: expected one of set, spa, found 'exec'"),
    ("a patch that calls itself a map", top(mode="spa"), "expected no merged_digest", ("patch",)),
    ("a map that calls itself a patch", top(mode="set"), "expected a merged_digest", ("map",)),
    ("scale null", top(scale=None), "scale: expected a number"),
    ("scale text", top(scale="1"), "scale: expected a number"),
    ("scale beyond float32", top(scale=1e39), "scale: expected a number"),
    ("scale 10**400", top(scale=10**400), "scale: expected a number"),
    ("values of float64", top(values_dtype="float64"), "values_dtype: expected one of"),
    ("base of a number", top(base_model_name_or_path=3), "base_model_name_or_path: expected str"),
    ("selection of a list", top(selection=[]), "selection: expected dict, found list"),
    ("no tensors", top(tensors={}), "tensors: expected at least one parameter"),
    ("tensors of a list", top(tensors=[]), "tensors: expected dict, found list"),
    ("a record of a list", top(tensors={VICTIM: []}), f"{RECORD}expected a JSON object"),
    ("unknown encoding", record(encoding="bitmask"), f"{RECORD}encoding: expected one of .*'bitm"),
    ("encoding null", record(encoding=None), f"{RECORD}encoding: expected str"),
    ("unknown field", record(zero=0), f"{RECORD}'zero': expected only"),
    ("a field of many letters", record(**{"\x1b[2J" + "a" * 99999: 0}), f"{RECORD}.*expected only"),
    ("no count", without("tensors", VICTIM, "count"), f"{RECORD}count: expected int, found noth"),
    ("count -1", record(count=-1), f"{RECORD}count: expected at least 0, found -1"),
    ("count numel + 1", record(count=1537), f"{RECORD}count: expected at most 1536, found 1537"),
    ("count 2**63", record(count=2**63), f"{RECORD}count: expected at most 1536"),
    ("count true", record(count=True), f"{RECORD}count: expected int, found bool"),
    ("count 76.8", record(count=76.8), f"{RECORD}count: expected int, found float"),
    ("shape 2**64", record(shape=[2**62, 4]), f"{RECORD}shape: expected fewer than 2[*][*]63"),
    ("shape 10**4000", record(shape=[10**4000]), f"{RECORD}shape: expected fewer than 2"),
    ("shape [0, 32]", record(shape=[0, 32]), f"{RECORD}shape: expected at most 64 integers of at"),
    ("shape [-48, -32]", record(shape=[-48, -32]), f"{RECORD}shape: expected at most 64 integers"),
    ("shape of floats", record(shape=[48.0, 32]), f"{RECORD}shape: expected at most 64 integers"),
    ("shape of 65 sizes", record(shape=[1] * 65), f"{RECORD}shape: expected at most 64 integers"),
    ("shape of a number", record(shape=1536), f"{RECORD}shape: expected list, found int"),
    ("dtype int8", record(dtype="int8"), f"{RECORD}dtype: expected one of"),
    ("digest null", record(digest=None), f"{VICTIM}.*expected a digest and a base_digest"),
    ("digest of sha1", record(digest="sha1:" + "0" * 40), f"{RECORD}digest: expected sha256:"),
    ("base_digest null", record(base_digest=None), f"{VICTIM}.*expected a digest and a base_dig"),
    ("merged_digest null", record(merged_digest=None), "expected a merged_digest", ("patch",)),
    ("blocks null", record(blocks=None), f"{RECORD}blocks: expected list"),
    ("block of a number", record(blocks=[3]), rf"{RECORD}blocks\[0\]: expected a JSON object"),
    ("block offset -1", block(offset=-1), rf"{RECORD}blocks\[0\]: offset: expected at least 0"),
    ("block offset 2**70", block(offset=2**70), f"{RECORD}block .*expected entries below 1536"),
    ("block past the end", block(offset=1), f"{RECORD}block .*expected entries below 1536"),
    ("block stride 0", block(strides=[0, 1]), rf"{RECORD}blocks\[0\]: strides: expected at most"),
    ("block stride 2**62", block(strides=[2**62, 1]), f"{RECORD}block .*entries below 1536"),
    ("block that repeats", block(strides=[1, 1]), f"{RECORD}block .*strides that reach each entry"),
    ("block stride missing", block(strides=[1]), f"{RECORD}block .*expected one stride per size"),
    ("block key of a list", block(key=["a"]), rf"{RECORD}blocks\[0\]: key: expected str"),
    ("one block twice", config(double_block), f"{RECORD}blocks: expected at most 1536 entries"),
    ("one key of two parameters", block(key=OTHER), f"'{OTHER}': expected each checkpoint key"),
    ("a tied key in use", record(tied_keys=[OTHER]), f"'{OTHER}': expected each checkpoint key"),
    ("tied keys of numbers", record(tied_keys=[1]), f"{RECORD}tied_keys: expected non-empty"),
    ("a name with ..", rename(VICTIM, "..weight"), "tensors: expected printable names"),
    ("a path with ..", rename(VICTIM, "../../model.weight"), "tensors: expected printable names"),
    ("a block key with ..", block(key="../../../base/model"), BAD_KEY),
    ("a block key that clears the screen", block(key="\x1b[2J"), BAD_KEY),
    ("a tied key that clears the screen", record(tied_keys=["\x1b[2J"]), BAD_KEY),
    (
        "a name without module",
        rename(VICTIM, "weight"),
        "weight: expected a parameter of a named module",
    ),
    ("an empty name", rename(VICTIM, ""), "tensors: expected printable names"),
    (
        "a name that clears the screen",
        rename(VICTIM, "model.\x1b[2J.weight"),
        "expected printable names",
    ),
    (
        "a name of 5000 letters",
        rename(VICTIM, f"model.{'a' * 5000}.weight"),
        "expected printable names",
    ),
)

CONFIG_GARBAGE = _list(
    Stage.CONFIG,
    CONFIG,
    # what no parser of JSON reads
    ("no byte", raw(CONFIG, lambda _: b""), "expected JSON"),
    ("a pickle", raw(CONFIG, lambda _: b"\x80\x04}q\x00."), "expected JSON"),
    ("a list", raw(CONFIG, lambda _: b"[]"), "expected a JSON object, found list"),
    ("half a config", raw(CONFIG, lambda text: text[: len(text) // 2]), "expected JSON"),
    ("two objects", raw(CONFIG, lambda text: text + text), "expected JSON"),
    ("UTF-16", raw(CONFIG, lambda text: text.decode().encode("utf-16")), "expected JSON"),
    ("a byte order mark", raw(CONFIG, lambda text: b"\xef\xbb\xbf" + text), "expected JSON"),
    ("a NUL", insert('"a": "\0"'), "expected JSON"),
    ("deep lists", insert(f'"a": {"[" * 10**5}{"]" * 10**5}'), "expected JSON"),
    ("deep objects", insert('"a": ' + '{"a":' * 10**5 + "0" + "}" * 10**5), "expected JSON"),
    ("a number of 5000 digits", insert(f'"a": {"9" * 5000}'), "expected JSON, found Exceeds"),
)

CONFIG_TEXT = _list(
    Stage.CONFIG,
    CONFIG,
    # what some parsers read, each in its own way
    ("NaN", raw(CONFIG, selected(b"NaN")), "found NaN, which is not JSON"),
    ("Infinity", raw(CONFIG, selected(b"-Infinity")), "found -Infinity, which is not JSON"),
    ("scale 1e999", raw(CONFIG, infinite), "scale: expected a number"),
    ("scale twice", insert('"scale": 1000.0'), "the key 'scale' twice"),
    ("half a character", raw(CONFIG, selected(rb'"\ud800"')), "surrogates not allowed"),
)

CONFIG_FILE = _list(
    Stage.CONFIG,
    CONFIG,
    ("no config", missing(CONFIG), "found (none|nothing|something else)"),
    ("a directory as config", replace(CONFIG, os.mkdir), "found (none|nothing|something else)"),
    ("a pipe as config", replace(CONFIG, os.mkfifo), "found (none|nothing|something else)"),
    (
        "a device as config",
        replace(CONFIG, link("/dev/zero")),
        "found (none|nothing|something else)",
    ),
    ("a config that links to nothing", replace(CONFIG, link("nothing")), "found (none|nothing)"),
    ("a config that links to itself", replace(CONFIG, link(CONFIG)), "found (none|nothing)"),
)

TENSORS_FILE = _list(
    Stage.CONFIG,  # where the tensors' file is no file, nothing of it has to be read
    TENSORS,
    ("no tensors' file", missing(TENSORS), "found (none|nothing|something else)"),
    ("only pickles", only_pickles, "found adapter_model.bin, a pickle"),
    ("a directory as tensors", replace(TENSORS, os.mkdir), "found none"),
    ("a pipe as tensors", replace(TENSORS, os.mkfifo), "found none"),
    ("a device as tensors", replace(TENSORS, link("/dev/zero")), "found none"),
    ("tensors that link to nothing", replace(TENSORS, link("nothing")), "found none"),
    ("tensors that link to themselves", replace(TENSORS, link(TENSORS)), "found none"),
)

HEADERS = _list(
    Stage.HEADER,
    TENSORS,
    ("no byte of tensors", raw(TENSORS, lambda _: b""), "expected a safetensors header"),
    ("four bytes", raw(TENSORS, lambda whole: whole[:4]), "expected a safetensors header"),
    ("half a header", raw(TENSORS, lambda whole: whole[:100]), "expected a safetensors header"),
    ("a byte less", raw(TENSORS, lambda whole: whole[:-1]), "bytes, as its header says"),
    ("a byte more", raw(TENSORS, lambda whole: whole + b"\0"), "bytes, as its header says"),
    ("a ZIP archive", raw(TENSORS, lambda _: b"PK\3\4" + b"\0" * 99), "a safetensors header"),
    ("header of 2**63", header(lambda _: None, 2**63), "expected a safetensors header, found 9223"),
    ("header of 2**64 - 1", header(lambda _: None, 2**64 - 1), "expected a safetensors header"),
    ("header of the file", header(lambda _: None, 3000), "header: expected JSON|safetensors head"),
    ("header of no byte", header(lambda _: None, 0), "header: expected JSON"),
    ("header of a list", header_text(b"[]"), "header: expected a JSON object"),
    ("header of nonsense", header_text(b"\xff" * 99), "header: expected JSON"),
    ("header of deep lists", header_text(b'{"a":' + b"[" * 10**5), "header: expected JSON"),
    ("header that names twice", twice_in_header, "header: expected JSON, found the key .* twice"),
    ("shared bytes", header(overlap), "expected bytes from"),
    ("bytes between", head(shape=[0], data_offsets=[0, 0]), "expected"),
    ("offsets backwards", head(data_offsets=[308, 0]), "expected ascending data_offsets"),
    ("offset -8", head(data_offsets=[-8, 0]), "expected ascending data_offsets"),
    ("offset 2**70", head(data_offsets=[2**70, 2**70 + 8]), "expected ascending data_offsets"),
    ("offset true", head(data_offsets=[False, True]), "expected ascending data_offsets"),
    ("header shape 2**124", head(shape=[2**62, 2**62]), "expected .* bytes for I32"),
    ("header shape -77", head(shape=[-77]), "expected a dtype and a shape"),
    ("header shape of 65", head(shape=[1] * 65), "expected a dtype and a shape"),
    ("unknown dtype", head(dtype="I33"), "expected int32 .* found .*I33"),
    ("dtype that clears the screen", head(dtype="\x1b[2J" * 10**5), "expected a dtype and"),
    ("dtype of a number", head(dtype=3), "expected a dtype and a shape"),
    ("a field more", head(strides=[1]), "expected dtype, shape and data_offsets"),
    ("tensor of a number", header(lambda h: h.update({INDICES: 3})), "expected dtype, shape and"),
    ("another count in the config", record(count=3), r"expected int32 \[3\], found int32 \[77\]"),
    ("no count in the config", record(count=0), r"expected int32 \[0\], found int32 \[77\]"),
    ("a wider index in the config", wide, r"expected int64 \[77\], found int32"),
    ("a record less", without("tensors", VICTIM), "up_proj.*expected only tensors that"),
    ("indices of int64", put(INDICES, lambda a: a.astype(np.int64)), "expected int32 .*int64"),
    ("indices of uint32", put(INDICES, lambda a: a.astype(np.uint32)), "expected int32 .*uint32"),
    ("indices of float32", put(INDICES, lambda a: a.astype(np.float32)), "expected int32 .*float"),
    ("values in float64", put(CONTENT, lambda a: a.astype(np.float64)), "expected float32 .*float"),
    ("values in bfloat16", put(CONTENT, lambda a: a.astype(DTYPES["bfloat16"])), "found bfloat16"),
    ("values in int32", put(CONTENT, lambda a: a.view(np.int32)), "expected float32 .*int32"),
    ("an index less", put(INDICES, lambda a: a[:-1]), r"expected int32 \[77\], found int32 \[76\]"),
    ("a value less", put(CONTENT, lambda a: a[:-1]), r"float32 \[77\], found float32 \[76\]"),
    ("a value more", put(CONTENT, lambda a: np.append(a, a[-1])), r"found float32 \[78\]"),
    ("indices in two rows", put(INDICES, lambda a: a.reshape(7, 11)), r"found int32 \[7, 11\]"),
    ("a value without dimension", put(CONTENT, lambda a: a[0].reshape(())), r"found float32 \[\]"),
    ("no indices", drop(INDICES), "safeweights_indices.*found nothing"),
    ("no values", drop(CONTENT), "safeweights_(values|scores).*found nothing"),
    (
        "a weight of the base",
        add(SMUGGLED, np.zeros((48, 32), np.float32)),
        "expected only tensors",
    ),
    ("a tensor without prefix", add("lm_head.weight", np.zeros(4, np.float32)), "only tensors"),
    ("a tensor named ..", add("../../etc", np.zeros(4, np.float32)), "expected only tensors"),
    (
        "scores beside values",
        add(SCORES_OF_OTHER, np.zeros(2, np.float32)),
        "expected only tensors",
    ),
)

IN_TENSORS = _list(
    Stage.TENSORS,
    TENSORS,
    ("index -1", entry(INDICES, 0, -1), "indices.*expected indices from 0 to 1535, found -1"),
    ("index numel", entry(INDICES, -1, 1536), "indices.*expected indices from 0 .* found 1536"),
    ("index 2**31 - 1", entry(INDICES, -1, 2**31 - 1), "indices.*found 2147483647"),
    ("index -2**31", entry(INDICES, 0, -(2**31)), "indices.*found -2147483648"),
    ("unsorted", put(INDICES, swap), "indices.*expected ascending indices"),
    ("backwards", put(INDICES, lambda a: a[::-1]), "indices.*expected ascending indices"),
    ("an index twice", put(INDICES, repeat), "indices.*expected ascending indices"),
    ("a value of NaN", entry(CONTENT, 2, np.nan), "expected finite values, found nan"),
    ("a value of infinity", entry(CONTENT, 2, np.inf), "expected finite values, found inf"),
    ("the last value of -infinity", entry(CONTENT, -1, -np.inf), "expected finite values"),
    ("another value", entry(CONTENT, 1, 0.5, False), f"{VICTIM}: expected digest sha256:"),
    ("-0 for 0", put(CONTENT, lambda a: a * -1, False), f"{VICTIM}: expected digest sha256:"),
    ("another digest", record(digest="sha256:" + "0" * 64), f"{VICTIM}: expected digest sha256:00"),
    ("no block for some", block(shape=[1, 32]), f"{VICTIM}: expected blocks that hold every"),
    ("no block", record(blocks=[]), f"{VICTIM}: expected blocks that hold every"),
    ("terabytes of nothing", hole, "expected ascending indices"),
    ("terabytes of nothing in a row", hole_of_rows, "entries for each of .* that are no hole"),
)

STREAM_RECORDS = _list(
    Stage.CONFIG,
    CONFIG,
    (
        "compact without streams",
        record(encoding="compact"),
        f"{RECORD}streams: expected a JSON obj",
    ),
    ("plain with streams", record(streams={}), f"{RECORD}'streams': expected only"),
    (
        "a stream less",
        streams(lambda each: each.pop("indices")),
        f"{RECORD}streams: expected indices and (values|scores)",
    ),
    (
        "a stream more",
        streams(lambda each: each.update(bias=each["indices"])),
        f"{RECORD}streams: 'bias': expected only",
    ),
    ("a coding of tomorrow", gap_frame(frame, coding="gaps64"), "coding: expected one of .*gaps64"),
    ("steps of indices", gap_frame(frame, coding="steps8"), "indices: coding: expected one of"),
    ("gaps of values", coded(CONTENT, one, "gaps8"), "(values|scores): coding: expected one of"),
    ("escapes -1", gap_frame(frame, escapes=-1), "escapes: expected at least 0, found -1"),
    (
        "escapes beyond count",
        gap_frame(frame, escapes=78),
        "escapes: expected at most 77, found 78",
    ),
    ("escapes 2**63", gap_frame(frame, escapes=2**63), "escapes: expected at most 77"),
    (
        "frame of no byte",
        gap_frame(frame, bytes=[0]),
        "bytes: expected at most 64 integers of at l",
    ),
    ("frames of text", gap_frame(frame, bytes="90"), "bytes: expected list, found str"),
    (
        "two frames of gaps",
        gap_frame(frame, bytes=[40, 41]),
        "streams: indices: expected bytes of 1",
    ),
    (
        "three planes of four",
        coded(CONTENT, three, "planes"),
        "expected bytes of 4 frames, found 3",
    ),
    ("bytes 2**62 of frames", gap_frame(frame, bytes=[2**62]), "indices: bytes: expected at most"),
)

STREAM_HEADERS = _list(
    Stage.HEADER,
    TENSORS,
    ("a byte less of frames", gap_frame(frame, bytes=[20]), "expected uint8 .20., found uint8"),
    (
        "4 million of nothing",
        bomb(2**22),
        "expected at most 64 entries for each of .* found 4194304",
    ),
    ("terabytes of zeros", bomb(2**40), "expected at most 64 entries for each of"),
)

STREAMS = _list(
    Stage.TENSORS,
    TENSORS,
    ("frame of zeros", gap_frame(lambda gaps: b"\0" * 64), "indices.*expected .*zstd"),
    ("frame cut", gap_frame(lambda gaps: frame(gaps)[:-3]), "indices.*expected .*zstd"),
    ("frame and more", gap_frame(lambda gaps: frame(gaps) + b"\0"), "indices.*expected .*zstd"),
    ("frame and frame", gap_frame(lambda gaps: frame(gaps[:40]) + frame(gaps[40:])), "zstd"),
    ("frame after a skipped one", gap_frame(lambda gaps: SKIPPED + frame(gaps)), "zstd"),
    ("frame of no size", gap_frame(lambda gaps: frame(gaps, write_content_size=False)), "zstd fr"),
    ("frame of more", gap_frame(lambda gaps: frame(gaps + b"\0")), "zstd frame of 77 .* of 78"),
    ("frame of less", gap_frame(lambda gaps: frame(gaps[:-1])), "zstd frame of 77 bytes.* of 76"),
    ("frame that says less", gap_frame(lambda gaps: sized(gaps + b"\0", 77)), "zstd"),
    ("frame that says more", gap_frame(lambda gaps: sized(gaps[:-1], 77)), "zstd"),
    ("frame that says 2**60", gap_frame(lambda gaps: sized(gaps, 2**60)), "zstd frame of 77 bytes"),
    ("frame of a wide window", gap_frame(lambda gaps: WIDE_FRAME), "zstd"),
    ("frame with a dictionary", gap_frame(with_dictionary), "zstd"),
    ("frame of zlib", gap_frame(zlib.compress), "zstd"),
    ("escape at the end", gap_frame(lambda gaps: frame(gaps[:-1] + b"\xff")), "escape at the end"),
    ("an escape too many", gap_frame(lambda gaps: frame(b"\xff" + gaps[1:])), "77 gaps, found 76"),
    ("a gap past the end", gap_frame(lambda gaps: frame(gaps[:-1] + b"\xfe")), "indices from 0 to"),
    ("all gaps too wide", gap_frame(lambda gaps: frame(b"\xfe" * 77)), "indices from 0 to 1535"),
    ("escapes of nothing", gap_frame(lambda gaps: frame(gaps + b"\xff"), escapes=1), "escape at"),
    ("planes of NaN", coded(CONTENT, nans, "planes"), "expected finite values, found nan"),
)

ATTACKS = [
    *CONFIG_FIELDS,
    *CONFIG_GARBAGE,
    *CONFIG_TEXT,
    *CONFIG_FILE,
    *TENSORS_FILE,
    *HEADERS,
    *IN_TENSORS,
    *STREAM_RECORDS,
    *STREAM_HEADERS,
    *STREAMS,
]

UNKNOWN = {attack.name for attack in (*CONFIG_GARBAGE, *CONFIG_FILE)} | {"no method"}
"""Attacks after which nothing says that this is an adapter of this package."""

OTHER_BASE = {
    "a wider index in the config",
    "terabytes of nothing",
    "terabytes of nothing in a row",
}
"""Attacks on shapes, which may also be seen as made for another base."""
