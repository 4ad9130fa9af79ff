"""How indices, values and scores are laid out in the file: one pair of pure functions per coding.

Here live coding and decoding of one parameter's entries. Checks on what was decoded do not: see
``entries``. Nothing that a stream says of itself is believed: counts, sums and sizes are checked
before they are used. The normative text is "Encodings" in ``docs/format.md``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from safeweights_peft.delta import Array, add_rounded, bits_differ, index_dtype
from safeweights_peft.errors import CorruptAdapterError
from safeweights_peft.patch.frames import compress, join, split
from safeweights_peft.patch.streams import GAPS, STEPS, Coding, Stream


class Coded(NamedTuple):
    """A stream, and the array that is stored for it.

    Attributes:
        stream: What the record says of it.
        stored: The array.
    """

    stream: Stream
    stored: Array


def encode_indices(indices: Array, numel: int) -> Coded:
    """Code ascending flat indices in the way that takes the fewest bytes."""
    plain = indices.astype(index_dtype(numel), copy=False)
    found = [Coded(Stream(Coding.PLAIN), plain)]
    if indices.size:
        gaps = np.diff(plain.astype(np.int64, copy=False), prepend=-1) - 1
        found += [coded for coding in GAPS if (coded := _encode_gaps(gaps, coding)) is not None]
    return min(found, key=lambda each: each.stored.nbytes)


def decode_gaps(source: str, planes: Sequence[Array], count: int, numel: int) -> Array:
    """Add up gaps to flat indices."""
    symbols = join(planes)
    ends = symbols != np.iinfo(symbols.dtype).max
    found = int(np.count_nonzero(ends))
    if not ends[-1] or found != count:
        also = "" if ends[-1] else " and an escape at the end"
        raise CorruptAdapterError(
            f"{source}: expected {count} gaps, found {found}{also}; do not use this adapter"
        )
    moves = symbols + ends  # from one index to the next; an escape is as long as it says
    last = int(moves.sum(dtype=np.uint64)) - 1
    if last >= numel:
        raise CorruptAdapterError(
            f"{source}: expected indices from 0 to {numel - 1}, found {last}; "
            "do not use this adapter"
        )
    indices: Array = np.cumsum(moves, dtype=index_dtype(numel))[ends]
    indices -= 1
    return indices


def encode_floats(values: Array) -> Coded:
    """Code values or scores as they are, in the way that takes the fewest bytes."""
    plain = Coded(Stream(Coding.PLAIN), np.ascontiguousarray(values))
    if not values.size:
        return plain
    planes = _pack(Coding.PLANES, 0, split(values))
    return min(plain, planes, key=lambda each: each.stored.nbytes)


def encode_steps(base: Array, values: Array) -> Coded | None:
    """Code values as steps from the base's entries to the merged ones, if that is possible."""
    merged = add_rounded(base, values)
    decoded = value_of(base, merged)
    if not values.size or not np.isfinite(decoded).all():
        return None
    if bits_differ(add_rounded(base, decoded), merged).any():
        return None
    steps = _ordinals(merged) - _ordinals(base)
    codings = [coding for coding in STEPS if coding.width <= base.itemsize]
    return min(
        (_encode_steps(steps, coding) for coding in codings), key=lambda each: each.stored.nbytes
    )


def decode_steps(source: str, stream: Stream, planes: Sequence[Array], itemsize: int) -> Array:
    """Put steps together, which needs no base yet."""
    width = stream.coding.width
    narrow = join(planes[:width])
    if width == itemsize:
        return narrow
    signed = narrow.view(f"i{width}")
    escaped = signed == np.iinfo(signed.dtype).min
    found = int(np.count_nonzero(escaped))
    if found != stream.escapes:
        raise CorruptAdapterError(
            f"{source}: expected {stream.escapes} escapes, found {found}; do not use this adapter"
        )
    steps: Array = signed.astype(f"i{itemsize}").view(f"u{itemsize}")
    if stream.escapes:
        steps[escaped] = join(planes[width:])
    return steps


def take_steps(base: Array, steps: Array) -> Array:
    """Go from the base's entries to the merged ones."""
    ordinals = _ordinals(base)
    ordinals += steps
    top = ordinals.dtype.type(1 << (8 * base.itemsize - 1))
    flip = (ordinals >> (8 * base.itemsize - 1)) - ordinals.dtype.type(1)
    flip |= top
    ordinals ^= flip
    return ordinals.view(base.dtype)


def value_of(base: Array, merged: Array) -> Array:
    """Tell the values that steps stand for: the float32 differences.

    A sum is never -0.0 unless it is rounded from below, so for this result alone the value is the
    float32 number below the difference.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        values: Array = merged.astype(np.float32)
        values -= base.astype(np.float32)
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
    """Code gaps less 1; None if they take more escapes than there are gaps."""
    full = 2 ** (8 * coding.width) - 1
    repeats = gaps // full
    escapes = int(repeats.sum())
    if escapes > gaps.size:
        return None
    symbols = np.full(gaps.size + escapes, full, f"<u{coding.width}")
    symbols[np.cumsum(repeats + 1) - 1] = gaps % full
    return _pack(coding, escapes, split(symbols))


def _encode_steps(steps: Array, coding: Coding) -> Coded:
    """Code steps that wrap around; those that the coding is too narrow for follow by themselves."""
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
