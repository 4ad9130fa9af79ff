"""One parameter's entries in the file: what is stored for them, and what it decodes to, checked.

Here live the checks on stored arrays, which a state dict goes through as well as a file. Codings
stand in ``codec``, whole files in ``io``. Values that are stored as steps need the base's entries;
all else is checked without them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from safeweights_peft.delta import (
    DTYPES,
    WEIGHT_DTYPES,
    Array,
    Hash,
    check_finite,
    check_indices,
    index_dtype,
)
from safeweights_peft.errors import CorruptAdapterError, FormatError
from safeweights_peft.patch.blocks import check_coverage
from safeweights_peft.patch.codec import (
    Coded,
    decode_gaps,
    decode_steps,
    encode_floats,
    encode_indices,
    encode_steps,
    take_steps,
    value_of,
)
from safeweights_peft.patch.frames import decompress, join
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import (
    Encoding,
    Mode,
    TensorRecord,
    check_state,
    indices_key,
    scores_key,
    values_key,
)
from safeweights_peft.patch.streams import MAX_ENTRIES_PER_BYTE, Coding, Stream

Layout = tuple[Any, tuple[int, ...]]  # dtype (a foreign name if numpy has none), shape

BaseEntries = Callable[[str, TensorRecord, Array], Array]
"""Gives the base's entries of a parameter, by name, record and flat indices, in its dtype."""


@dataclass(frozen=True, eq=False)
class StoredEntries:
    """What is stored of one parameter, decoded and checked as far as that needs no base.

    Attributes:
        name: The parameter, as messages call it: with the file's name.
        record: Its record, with the content digest.
        indices: Flat indices; ``(count,)``.
        content: Values or scores; or the steps from the base's entries to the merged ones.
    """

    name: str
    record: TensorRecord
    indices: Array
    content: Array

    def values(self, base: Array | None = None) -> Array:
        """Give the values."""
        if not self.record.needs_base:
            return self.content
        if base is None:
            raise FormatError(
                f"{self.name}: expected the base that its values are steps from, found none; give "
                "the base, or use `safeweights convert --encoding plain`"
            )
        check_state(self.name, base, self.record)
        return self.values_at(base)

    def values_at(self, base: Array) -> Array:
        """Give the values, from entries of the base that were checked."""
        if not self.record.needs_base:
            return self.content
        values = value_of(base, take_steps(base, self.content))
        check_finite(f"{self.name}: values", values)
        return values


def stored_arrays(metadata: AdapterMetadata, name: str) -> dict[str, Layout]:
    """Tell what is stored of a parameter, from the config alone."""
    record = metadata.tensors[name]
    kinds = {
        "indices": (indices_key(name), index_dtype(record.numel)),
        content_kind(metadata): (content_key(metadata, name), DTYPES[metadata.values_dtype]),
    }
    layouts: dict[str, Layout] = {}
    for kind, (key, dtype) in kinds.items():
        stream = record.stream(kind)
        coded = stream.coding is not Coding.PLAIN
        size = stream.size_bytes if coded else record.count
        layouts[key] = (np.dtype(np.uint8) if coded else dtype, (size,))
    return layouts


def content_kind(metadata: AdapterMetadata) -> str:
    """Name what goes with the indices."""
    return "values" if metadata.mode is Mode.SET else "scores"


def content_key(metadata: AdapterMetadata, name: str) -> str:
    """Name the safetensors entry that goes with the indices."""
    return values_key(name) if metadata.mode is Mode.SET else scores_key(name)


def check_layout(metadata: AdapterMetadata, found: Mapping[str, Layout], source: str) -> None:
    """Check names, dtypes and shapes, which a header alone tells."""
    expected: dict[str, Layout] = {}
    for name in metadata.tensors:
        expected |= stored_arrays(metadata, name)
    for key in found:
        if key not in expected:
            raise CorruptAdapterError(
                f"{source}: {key[:200]!r}: expected only tensors that adapter_config.json names, "
                "found this one; do not use this adapter"
            )
    for key, (dtype, shape) in expected.items():
        if found.get(key) != (dtype, shape):
            now = f"{found[key][0]} {list(found[key][1])}" if key in found else "nothing"
            raise CorruptAdapterError(
                f"{source}: {key}: expected {dtype} {list(shape)}, found {now}; "
                "do not use this adapter"
            )
    for name, record in metadata.tensors.items():
        size = sum(
            dtype.itemsize * size for dtype, (size,) in stored_arrays(metadata, name).values()
        )
        if record.count > MAX_ENTRIES_PER_BYTE * size:
            raise CorruptAdapterError(
                f"{source}: {name}: expected at most {MAX_ENTRIES_PER_BYTE} entries for each of "
                f"{size} bytes, found {record.count}; do not use this adapter"
            )


