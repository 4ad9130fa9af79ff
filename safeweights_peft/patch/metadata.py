"""What ``adapter_config.json`` says: strict reading, writing, and the adapter's identity."""

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NoReturn, TypeVar

import numpy as np

from safeweights_peft.delta import DTYPES, MAX_NUMEL, WEIGHT_DTYPES, index_dtype, refuse
from safeweights_peft.errors import (
    FormatError,
    SafeWeightsWarning,
    UnsupportedVersionError,
)
from safeweights_peft.files import MAX_DIMS
from safeweights_peft.patch.groups import count_groups
from safeweights_peft.patch.placement import STEPS, STREAMS, Block, Coding, Stream, check_blocks
from safeweights_peft.patch.records import Encoding, Mode, TensorRecord

T = TypeVar("T")
Choice = TypeVar("Choice", bound=StrEnum)

CORRECTION_OF = "correction_of"
"""In `selection`, what a correction is beside."""
CHAT = "chat"
"""In `selection`, what of the chat was set for training: whole texts, by setting."""
CHAT_SETTINGS = ("system_prompt", "chat_template", "answer_prefix")
FORMAT_VERSION = 1
FORMAT_MINOR = 2
PEFT_TYPE = "SAFEWEIGHTS"

_RECORD_FIELDS = frozenset(
    "shape dtype count encoding streams digest content_digest base_digest merged_digest blocks "
    "tied_keys".split()
)
_BLOCK_FIELDS = frozenset("key shape offset strides".split())
_STREAM_FIELDS = frozenset("coding escapes bytes".split())
_MAX_NAME = 1000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FRAME_OVERHEAD_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """The content of an ``adapter_config.json``."""

    mode: Mode
    base_model_name_or_path: str | None = None
    revision: str | None = None  # commit of the base, if it came from the Hub
    values_dtype: str = "float32"  # a key of DTYPES
    scale: float = 1.0  # factor on the values, on every route
    transformers_version: str | None = None  # whose parameter names are used
    selection: dict[str, Any] = field(default_factory=dict)  # how the entries were chosen
    tensors: dict[str, TensorRecord]  # by the parameter's name in memory

    @property
    def content_id(self) -> str | None:
        """Digest of what the adapter does to which base; see "Identity" in ``docs/format.md``.

        None where a content digest is missing, as in the header of a file of format 1.0.
        """
        scale = np.float32(self.scale).tobytes()[::-1].hex()
        lines = [f"safeweights {FORMAT_VERSION} {self.mode} {scale}\n"]
        for name, record in sorted(self.tensors.items()):
            if record.content_digest is None:
                return None
            shape = json.dumps(record.shape, separators=(",", ":"))
            digests = f"{record.content_digest} {record.base_digest} {record.merged_digest or '-'}"
            # Only the name may hold spaces, and all that follows it has a fixed form.
            lines.append(f"{name} {shape} {record.dtype} {digests}\n")
        return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    @property
    def is_correction(self) -> bool:
        """Whether the values cancel a part of a LoRA beside the patch."""
        return CORRECTION_OF in self.selection

    @property
    def needs_base(self) -> bool:
        """Whether any values are stored as steps from the base's entries."""
        return any(record.needs_base for record in self.tensors.values())

    @property
    def may_need_base(self) -> bool:
        """Whether values may be stored as steps from the base's entries."""
        # Steps lead to merged entries, and give the values back only if no scale was applied.
        return self.mode is Mode.SET and self.scale == 1.0

    def plain_dtype(self, record: TensorRecord, kind: str) -> np.dtype[Any]:
        """Return the dtype of a stream's entries when they are plain."""
        return index_dtype(record.numel) if kind == "indices" else DTYPES[self.values_dtype]

    def to_config(self) -> dict[str, Any]:
        """Build the content of ``adapter_config.json``, with the keys that PEFT expects."""
        return {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision,
            "inference_mode": True,
            "target_modules": None,
            "format_version": FORMAT_VERSION,
            "format_minor": FORMAT_MINOR,
            "mode": self.mode.value,
            "scale": self.scale,
            "values_dtype": self.values_dtype,
            "transformers_version": self.transformers_version,
            "selection": self.selection,
            "tensors": {name: record_to_json(self.tensors[name]) for name in sorted(self.tensors)},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "AdapterMetadata":
        """Read and check the content of an ``adapter_config.json``; ignore PEFT's own keys."""
        fields = Fields(config, source)
        is_newer = _check_version(fields)
        mode = Mode(fields.one_of("mode", [mode.value for mode in Mode]))
        metadata = cls(
            mode=mode,
            base_model_name_or_path=fields.optional("base_model_name_or_path", str),
            revision=fields.optional("revision", str),
            values_dtype=fields.one_of("values_dtype", DTYPES if mode is Mode.SET else ["float32"]),
            scale=fields.number("scale"),
            transformers_version=fields.optional("transformers_version", str),
            selection=fields.take("selection", dict),
            tensors=dict(_records_from_json(fields, is_newer)),
        )
        _check_complete(metadata, fields)
        return metadata


def read_chat(selection: Mapping[str, Any]) -> dict[str, str]:
    """Read what of the chat a patch was trained with; what is no text is nobody's setting."""
    chat = selection.get(CHAT)
    given = chat if isinstance(chat, Mapping) else {}
    return {key: given[key] for key in CHAT_SETTINGS if isinstance(given.get(key), str)}


@dataclass(frozen=True)
class Fields:
    """A JSON object from an untrusted file, whose fields are taken with their types checked."""

    data: Any
    where: str  # file and position, for messages

    def __post_init__(self) -> None:
        """Refuse anything but an object."""
        if not isinstance(self.data, Mapping):
            refuse(self.where, "a JSON object", type(self.data).__name__)

    def refuse(self, key: str, expected: str, found: object) -> NoReturn:
        """Raise the error for one field."""
        # Cut, since an untrusted file can hold text of any length.
        refuse(f"{self.where}: {key}", expected, str(found)[:80])

    def check(self, key: str, value: T, is_valid: bool, expected: str) -> T:
        """Return a field's value, if it is valid."""
        return value if is_valid else self.refuse(key, expected, repr(value))

    def only(self, allowed: Collection[str]) -> None:
        """Refuse fields that the format does not know."""
        for key in self.data:
            if key not in allowed:
                self.refuse(repr(key[:80]), f"only {', '.join(sorted(allowed))}", "this field")

    def take(self, key: str, kind: type[T]) -> T:
        """Take a field of exactly one type; a bool is no integer."""
        value = self.data.get(key)
        if type(value) is not kind:
            found = type(value).__name__ if key in self.data else "nothing"
            self.refuse(key, kind.__name__, found)
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        """Take a field of one type that may be null or missing."""
        return None if self.data.get(key) is None else self.take(key, kind)

    def integer(self, key: str, least: int) -> int:
        """Take an integer."""
        value = self.take(key, int)
        return self.check(key, value, value >= least, f"at least {least}")

    def integers(self, key: str, least: int) -> tuple[int, ...]:
        """Take a list of sizes or strides."""
        values = self.take(key, list)
        is_valid = len(values) <= MAX_DIMS and all(type(v) is int and v >= least for v in values)
        expected = f"at most {MAX_DIMS} integers of at least {least}"
        return tuple(self.check(key, values, is_valid, expected))

    def names(self, key: str) -> tuple[str, ...]:
        """Take a list of non-empty strings."""
        values = self.take(key, list)
        is_valid = all(type(value) is str and value for value in values)
        return tuple(self.check(key, values, is_valid, "non-empty strings"))

    def one_of(self, key: str, allowed: Collection[str]) -> str:
        """Take one of some strings."""
        name = self.take(key, str)
        return self.check(key, name, name in allowed, f"one of {', '.join(allowed)}")

    def member(self, key: str, choices: type[Choice]) -> Choice:
        """Take a member of a closed enum, which a newer format version may have widened."""
        name = self.take(key, str)
        try:
            return choices(name)
        except ValueError:
            raise UnsupportedVersionError(
                f"{self.where}: {key}: expected one of {', '.join(choices)}, found {name[:80]!r}; "
                "install a newer safeweights_peft"
            ) from None

    def digest(self, key: str) -> str | None:
        """Take a digest or null."""
        value = self.optional(key, str)
        is_valid = value is None or _DIGEST.fullmatch(value) is not None
        return self.check(key, value, is_valid, "sha256: and 64 hexadecimal digits")

    def number(self, key: str) -> float:
        """Take a number that is finite in float32."""
        value = self.data.get(key)
        is_valid = type(value) in (int, float) and abs(value) <= _FLOAT32_MAX
        return float(self.check(key, value, is_valid, "a number that is finite in float32"))

    def check_name(self, key: str, name: str) -> None:
        """Check a parameter's name or a checkpoint key, which messages print."""
        is_valid = name.isprintable() and len(name) <= _MAX_NAME and all(name.split("."))
        expected = f"printable names of at most {_MAX_NAME} characters and no empty part"
        self.check(key, name, is_valid, f"{expected} between dots")


def record_to_json(record: TensorRecord) -> dict[str, Any]:
    """Turn a record into plain JSON."""
    # Lists, not tuples, so that a config that was read equals the one that was written.
    data = vars(record) | {
        "shape": list(record.shape),
        "encoding": record.encoding.value,
        "streams": {
            kind: {"coding": stream.coding.value, "escapes": stream.escapes}
            | {"bytes": list(stream.sizes)}
            for kind, stream in record.streams.items()
        },
        "blocks": [
            vars(block) | {"shape": list(block.shape), "strides": list(block.strides)}
            for block in record.blocks
        ],
        "tied_keys": list(record.tied_keys),
    }
    if not record.streams:
        del data["streams"]  # a plain record has none
    return data


def record_from_json(data: Any, where: str) -> TensorRecord:
    """Read and check one record; digests may be null while an adapter is trained."""
    fields = Fields(data, where)
    fields.only(_RECORD_FIELDS)
    record = TensorRecord(
        shape=fields.integers("shape", least=1),
        dtype=fields.one_of("dtype", WEIGHT_DTYPES),
        count=fields.integer("count", least=0),
        encoding=fields.member("encoding", Encoding),
        digest=fields.digest("digest"),
        content_digest=fields.digest("content_digest"),
        base_digest=fields.digest("base_digest"),
        merged_digest=fields.digest("merged_digest"),
        blocks=tuple(_blocks_from_json(fields)),
        tied_keys=fields.names("tied_keys"),
    )
    for key in record.keys:
        fields.check_name("key", key)
    if record.numel > MAX_NUMEL:
        fields.refuse("shape", "fewer than 2**63 entries", list(record.shape))
    if record.count > record.numel:
        fields.refuse("count", f"at most {record.numel}", record.count)
    if record.tied_keys and len(record.blocks) != 1:
        fields.refuse("tied_keys", "none beside several blocks", record.tied_keys)
    check_blocks(where, record.blocks, record.numel)
    _check_groups(fields, record)
    return replace(record, streams=_streams_from_json(fields, record))


def _check_groups(fields: Fields, record: TensorRecord) -> None:
    """Check that entries stored by rows or columns can be some."""
    group = record.encoding.group
    if group is None:
        return
    if len(record.shape) < 2:
        fields.refuse("encoding", f"a matrix, to have {record.encoding}", list(record.shape))
    _, length = count_groups(record.shape, group)
    if not record.count or record.count % length:
        whole = f"whole {record.encoding} of {length} entries, at least one"
        fields.refuse("count", whole, record.count)


def _blocks_from_json(fields: Fields) -> Iterator[Block]:
    for number, data in enumerate(fields.take("blocks", list)):
        block = Fields(data, f"{fields.where}: blocks[{number}]")
        block.only(_BLOCK_FIELDS)
        yield Block(
            key=block.take("key", str),
            shape=block.integers("shape", least=1),
            offset=block.integer("offset", least=0),
            strides=block.integers("strides", least=1),
        )


def _streams_from_json(fields: Fields, record: TensorRecord) -> dict[str, Stream]:
    """Read the layout of a compact record's streams; no other has any."""
    if record.encoding is not Encoding.COMPACT:
        fields.only(_RECORD_FIELDS - {"streams"})
        return {}
    streams = Fields(fields.data.get("streams"), f"{fields.where}: streams")
    streams.only(STREAMS)
    return {
        kind: _stream_from_json(Fields(data, f"{streams.where}: {kind}"), kind, record)
        for kind, data in streams.data.items()
    }


def _stream_from_json(fields: Fields, kind: str, record: TensorRecord) -> Stream:
    """Read one stream's layout, and check it against its record."""
    fields.only(_STREAM_FIELDS)
    coding = fields.member("coding", Coding)
    if kind not in coding.kinds:
        allowed = [coding for coding in Coding if kind in coding.kinds]
        fields.refuse("coding", f"one of {', '.join(allowed)}", repr(coding.value))
    stream = Stream(coding, fields.integer("escapes", least=0), fields.integers("bytes", least=1))
    itemsize = WEIGHT_DTYPES[record.dtype].itemsize
    if coding in STEPS and coding.width > itemsize:
        fields.refuse("coding", f"steps of at most {8 * itemsize} bits", repr(coding.value))
    most = coding.most_escapes(record.count, itemsize)
    if stream.escapes > most:
        fields.refuse("escapes", f"at most {most}", stream.escapes)
    if coding is not Coding.PLAIN and not record.count:
        fields.refuse("coding", "plain for no entries", coding.value)
    return stream


def _records_from_json(fields: Fields, is_newer: bool) -> Iterator[tuple[str, TensorRecord]]:
    for name, data in fields.take("tensors", dict).items():
        fields.check_name("tensors", name)
        if is_newer and isinstance(data, dict):
            data = {key: value for key, value in data.items() if key in _RECORD_FIELDS}
        yield name, record_from_json(data, f"{fields.where}: {name}")


def _check_version(fields: Fields) -> bool:
    """Refuse other methods and format versions; return whether the minor version is newer."""
    peft_type = fields.data.get("peft_type")
    if peft_type != PEFT_TYPE:
        raise FormatError(
            f"{fields.where}: peft_type: expected {PEFT_TYPE}, found {str(peft_type)[:80]!r}; "
            "give a safety patch or a safety map"
        )
    version = fields.take("format_version", int)
    if version != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{fields.where}: format_version: expected {FORMAT_VERSION}, "
            f"found {str(version)[:80]}; install a newer safeweights_peft"
        )
    minor = fields.integer("format_minor", least=0) if "format_minor" in fields.data else 0
    if minor > FORMAT_MINOR:
        warnings.warn(
            f"{fields.where}: format_minor: expected at most {FORMAT_MINOR}, found "
            f"{str(minor)[:80]}, so what is new in it is ignored; install a newer safeweights_peft",
            SafeWeightsWarning,
            stacklevel=2,
        )
    return minor > FORMAT_MINOR


