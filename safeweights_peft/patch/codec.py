"""Encode and decode indices, values and scores; see "Encodings" in ``docs/format.md``."""

# Streams come from untrusted files: counts, sums and sizes are checked before they are used.

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import zstandard

from safeweights_peft.delta import (
    WEIGHT_DTYPES,
    Array,
    add_rounded,
    bits_differ,
    index_dtype,
    refuse,
)
from safeweights_peft.errors import CorruptAdapterError
from safeweights_peft.patch.placement import GAPS, STEPS, Coding, Stream
from safeweights_peft.patch.records import TensorRecord

# A frame's window takes memory to read; zstd recommends that every reader allows 8 MiB.
_MAX_WINDOW_BYTES = 2**23
_LEVELS = (1, 9)  # the entropy of noise, and what repeats far apart


class Coded(NamedTuple):
    """A stream as a record describes it, and the array that is stored for it."""

    stream: Stream
    stored: Array


def encode_indices(indices: Array, numel: int) -> Coded:
    """Encode ascending flat indices in the fewest bytes."""
    plain = encode_plain(indices.astype(index_dtype(numel), copy=False))
    candidates: list[Coded | None] = [plain]
    if indices.size:
        gaps = np.diff(plain.stored.astype(np.int64, copy=False), prepend=-1) - 1
        candidates += [_encode_gaps(gaps, coding) for coding in GAPS]
    return min(filter(None, candidates), key=lambda coded: coded.stored.nbytes)


def encode_content(content: Array, base: Array | None = None) -> Coded:
    """Encode values or scores in the fewest bytes; as steps only if a base is given."""
    candidates = [encode_plain(content)]
    if content.size:
        candidates.append(_pack(Coding.PLANES, 0, split(content)))
    if content.size and base is not None:
        candidates += encode_steps(base, content)
    return min(candidates, key=lambda coded: coded.stored.nbytes)


def encode_steps(base: Array, values: Array) -> list[Coded]:
    """Encode values as steps from base entries to merged ones, in every width."""
    merged = add_rounded(base, values)
    decoded = value_of(base, merged)
    if not np.isfinite(decoded).all() or bits_differ(add_rounded(base, decoded), merged).any():
        return []  # no step stands for such values
    steps = _ordinals(merged) - _ordinals(base)
    return [_encode_steps(steps, coding) for coding in STEPS if coding.width <= base.itemsize]


def encode_plain(entries: Array) -> Coded:
    """Store entries as they are."""
    return Coded(Stream(Coding.PLAIN), np.ascontiguousarray(entries))


def decode(
    source: str, record: TensorRecord, kind: str, plain: np.dtype[Any], stored: Array
) -> Array:
    """Decode a stream to its plain dtype, or to steps; return a plain one as it is, unchecked."""
    stream = record.stream(kind)
    if stream.coding is Coding.PLAIN:
        return stored
    planes = decompress(source, stored, stream.sizes, record.frames(kind, plain))
    match stream.coding.family:
        case "gaps":
            return decode_gaps(source, planes, record.count, record.numel)
        case "steps":
            return decode_steps(source, stream, planes, WEIGHT_DTYPES[record.dtype].itemsize)
    return join(planes).view(plain)


def decode_gaps(source: str, planes: Sequence[Array], count: int, numel: int) -> Array:
    """Add up gaps to ascending flat indices below ``numel``."""
    symbols = join(planes)
    ends = symbols != np.iinfo(symbols.dtype).max
    found = int(np.count_nonzero(ends))
    if not ends[-1] or found != count:
        also = "" if ends[-1] else " and an escape at the end"
        refuse(source, f"{count} gaps", f"{found}{also}")
    moves = symbols + ends  # from one index to the next; an escape is as long as it says
    last = int(moves.sum(dtype=np.uint64)) - 1
    if last >= numel:
        refuse(source, f"indices from 0 to {numel - 1}", last)
    indices: Array = np.cumsum(moves, dtype=index_dtype(numel))[ends]
    indices -= 1
    return indices


def decode_steps(source: str, stream: Stream, planes: Sequence[Array], itemsize: int) -> Array:
    """Join the byte planes of steps, which wrap around; this needs no base."""
    width = stream.coding.width
    narrow = join(planes[:width])
    if width == itemsize:
        return narrow
    signed = narrow.view(f"i{width}")
    escaped = signed == np.iinfo(signed.dtype).min
    found = int(np.count_nonzero(escaped))
    if found != stream.escapes:
        refuse(source, f"{stream.escapes} escapes", found)
    steps: Array = signed.astype(f"i{itemsize}").view(f"u{itemsize}")
    if stream.escapes:
        steps[escaped] = join(planes[width:])
    return steps


def take_steps(base: Array, steps: Array) -> Array:
    """Step from base entries to merged ones."""
    ordinals = _ordinals(base)
    ordinals += steps
    top = ordinals.dtype.type(1 << (8 * base.itemsize - 1))
    flip = (ordinals >> (8 * base.itemsize - 1)) - ordinals.dtype.type(1)
    flip |= top
    ordinals ^= flip
    return ordinals.view(base.dtype)