def decode_entries(
    metadata: AdapterMetadata,
    name: str,
    tensors: Mapping[str, Array],
    source: str,
    mapped: bool = False,
) -> StoredEntries:
    """Decode one parameter's entries, and check them: order, bounds, finite values, digests."""
    record, keys = metadata.tensors[name], (indices_key(name), content_key(metadata, name))
    first, second = (tensors[key] for key in keys)
    indices = _decode_indices(f"{source}: {keys[0]}", record, first)
    if indices is first:
        first = indices = check_indices(f"{source}: {keys[0]}", first, record.shape, copy=mapped)
    check_coverage(f"{source}: {name}", record.blocks, indices)
    content = _decode_content(f"{source}: {keys[1]}", metadata, name, second)
    if content is second and mapped:
        second = content = np.array(content)
    if not record.needs_base:
        check_finite(f"{source}: {keys[1]}", content)
    stored_digest, plain_digest = _digests(metadata.mode, (first, second), (indices, content))
    for expected, found in (
        (record.digest, stored_digest),
        (record.content_digest, plain_digest),
    ):
        if expected not in (None, found):
            raise CorruptAdapterError(
                f"{source}: {name}: expected digest {expected}, found {found}; "
                "fetch the adapter again"
            )
    record = replace(record, content_digest=plain_digest)
    return StoredEntries(f"{source}: {name}", record, indices, content)


def encode_entries(
    mode: Mode, record: TensorRecord, indices: Array, content: Array, base: Array | None
) -> tuple[TensorRecord, Array, Array]:
    """Lay out one parameter's entries in the record's encoding; compact, if that is smaller."""
    kind = "values" if mode is Mode.SET else "scores"
    plain = indices.astype(index_dtype(record.numel), copy=False)
    coded = {
        "indices": Coded(Stream(Coding.PLAIN), np.ascontiguousarray(plain)),
        kind: Coded(Stream(Coding.PLAIN), np.ascontiguousarray(content)),
    }
    if record.encoding is Encoding.COMPACT:
        coded["indices"] = encode_indices(plain, record.numel)
        coded[kind] = encode_floats(content)
        steps = None if base is None else encode_steps(base, content)
        if steps is not None and steps.stored.nbytes < coded[kind].stored.nbytes:
            coded[kind] = steps
        if plain.size > MAX_ENTRIES_PER_BYTE * sum(each.stored.nbytes for each in coded.values()):
            coded[kind] = Coded(Stream(Coding.PLAIN), np.ascontiguousarray(content))
    streams = {each: part.stream for each, part in coded.items()}
    if all(stream.coding is Coding.PLAIN for stream in streams.values()):
        streams = {}
    first, second = (part.stored for part in coded.values())
    stored_digest, plain_digest = _digests(mode, (first, second), (plain, content))
    described = replace(
        record,
        count=plain.size,
        encoding=Encoding.COMPACT if streams else Encoding.PLAIN,
        streams=streams,
        digest=stored_digest,
        content_digest=plain_digest,
    )
    return described, first, second


def _digests(mode: Mode, stored: tuple[Array, Array], plain: tuple[Array, Array]) -> list[str]:
    """Digest stored bytes, then what an adapter is whatever its encoding; hash no array twice."""
    first = Hash().then(stored[0])
    content = first if plain[0] is stored[0] else Hash().then(plain[0])
    whole = first.then(stored[1])
    if mode is Mode.SPA:  # what values do is in the merged digest, what scores are nowhere else
        is_plain = content is first and plain[1] is stored[1]
        content = whole if is_plain else content.then(plain[1])
    return [str(whole), str(content)]


def _decode_indices(source: str, record: TensorRecord, stored: Array) -> Array:
    stream = record.stream("indices")
    if stream.coding is not Coding.PLAIN:
        planes = decompress(source, stored, stream.sizes, stream.planes(record.count))
        return decode_gaps(source, planes, record.count, record.numel)
    return stored


def _decode_content(source: str, metadata: AdapterMetadata, name: str, stored: Array) -> Array:
    record = metadata.tensors[name]
    stream = record.stream(content_kind(metadata))
    content = stored
    if stream.coding is not Coding.PLAIN:
        base, dtype = WEIGHT_DTYPES[record.dtype], DTYPES[metadata.values_dtype]
        itemsize = dtype.itemsize if stream.coding is Coding.PLANES else base.itemsize
        lengths = stream.planes(record.count, itemsize)
        planes = decompress(source, stored, stream.sizes, lengths)
        if record.needs_base:
            return decode_steps(source, stream, planes, itemsize)
        content = join(planes).view(dtype)
    return content
