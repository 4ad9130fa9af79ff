"""What an adapter says about one parameter, and the names of its tensors in the safetensors file.

Here live the records, their strict checks and their JSON form. What it says of itself as a whole
does not (see ``metadata``), nor what coded streams hold (see ``codec``). The normative text is
``docs/format.md``.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Flag, StrEnum
from typing import Any

from safeweights_peft.delta import MAX_NUMEL, WEIGHT_DTYPES, Array, digest
from safeweights_peft.errors import (
    AlreadyMergedError,
    BaseMismatchError,
    CorruptAdapterError,
    FormatError,
)
from safeweights_peft.patch.blocks import Block, check_blocks
from safeweights_peft.patch.fields import Fields
from safeweights_peft.patch.streams import (
    CODINGS,
    STEPS,
    Coding,
    Stream,
    stream_from_json,
    stream_to_json,
)

RECORD_FIELDS = frozenset(
    "shape dtype count encoding streams digest content_digest base_digest merged_digest blocks "
    "tied_keys".split()
)

_MAX_NAME = 1000
_PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.safeweights_(?P<kind>indices|values|scores)__(?P<own>[^.]+)"
)
_BLOCK_FIELDS = frozenset("key shape offset strides".split())


class State(Flag):
    """Whose a model's entries are; ``&`` gives what several parameters have in common."""

    OTHER = 0
    BASE = 1
    MERGED = 2
    EITHER = 3  # of a parameter whose entries no value moves


class Mode(StrEnum):
    """Kind of artifact: a safety patch (SET) or a safety map (SPA)."""

    SET = "set"
    SPA = "spa"

    @property
    def safe_state(self) -> State:
        """The state of a model that has the safety of the artifact."""
        return State.MERGED if self is Mode.SET else State.BASE

    @property
    def artifact(self) -> str:
        """What messages call it."""
        return {Mode.SET: "safety patch", Mode.SPA: "safety map"}[self]


class Encoding(StrEnum):
    """How indices and values are laid out; closed: a reader refuses any other name."""

    PLAIN = "plain"
    COMPACT = "compact"


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """What an adapter records for one parameter.

    Attributes:
        shape: Shape of the parameter in memory.
        dtype: Name of its dtype in the checkpoint, a key of ``WEIGHT_DTYPES``.
        count: Number of selected entries.
        blocks: The checkpoint tensors that hold it.
        tied_keys: Other checkpoint tensors that get the same edit where a base has them on disk.
        encoding: Layout of indices and values in the file.
        streams: Layout of the streams "indices" and "values" or "scores"; empty if it is plain.
        digest: Digest of the stored index bytes, then the stored value or score bytes.
        content_digest: Digest of the plain indices, in a safety map then of the plain scores; the
            same in every encoding. None where the writer did not know it yet.
        base_digest: Digest of the base's entries at the indices, in ``dtype``.
        merged_digest: Digest of the merged entries at the adapter's scale; None for a safety map.
    """

    shape: tuple[int, ...]
    dtype: str
    count: int = 0
    blocks: tuple[Block, ...]
    tied_keys: tuple[str, ...] = ()
    encoding: Encoding = Encoding.PLAIN
    streams: Mapping[str, Stream] = field(default_factory=dict)
    digest: str | None = None
    content_digest: str | None = None
    base_digest: str | None = None
    merged_digest: str | None = None

    @property
    def numel(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every checkpoint key that the record names."""
        return tuple(block.key for block in self.blocks) + self.tied_keys

    @property
    def needs_base(self) -> bool:
        """Whether the values are stored as steps from the base's entries."""
        return self.stream("values").coding in STEPS

    def stream(self, kind: str) -> Stream:
        """Tell how a stream is laid out."""
        return self.streams.get(kind, Stream(Coding.PLAIN))


def record_to_json(record: TensorRecord) -> dict[str, Any]:
    """Turn a record into plain JSON."""
    streams = {kind: stream_to_json(stream) for kind, stream in sorted(record.streams.items())}
    return ({"streams": streams} if streams else {}) | {
        "shape": list(record.shape),
        "dtype": record.dtype,
        "count": record.count,
        "encoding": record.encoding.value,
        "digest": record.digest,
        "content_digest": record.content_digest,
        "base_digest": record.base_digest,
        "merged_digest": record.merged_digest,
        "blocks": [
            {
                "key": block.key,
                "shape": list(block.shape),
                "offset": block.offset,
                "strides": list(block.strides),
            }
            for block in record.blocks
        ],
        "tied_keys": list(record.tied_keys),
    }


def record_from_json(data: Any, where: str) -> TensorRecord:
    """Check one record; digests may still be null, as in an adapter that is being trained."""
    fields = Fields(data, where)
    fields.only(RECORD_FIELDS)
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
        tied_keys=fields.texts("tied_keys"),
    )
    for key in record.keys:
        check_name(fields, "key", key)
    if record.numel > MAX_NUMEL:
        raise CorruptAdapterError(
            fields.message("shape", "fewer than 2**63 entries", str(list(record.shape)))
        )
    if record.count > record.numel:
        raise CorruptAdapterError(
            fields.message("count", f"at most {record.numel}", str(record.count))
        )
    if record.tied_keys and len(record.blocks) != 1:
        raise CorruptAdapterError(
            fields.message("tied_keys", "none beside several blocks", repr(record.tied_keys))
        )
    check_blocks(where, record.blocks, record.numel)
    return replace(record, streams=_streams_from_json(fields, record))


