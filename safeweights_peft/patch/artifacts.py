"""Safety patches and safety maps in memory, and their entries as they are stored, checked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from safeweights_peft.delta import (
    Array,
    Hash,
    SparseDelta,
    check_finite,
    check_indices,
    index_dtype,
    refuse,
)
from safeweights_peft.errors import CorruptAdapterError, FormatError
from safeweights_peft.patch.codec import (
    decode,
    encode_content,
    encode_indices,
    encode_plain,
    take_steps,
    value_of,
)
from safeweights_peft.patch.groups import count_groups, find_groups, spread_groups
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Coding, check_coverage
from safeweights_peft.patch.records import Encoding, Mode, TensorRecord, check_state, tensor_key

Layout = tuple[Any, tuple[int, ...]]
"""A dtype (a foreign name if numpy has none) and a shape."""

BaseEntries = Callable[[str, TensorRecord, Array], Array]
"""Reads a base's entries, in their dtype, for a parameter's name, record and flat indices."""

# Limit on what a parameter's stored bytes may hold: zstd packs 30,000 zeros into one byte.
MAX_ENTRIES_PER_BYTE = 64


@dataclass(frozen=True, eq=False)
class Adapter:
    """A safety patch.

    Attributes:
        metadata: Its description, of mode "set".
        deltas: The change of each parameter, by its name in memory.

    Example:
        >>> from safeweights_peft import read_adapter
        >>> patch = read_adapter("demo/run/patch")
        >>> patch.metadata.scale, sum(delta.count for delta in patch.deltas.values())
        (1.0, ...)
    """

    metadata: AdapterMetadata
    deltas: dict[str, SparseDelta]

    @property
    def indices(self) -> dict[str, Array]:
        """The flat indices of each parameter's entries, as a safety map has them; ``(count,)``."""
        return {name: delta.indices for name, delta in self.deltas.items()}

    def values(self, name: str, base: Array) -> Array:
        """Return the values of a parameter, whatever the base; ``(count,)``."""
        return self.deltas[name].values


@dataclass(frozen=True, eq=False)
class SafetyMap:
    """A safety map.

    Attributes:
        metadata: Its description, of mode "spa".
        indices: The flat indices of each parameter's entries, by its name in memory; ``(count,)``.
        scores: The float32 score of each of these entries; ``(count,)``.

    Example:
        >>> from safeweights_peft import read_map
        >>> safety_map = read_map("demo/run/map")
        >>> name, scores = max(safety_map.scores.items(), key=lambda item: item[1].max())
        >>> f"{name}: {safety_map.indices[name][scores.argmax()]}"  # the entry of highest score
        'model.layers...weight: ...'
    """

    metadata: AdapterMetadata
    indices: dict[str, Array]
    scores: dict[str, Array]


@dataclass(frozen=True, eq=False)
class StoredEntries:
    """One parameter's stored entries, decoded and checked as far as possible without a base."""

    name: str  # with the file, for messages
    record: TensorRecord  # with the content digest
    indices: Array  # flat; (count,)
    content: Array  # values or scores, or the steps from the base's entries to the merged ones

    def values_at(self, base: Array) -> Array:
        """Return the values, given checked entries of the base; ``(count,)``."""
        if not self.record.needs_base:
            return self.content
        values = value_of(base, take_steps(base, self.content))
        check_finite(f"{self.name}: values", values)
        return values


@dataclass(frozen=True, eq=False)
class StoredPatch:
    """A safety patch as it was read; values may be steps from a base that is not read yet."""

    metadata: AdapterMetadata
    entries: dict[str, StoredEntries]

    @property
    def indices(self) -> dict[str, Array]:
        """The flat indices of each parameter's entries, as a safety map has them; ``(count,)``."""
        return {name: stored.indices for name, stored in self.entries.items()}

    def values(self, name: str, base: Array) -> Array:
        """Return the values of a parameter, given checked entries of the base; ``(count,)``."""
        return self.entries[name].values_at(base)

    def decode(self, base: BaseEntries | None = None) -> Adapter:
        """Decode all values; check the base's entries where values are steps from them."""
        deltas = {}
        for name, stored in self.entries.items():
            record, values = stored.record, stored.content
            if record.needs_base:
                if base is None:
                    raise FormatError(
                        f"{stored.name}: expected the base that its values are steps from, found "
                        "none; give the base, or use `safeweights convert --encoding plain`"
                    )
                entries = base(name, record, stored.indices)
                check_state(stored.name, entries, record)
                values = stored.values_at(entries)
            deltas[name] = SparseDelta._of_checked(record.shape, stored.indices, values)
        return Adapter(self.metadata, deltas)


AnyPatch = Adapter | StoredPatch
"""A safety patch, in memory or as it was read; both have ``metadata``, ``indices``, ``values``."""

Artifact = Adapter | StoredPatch | SafetyMap
"""A safety patch or a safety map; all have ``metadata`` and ``indices``."""


def in_encoding(metadata: AdapterMetadata, encoding: Encoding) -> AdapterMetadata:
    """Return metadata that asks for an encoding of every parameter."""
    tensors = {
        name: replace(record, encoding=encoding, streams={}, digest=None)
        for name, record in metadata.tensors.items()
    }
    return replace(metadata, tensors=tensors)


def stored_arrays(metadata: AdapterMetadata, name: str) -> dict[str, Layout]:
    """List dtype and shape of a parameter's stored tensors, indices first."""
    record = metadata.tensors[name]
    layouts: dict[str, Layout] = {}
    for kind in ("indices", metadata.mode.content):
        count = record.index_count if kind == "indices" else record.count
        stream, layout = record.stream(kind), (metadata.plain_dtype(record, kind), (count,))
        if stream.coding is not Coding.PLAIN:
            layout = np.dtype(np.uint8), (stream.size_bytes,)
        layouts[tensor_key(name, kind)] = layout
    return layouts


