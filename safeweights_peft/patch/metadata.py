"""What an adapter says about itself, and its JSON form in ``adapter_config.json``.

Here live the description as a whole, its checks, and the content id. What it says of one parameter
does not (see ``records``), nor reading and writing files (see ``io``). The normative text is
``docs/format.md``.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES, index_dtype
from safeweights_peft.errors import (
    CorruptAdapterError,
    FormatError,
    SafeWeightsWarning,
    UnsupportedVersionError,
)
from safeweights_peft.patch.fields import Fields
from safeweights_peft.patch.records import (
    RECORD_FIELDS,
    Encoding,
    Mode,
    TensorRecord,
    check_name,
    record_from_json,
    record_to_json,
)
from safeweights_peft.patch.streams import STEPS

FORMAT_VERSION = 1
FORMAT_MINOR = 1
PEFT_TYPE = "SAFEWEIGHTS"

_FRAME_OVERHEAD_BYTES = 64


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
    def content_id(self) -> str | None:
        """What the adapter does to which base, as one digest; see "Identity" in ``docs/format.md``.

        None where a content digest is missing, as in the header of a file of format 1.0.
        """
        records = [(name, self.tensors[name]) for name in sorted(self.tensors)]
        if any(record.content_digest is None for _, record in records):
            return None
        scale = np.float32(self.scale).tobytes()[::-1].hex()
        lines = [f"safeweights {FORMAT_VERSION} {self.mode} {scale}\n"]
        lines += [_identity(name, record) for name, record in records]
        return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    @property
    def needs_base(self) -> bool:
        """Whether values are stored as steps from the base's entries."""
        return any(record.needs_base for record in self.tensors.values())

    @property
    def may_need_base(self) -> bool:
        """Whether values may be stored as steps from the base's entries: the sum must be theirs."""
        return self.mode is Mode.SET and self.scale == 1.0

    def to_config(self) -> dict[str, Any]:
        """Make the content of ``adapter_config.json``, with the keys that PEFT asks for."""
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
        """Check the content of an ``adapter_config.json``; keys of PEFT's own are ignored.

        A wrong field is a ``CorruptAdapterError``, an unknown version or encoding an
        ``UnsupportedVersionError``, another method's config a ``FormatError``.
        """
        fields = Fields(config, source)
        newer = _check_version(fields)
        mode = Mode(fields.one_of("mode", [mode.value for mode in Mode]))
        metadata = cls(
            mode=mode,
            base_model_name_or_path=fields.optional("base_model_name_or_path", str),
            revision=fields.optional("revision", str),
            values_dtype=fields.one_of("values_dtype", DTYPES if mode is Mode.SET else ["float32"]),
            scale=fields.number("scale"),
            transformers_version=fields.optional("transformers_version", str),
            selection=fields.take("selection", dict),
            tensors=dict(_records_from_json(fields, newer)),
        )
        _check_complete(metadata, fields)
        return metadata


def _identity(name: str, record: TensorRecord) -> str:
    """Write the line of the content id for one parameter; only the name may hold spaces."""
    shape = json.dumps(record.shape, separators=(",", ":"))
    digests = f"{record.content_digest} {record.base_digest} {record.merged_digest or '-'}"
    return f"{name} {shape} {record.dtype} {digests}\n"


def _records_from_json(fields: Fields, newer: bool) -> Iterator[tuple[str, TensorRecord]]:
    for name, data in fields.take("tensors", dict).items():
        check_name(fields, "tensors", name)
        if newer and isinstance(data, dict):
            data = {key: value for key, value in data.items() if key in RECORD_FIELDS}
        yield name, record_from_json(data, f"{fields.where}: {name}")


def _check_version(fields: Fields) -> bool:
    """Refuse what another method or another format version has written; tell a newer minor one."""
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
        raise CorruptAdapterError(fields.message("tensors", "at least one parameter", "none"))
    patch = metadata.mode is Mode.SET
    for name, record in metadata.tensors.items():
        if "." not in name:
            raise CorruptAdapterError(fields.message(name, "a parameter of a named module", "none"))
        if record.digest is None or record.base_digest is None:
            raise CorruptAdapterError(fields.message(name, "a digest and a base_digest", "null"))
        if (record.merged_digest is not None) != patch:
            asked = "a merged_digest" if patch else "no merged_digest"
            raise CorruptAdapterError(fields.message(name, asked, str(record.merged_digest)))
        if record.encoding is Encoding.COMPACT:
            _check_streams(metadata, record, Fields({}, f"{fields.where}: {name}"))
    keys = Counter(key for record in metadata.tensors.values() for key in record.keys)
    for key, uses in keys.items():
        if uses > 1:
            raise CorruptAdapterError(
                fields.message(repr(key), "each checkpoint key once", f"{uses} uses")
            )


def _check_streams(metadata: AdapterMetadata, record: TensorRecord, fields: Fields) -> None:
    """Check what a compact record says of its streams against the adapter as a whole."""
    content = "values" if metadata.mode is Mode.SET else "scores"
    if record.streams.keys() != {"indices", content}:
        found = ", ".join(record.streams) or "none"
        raise CorruptAdapterError(fields.message("streams", f"indices and {content}", found))
    for kind, stream in record.streams.items():
        plain = index_dtype(record.numel) if kind == "indices" else DTYPES[metadata.values_dtype]
        coded = WEIGHT_DTYPES[record.dtype] if stream.coding in STEPS else plain
        frames = len(stream.planes(record.count, coded.itemsize))
        if len(stream.sizes) != frames:
            asked, found = f"bytes of {frames} frames", f"{len(stream.sizes)}"
            raise CorruptAdapterError(fields.message(f"streams: {kind}", asked, found))
        # Whoever loads by shape makes room for so many bytes before the first of them is seen.
        most = record.count * plain.itemsize + _FRAME_OVERHEAD_BYTES * frames
        if stream.size_bytes > most:
            asked, found = f"at most {most} bytes", f"{stream.size_bytes}"
            raise CorruptAdapterError(fields.message(f"streams: {kind}: bytes", asked, found))
    fits = metadata.may_need_base and metadata.values_dtype == "float32"
    if record.streams[content].coding in STEPS and not fits:
        asked = "scale 1 and values_dtype float32 beside steps"
        found = f"{metadata.scale} and {metadata.values_dtype}"
        raise CorruptAdapterError(fields.message(f"streams: {content}", asked, found))