def _check_complete(metadata: AdapterMetadata, fields: Fields) -> None:
    """Check what a written adapter must have, beyond each record's own rules."""
    if not metadata.tensors:
        fields.refuse("tensors", "at least one parameter", "none")
    for name, record in metadata.tensors.items():
        if "." not in name:
            fields.refuse(name, "a parameter of a named module", "none")
        if record.digest is None or record.base_digest is None:
            fields.refuse(name, "a digest and a base_digest", "null")
        if (record.merged_digest is None) == (metadata.mode is Mode.SET):
            expected = "a merged_digest" if metadata.mode is Mode.SET else "no merged_digest"
            fields.refuse(name, expected, record.merged_digest)
        if record.encoding is Encoding.COMPACT:
            _check_streams(metadata, record, Fields({}, f"{fields.where}: {name}"))
    keys = Counter(key for record in metadata.tensors.values() for key in record.keys)
    for key, uses in keys.items():
        if uses > 1:
            fields.refuse(repr(key), "each checkpoint key once", f"{uses} uses")


def _check_streams(metadata: AdapterMetadata, record: TensorRecord, fields: Fields) -> None:
    """Check a compact record's streams against the adapter as a whole."""
    content = metadata.mode.content
    if record.streams.keys() != {"indices", content}:
        found = ", ".join(record.streams) or "none"
        fields.refuse("streams", f"indices and {content}", found)
    for kind, stream in record.streams.items():
        plain = metadata.plain_dtype(record, kind)
        frames = len(record.frames(kind, plain))
        if len(stream.sizes) != frames:
            fields.refuse(f"streams: {kind}", f"bytes of {frames} frames", len(stream.sizes))
        # Loading by shape allocates this many bytes before it sees the first of them.
        most = record.count * plain.itemsize + _FRAME_OVERHEAD_BYTES * frames
        if stream.size_bytes > most:
            fields.refuse(f"streams: {kind}: bytes", f"at most {most} bytes", stream.size_bytes)
    is_float32 = metadata.values_dtype == "float32"
    if record.needs_base and not (metadata.may_need_base and is_float32):
        expected = "scale 1 and values_dtype float32 beside steps"
        found = f"{metadata.scale} and {metadata.values_dtype}"
        fields.refuse(f"streams: {content}", expected, found)