def state_of(entries: Array, record: TensorRecord) -> State:
    """Tell by digest whose the entries at a record's indices are; ``(count,)``."""
    # Another dtype may have the same bytes, as zeros do, and be another model.
    if entries.dtype != WEIGHT_DTYPES[record.dtype]:
        return State.OTHER
    found, state = digest(entries), State.OTHER
    if found == record.base_digest:
        state |= State.BASE
    if found == record.merged_digest:
        state |= State.MERGED
    return state


def check_state(
    name: str,
    entries: Array,
    record: TensorRecord,
    expected: State = State.BASE,
    *,
    artifact: str = "adapter",
    hint: str = "give that one",
) -> State:
    """Refuse entries in no expected state; return which of the expected ones they are in."""
    if expected is State.MERGED and record.merged_digest is None:
        raise FormatError(
            f"{name}: expected a merged_digest in the safety patch, found null; save the patch "
            "with save_pretrained, which computes it, and give its directory"
        )
    state = state_of(entries, record)
    if state & expected:
        return state & expected
    if state is State.MERGED:
        raise AlreadyMergedError(
            f"{name}: expected the base's entries, found the {artifact}'s merged ones; "
            "use the model as it is, or give the original base"
        )
    if state is State.BASE:
        raise BaseMismatchError(
            f"{name}: expected the base with the safety patch merged in, found the base without "
            "it; merge the patch first"
        )
    model, own = f"base that the {artifact} was made for", record.base_digest
    if expected is State.MERGED:
        model, own = "base with the safety patch merged in at its own scale", record.merged_digest
    raise BaseMismatchError(
        f"{name}: expected the {model} (entries of digest {own}), found another "
        f"({digest(entries)}); {hint}"
    )


def entries_by_block(
    record: TensorRecord, indices: Array
) -> dict[str, tuple[Array | slice, Array]]:
    """Sort a parameter's entries by the checkpoint tensor that holds them."""
    return {block.key: block.locate(indices) for block in record.blocks}


def indices_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's indices."""
    return _tensor_key(parameter, "indices")


def values_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's values."""
    return _tensor_key(parameter, "values")


def scores_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's scores."""
    return _tensor_key(parameter, "scores")


def parse_key(key: str) -> tuple[str, str]:
    """Undo :func:`indices_key`, :func:`values_key` and :func:`scores_key`."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise CorruptAdapterError(
            f"{key}: expected a name like {_PREFIX}<module>.safeweights_indices__<parameter>, "
            "found another; remove this tensor"
        )
    return f"{match['module']}.{match['own']}", match["kind"]


def check_name(fields: Fields, field: str, name: str) -> None:
    """Check the name of a parameter or a checkpoint key, since messages show it."""
    if not name.isprintable() or len(name) > _MAX_NAME or not all(name.split(".")):
        asked = f"printable names of at most {_MAX_NAME} characters and no empty part between dots"
        raise CorruptAdapterError(fields.message(field, asked, repr(name)))


def _tensor_key(parameter: str, kind: str) -> str:
    module, _, own = parameter.rpartition(".")
    if not module or not own:
        raise CorruptAdapterError(
            f"{parameter}: expected a parameter of a named module, found none; "
            "select parameters of submodules only"
        )
    return f"{_PREFIX}{module}.safeweights_{kind}__{own}"


def _streams_from_json(fields: Fields, record: TensorRecord) -> dict[str, Stream]:
    """Take the layout of both streams of a compact record; a plain one says nothing of them."""
    if record.encoding is Encoding.PLAIN:
        fields.only(RECORD_FIELDS - {"streams"})
        return {}
    streams = Fields(fields.data.get("streams"), f"{fields.where}: streams")
    streams.only(CODINGS)
    return {
        kind: stream_from_json(data, f"{streams.where}: {kind}", kind, record.count, record.dtype)
        for kind, data in streams.data.items()
    }


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