def check_layout(metadata: AdapterMetadata, header: Mapping[str, Layout], source: str) -> None:
    """Check the names, dtypes and shapes in a header against the config."""
    expected: dict[str, Layout] = {}
    for name, record in metadata.tensors.items():
        layouts = stored_arrays(metadata, name)
        expected |= layouts
        size_bytes = sum(dtype.itemsize * size for dtype, (size,) in layouts.values())
        if record.count > MAX_ENTRIES_PER_BYTE * size_bytes:
            most = f"at most {MAX_ENTRIES_PER_BYTE} entries for each of {size_bytes} bytes"
            refuse(f"{source}: {name}", most, record.count)
    for key in header:
        if key not in expected:
            names = "only tensors that adapter_config.json names"
            refuse(f"{source}: {key[:200]!r}", names, "this one")
    for key, (dtype, shape) in expected.items():
        if header.get(key) != (dtype, shape):
            found = f"{header[key][0]} {list(header[key][1])}" if key in header else "nothing"
            refuse(f"{source}: {key}", f"{dtype} {list(shape)}", found)


def check_tensors(
    metadata: AdapterMetadata, tensors: Mapping[str, Array], source: str
) -> dict[str, StoredEntries]:
    """Check all tensors of an adapter: names, dtypes, sizes, order, bounds, values, digests."""
    header = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    check_layout(metadata, header, source)
    return {name: decode_entries(metadata, name, tensors, source) for name in metadata.tensors}


def decode_entries(
    metadata: AdapterMetadata,
    name: str,
    tensors: Mapping[str, Array],
    source: str,
    mapped: bool = False,
) -> StoredEntries:
    """Decode and check one parameter's entries: order, bounds, finite values, digests."""
    record, kind = metadata.tensors[name], metadata.mode.content
    keys = tensor_key(name, "indices"), tensor_key(name, kind)
    where = [f"{source}: {key}" for key in keys]
    first, second = (tensors[key] for key in keys)
    indices = decode(where[0], record, "indices", metadata.plain_dtype(record, "indices"), first)
    if indices is first:  # decoded gaps ascend, and end in range, already
        first, indices = _check_plain(where[0], record, first, mapped)
    check_coverage(f"{source}: {name}", record.blocks, indices)
    content = decode(where[1], record, kind, metadata.plain_dtype(record, kind), second)
    if content is second and mapped:  # a mapped file can change after the check
        second = content = np.array(content)
    if not record.needs_base:
        check_finite(where[1], content)
    stored_digest, content_digest = _digests(metadata.mode, (first, second), (indices, content))
    for expected, found in (
        (record.digest, stored_digest),
        (record.content_digest, content_digest),
    ):
        if expected not in (None, found):
            raise CorruptAdapterError(
                f"{source}: {name}: expected digest {expected}, found {found}; "
                "fetch the adapter again"
            )
    record = replace(record, content_digest=content_digest)
    return StoredEntries(f"{source}: {name}", record, indices, content)


def _check_plain(
    where: str, record: TensorRecord, stored: Array, mapped: bool
) -> tuple[Array, Array]:
    """Check flat indices, or the numbers of rows or columns; return them, and flat indices."""
    group = record.encoding.group
    if group is None:
        indices = check_indices(where, stored, record.shape, copy=mapped)
        return indices, indices
    number, _ = count_groups(record.shape, group)
    numbers = check_indices(where, stored, (number,), copy=mapped)
    return numbers, spread_groups(numbers, group, record.shape)


def encode_entries(
    mode: Mode,
    record: TensorRecord,
    indices: Array,
    content: Array,
    base: Array | None,
    *,
    may_group: bool = True,
) -> tuple[TensorRecord, Array, Array]:
    """Encode one parameter's entries as its record asks; compact only where that is smaller.

    Whole rows and columns that are not compact are stored by number.
    """
    narrow = indices.astype(index_dtype(record.numel), copy=False)
    first, second = encode_plain(narrow), encode_plain(content)
    plain, encoding = (first.stored, second.stored), Encoding.COMPACT
    if record.encoding is Encoding.COMPACT:
        first, second = encode_indices(plain[0], record.numel), encode_content(content, base)
        size_bytes = first.stored.nbytes + second.stored.nbytes
        if indices.size > MAX_ENTRIES_PER_BYTE * size_bytes:
            second = encode_plain(content)
    streams = {"indices": first.stream, mode.content: second.stream}
    if all(stream.coding is Coding.PLAIN for stream in streams.values()):
        streams, encoding = {}, Encoding.PLAIN
        if may_group and (found := find_groups(narrow, record.shape)):
            group, numbers = found
            first, encoding = encode_plain(numbers), Encoding(f"{group}s")
    stored_digest, content_digest = _digests(mode, (first.stored, second.stored), plain)
    described = replace(
        record,
        count=indices.size,
        encoding=encoding,
        streams=streams,
        digest=stored_digest,
        content_digest=content_digest,
    )
    return described, first.stored, second.stored


def _digests(mode: Mode, stored: tuple[Array, Array], plain: tuple[Array, Array]) -> list[str]:
    """Digest the stored bytes, then the content in any encoding; hash no array twice."""
    first = Hash(stored[0])
    content = first if plain[0] is stored[0] else Hash(plain[0])
    whole = Hash(stored[1], after=first)
    if mode is Mode.SPA:  # values show in the merged digest, scores nowhere else
        is_plain = content is first and plain[1] is stored[1]
        content = whole if is_plain else Hash(plain[1], after=content)
    return [str(whole), str(content)]