def value_of(base: Array, merged: Array) -> Array:
    """Return the float32 values that steps from ``base`` to ``merged`` stand for."""
    with np.errstate(over="ignore", invalid="ignore"):
        values: Array = merged.astype(np.float32)
        values -= base.astype(np.float32)
    # A sum rounds to -0.0 only from below zero, so there the value is the float32 number just below
    # the difference.
    bits = merged.view(f"u{merged.itemsize}")
    below = bits == bits.dtype.type(1 << (8 * merged.itemsize - 1))
    if below.any():
        values[below] = np.nextafter(-base[below].astype(np.float32), np.float32(-np.inf))
    return values


def _pack(coding: Coding, escapes: int, planes: list[Array]) -> Coded:
    frames = compress(planes)
    stored = np.frombuffer(b"".join(frames), np.uint8)
    return Coded(Stream(coding, escapes, tuple(map(len, frames))), stored)


def _encode_gaps(gaps: Array, coding: Coding) -> Coded | None:
    """Encode gaps less 1; return None if they need more escapes than there are gaps."""
    full = 2 ** (8 * coding.width) - 1
    repeats = gaps // full
    escapes = int(repeats.sum())
    if escapes > gaps.size:
        return None
    symbols = np.full(gaps.size + escapes, full, f"<u{coding.width}")
    symbols[np.cumsum(repeats + 1) - 1] = gaps % full
    return _pack(coding, escapes, split(symbols))


def _encode_steps(steps: Array, coding: Coding) -> Coded:
    """Encode steps, which wrap around; store those too large for the width in full, at the end."""
    width, itemsize = coding.width, steps.itemsize
    if width == itemsize:
        return _pack(coding, 0, split(steps))
    signed = steps.view(f"i{itemsize}")
    limit = np.iinfo(f"i{width}")
    wide = (signed <= limit.min) | (signed > limit.max)
    narrow = np.where(wide, limit.min, signed).astype(f"<i{width}")
    escapes = int(np.count_nonzero(wide))
    planes = split(narrow) + (split(steps[wide]) if escapes else [])
    return _pack(coding, escapes, planes)


def _ordinals(entries: Array) -> Array:
    """Map floats to integers in the same order, from the most negative float to the largest."""
    bits = entries.view(f"u{entries.itemsize}")
    sign = 8 * entries.itemsize - 1
    flip = (entries.view(f"i{entries.itemsize}") >> sign).view(bits.dtype)
    flip |= bits.dtype.type(1 << sign)
    flip ^= bits
    return flip


def split(array: Array) -> list[Array]:
    """Split numbers into planes: all lowest bytes, then all second bytes, and so on."""
    planes = np.ascontiguousarray(array).view(np.uint8).reshape(array.size, array.itemsize)
    return [np.ascontiguousarray(planes[:, place]) for place in range(array.itemsize)]


def join(planes: Sequence[Array]) -> Array:
    """Join planes again; undo :func:`split`."""
    if len(planes) == 1:
        return planes[0]
    joined = np.empty((planes[0].size, len(planes)), np.uint8)
    for place, plane in enumerate(planes):
        joined[:, place] = plane
    return joined.view(f"<u{len(planes)}").reshape(-1)


def compress(planes: Sequence[Array]) -> list[bytes]:
    """Compress each plane by itself, at the level that makes it smallest."""
    compressors = [
        zstandard.ZstdCompressor(
            level=level, write_checksum=False, write_content_size=True, write_dict_id=False
        )
        for level in _LEVELS
    ]
    return [
        min((compressor.compress(plane.data) for compressor in compressors), key=len)
        for plane in planes
    ]


def decompress(
    source: str, stored: Array, sizes: Sequence[int], lengths: Sequence[int]
) -> list[Array]:
    """Decompress planes, each from one frame."""
    # One per stream: threads can't share it, and making it costs as much as a small frame.
    decompressor = zstandard.ZstdDecompressor()
    frames = np.split(stored, np.cumsum(sizes)[:-1])
    return [
        _decompress(source, decompressor, frame, length)
        for frame, length in zip(frames, lengths, strict=True)
    ]


def _decompress(
    source: str, decompressor: zstandard.ZstdDecompressor, frame: Array, length: int
) -> Array:
    """Check the sizes in an untrusted frame's header, then decompress it."""
    try:
        header = zstandard.get_frame_parameters(frame.data)
        if header.content_size != length or header.dict_id:
            refuse(source, f"a zstd frame of {length} bytes", f"one of {header.content_size}")
        if header.window_size > _MAX_WINDOW_BYTES and header.window_size != length:
            most = f"a zstd window of at most {_MAX_WINDOW_BYTES} bytes"
            refuse(source, most, header.window_size)
        content = decompressor.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as reason:
        raise CorruptAdapterError(
            f"{source}: expected a whole zstd frame of {length} bytes, found {reason}; "
            "fetch the adapter again"
        ) from reason
    if len(content) != length:
        refuse(source, f"a zstd frame of {length} bytes", len(content))
    return np.frombuffer(content, np.uint8)
