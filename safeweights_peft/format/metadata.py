"""What an adapter says about itself: typed records, and their JSON form in ``adapter_config.json``.

Here live the records, their strict checks, and the names of tensors in the safetensors file.
Reading and writing files does not (see ``io``). The normative text is ``docs/format.md``.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from safeweights_peft.delta import DTYPES, MAX_NUMEL, WEIGHT_DTYPES, Array
from safeweights_peft.errors import CorruptAdapterError, FormatError, UnsupportedVersionError
from safeweights_peft.format.blocks import Block, check_blocks
from safeweights_peft.format.fields import Fields

__all__ = [
    "FORMAT_VERSION",
    "PEFT_TYPE",
    "AdapterMetadata",
    "Block",
    "Encoding",
    "Mode",
    "TensorRecord",
    "entries_by_block",
    "indices_key",
    "parse_key",
    "record_from_json",
    "record_to_json",
    "scores_key",
    "values_key",
]

FORMAT_VERSION = 1
PEFT_TYPE = "SAFEWEIGHTS"

_PREFIX = "base_model.model."
_MAX_NAME = 1000
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.safeweights_(?P<kind>indices|values|scores)__(?P<own>[^.]+)"
)
_RECORD_FIELDS = frozenset(
    "shape dtype count encoding digest base_digest merged_digest blocks tied_keys".split()
)
_BLOCK_FIELDS = frozenset("key shape offset strides".split())


class Mode(StrEnum):
    """Kind of artifact: a safety patch (SET) or a safety map (SPA)."""

    SET = "set"
    SPA = "spa"

    @property
    def artifact(self) -> str:
        """What messages call it."""
        return {Mode.SET: "safety patch", Mode.SPA: "safety map"}[self]


class Encoding(StrEnum):
    """How indices and values are laid out; closed: a reader refuses any other name."""

    PLAIN = "plain"


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
        digest: Digest of the stored index bytes, then the stored value or score bytes.
        base_digest: Digest of the base's entries at the indices, in ``dtype``.
        merged_digest: Digest of the merged entries at the adapter's scale; None for a safety map.
    """

    shape: tuple[int, ...]
    dtype: str
    count: int = 0
    blocks: tuple[Block, ...]
    tied_keys: tuple[str, ...] = ()
    encoding: Encoding = Encoding.PLAIN
    digest: str | None = None
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


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """Everything that ``adapter_config.json`` says.

    Attributes:
        mode: Safety patch or safety map.
        base_model_name_or_path: Repo id or path of the base.
        revision: Commit of the base, if it came from the Hub.
        values_dtype: Storage dtype of the values, a key of ``DTYPES``; "float32" for a safety map.
        scale: Finite factor on the values, on every route.
        transformers_version: The version whose parameter names are used.
        selection: How the entries were chosen; free JSON.
        tensors: One record per parameter, by its name in memory.
    """

    mode: Mode
    base_model_name_or_path: str | None = None
    revision: str | None = None
    values_dtype: str = "float32"
    scale: float = 1.0
    transformers_version: str | None = None
    selection: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorRecord]

    @property
    def content_id(self) -> str:
        """What the adapter stores, as one digest; see "Digests" in ``docs/format.md``."""
        lines = (f"{name} {self.tensors[name].digest}\n" for name in sorted(self.tensors))
        return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    def to_config(self) -> dict[str, Any]:
        """Make the content of ``adapter_config.json``, with the keys that PEFT asks for.

        Returns:
            Plain JSON, with the tensors sorted by name.
        """
        return {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision,
            "inference_mode": True,
            "target_modules": None,
            "format_version": FORMAT_VERSION,
            "mode": self.mode.value,
            "scale": self.scale,
            "values_dtype": self.values_dtype,
            "transformers_version": self.transformers_version,
            "selection": self.selection,
            "tensors": {name: record_to_json(self.tensors[name]) for name in sorted(self.tensors)},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> "AdapterMetadata":
        """Check the content of an ``adapter_config.json``; keys of PEFT's own are ignored.

        A wrong field is a ``CorruptAdapterError``, an unknown version or encoding an
        ``UnsupportedVersionError``, another method's config a ``FormatError``.

        Args:
            config: The parsed JSON object.
            source: What messages call it, such as the file's path.

        Returns:
            The metadata, complete with the digests that its mode asks for.
        """
        fields = Fields(config, source)
        _check_version(fields)
        mode = Mode(fields.one_of("mode", [mode.value for mode in Mode]))
        metadata = cls(
            mode=mode,
            base_model_name_or_path=fields.optional("base_model_name_or_path", str),
            revision=fields.optional("revision", str),
            values_dtype=fields.one_of("values_dtype", DTYPES if mode is Mode.SET else ["float32"]),
            scale=fields.number("scale"),
            transformers_version=fields.optional("transformers_version", str),
            selection=fields.take("selection", dict),
            tensors=dict(_records_from_json(fields)),
        )
        _check_complete(metadata, fields)
        return metadata


def record_to_json(record: TensorRecord) -> dict[str, Any]:
    """Turn a record into plain JSON.

    Args:
        record: The record.

    Returns:
        A JSON object with every field of the record.
    """
    return {
        "shape": list(record.shape),
        "dtype": record.dtype,
        "count": record.count,
        "encoding": record.encoding.value,
        "digest": record.digest,
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
    """Check one record; digests may still be null, as in an adapter that is being trained.

    Args:
        data: The JSON object.
        where: What messages call it.

    Returns:
        The record.

    Raises:
        CorruptAdapterError: A field is missing, unknown, of a wrong type, or contradicts another.
    """
    fields = Fields(data, where)
    fields.only(_RECORD_FIELDS)
    record = TensorRecord(
        shape=fields.integers("shape", least=1),
        dtype=fields.one_of("dtype", WEIGHT_DTYPES),
        count=fields.integer("count", least=0),
        encoding=fields.member("encoding", Encoding),
        digest=fields.digest("digest"),
        base_digest=fields.digest("base_digest"),
        merged_digest=fields.digest("merged_digest"),
        blocks=tuple(_blocks_from_json(fields)),
        tied_keys=fields.texts("tied_keys"),
    )
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
    return record


def entries_by_block(
    record: TensorRecord, indices: Array
) -> dict[str, tuple[Array | slice, Array]]:
    """Sort a parameter's entries by the checkpoint tensor that holds them.

    Args:
        record: The parameter's record.
        indices: Its checked flat indices; ``(count,)``.

    Returns:
        For each block's key the positions into ``indices``, and the flat indices in that tensor.
    """
    return {block.key: block.locate(indices) for block in record.blocks}


def indices_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's indices.

    Args:
        parameter: The parameter's name in memory, with a module path.

    Returns:
        The key.
    """
    return _tensor_key(parameter, "indices")


def values_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's values.

    Args:
        parameter: The parameter's name in memory, with a module path.

    Returns:
        The key.
    """
    return _tensor_key(parameter, "values")


def scores_key(parameter: str) -> str:
    """Name the safetensors entry that holds a parameter's scores.

    Args:
        parameter: The parameter's name in memory, with a module path.

    Returns:
        The key.
    """
    return _tensor_key(parameter, "scores")


def parse_key(key: str) -> tuple[str, str]:
    """Undo :func:`indices_key`, :func:`values_key` and :func:`scores_key`.

    Args:
        key: A name in the safetensors file.

    Returns:
        The parameter's name in memory, and "indices", "values" or "scores".

    Raises:
        CorruptAdapterError: The name has another form.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise CorruptAdapterError(
            f"{key}: expected a name like {_PREFIX}<module>.safeweights_indices__<parameter>, "
            "found another; remove this tensor"
        )
    return f"{match['module']}.{match['own']}", match["kind"]


def _tensor_key(parameter: str, kind: str) -> str:
    module, _, own = parameter.rpartition(".")
    if not module or not own:
        raise CorruptAdapterError(
            f"{parameter}: expected a parameter of a named module, found none; "
            "select parameters of submodules only"
        )
    return f"{_PREFIX}{module}.safeweights_{kind}__{own}"


def _records_from_json(fields: Fields) -> Iterator[tuple[str, TensorRecord]]:
    for name, data in fields.take("tensors", dict).items():
        if not name.isprintable() or len(name) > _MAX_NAME:
            asked = f"printable names of at most {_MAX_NAME} characters"
            raise CorruptAdapterError(fields.message("tensors", asked, repr(name)))
        yield name, record_from_json(data, f"{fields.where}: {name}")


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


def _check_version(fields: Fields) -> None:
    """Refuse what another method or another format version has written."""
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


def _check_complete(metadata: AdapterMetadata, fields: Fields) -> None:
    """Check what a written adapter must have, beyond each record's own rules."""
    if not metadata.tensors:
        raise CorruptAdapterError(fields.message("tensors", "at least one parameter", "none"))
    patch = metadata.mode is Mode.SET
    for name, record in metadata.tensors.items():
        indices_key(name)
        if record.digest is None or record.base_digest is None:
            raise CorruptAdapterError(fields.message(name, "a digest and a base_digest", "null"))
        if (record.merged_digest is not None) != patch:
            asked = "a merged_digest" if patch else "no merged_digest"
            raise CorruptAdapterError(fields.message(name, asked, str(record.merged_digest)))
    keys = Counter(key for record in metadata.tensors.values() for key in record.keys)
    for key, uses in keys.items():
        if uses > 1:
            raise CorruptAdapterError(
                fields.message(repr(key), "each checkpoint key once", f"{uses} uses")
            )
