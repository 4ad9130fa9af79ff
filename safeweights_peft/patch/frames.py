"""Byte planes as zstd frames: compressed, and decompressed without trusting a byte of them.

Here live the only calls of zstd. What the planes mean does not: see ``codec``. A frame of a
stranger says itself how much it holds; it is decompressed only if that is what the record implies.
"""

import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from safeweights_peft.delta import Array
from safeweights_peft.errors import CorruptAdapterError

MAX_WINDOW_BYTES = 2**23
"""Limit on a frame's window, as zstd recommends that every reader allows."""

_LEVELS = (1, 9)  # the entropy of noise, and what repeats far apart


class _Thread(threading.local):
    """What a thread keeps: a decompressor takes as long to make as 10,000 bytes to decompress."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_thread = _Thread()


def split(array: Array) -> list[Array]:
    """Split numbers into planes: all lowest bytes, then all second bytes, and so on."""
    planes = np.ascontiguousarray(array).view(np.uint8).reshape(array.size, array.itemsize)
    return [np.ascontiguousarray(planes[:, each]) for each in range(array.itemsize)]


def join(planes: Sequence[Array]) -> Array:
    """Put planes together again; undoes :func:`split`."""
    if len(planes) == 1:
        return planes[0]
    joined = np.empty((planes[0].size, len(planes)), np.uint8)
    for each, plane in enumerate(planes):
        joined[:, each] = plane
    return joined.view(f"<u{len(planes)}").reshape(-1)


def compress(planes: Sequence[Array]) -> list[bytes]:
    """Compress each plane by itself, at the level that makes it smallest."""
    return [min((_compress(plane, level) for level in _LEVELS), key=len) for plane in planes]


def decompress(
    source: str, stored: Array, sizes: Sequence[int], lengths: Sequence[int]
) -> list[Array]:
    """Decompress planes, each from one frame."""
    planes = []
    start = 0
    for size, length in zip(sizes, lengths, strict=True):
        frame = stored[start : start + size]
        planes.append(_decompress(source, frame, length))
        start += size
    return planes


def _compress(plane: Array, level: int) -> bytes:
    compressor = zstandard.ZstdCompressor(
        level=level, write_checksum=False, write_content_size=True, write_dict_id=False
    )
    return compressor.compress(plane.data)


def _decompress(source: str, frame: Array, length: int) -> Array:
    """Decompress one frame of untrusted bytes, after its sizes are checked."""
    try:
        told = zstandard.get_frame_parameters(frame.data)
        if told.content_size != length or told.dict_id:
            raise CorruptAdapterError(
                f"{source}: expected a zstd frame of {length} bytes, found one of "
                f"{told.content_size}; do not use this adapter"
            )
        if told.window_size > MAX_WINDOW_BYTES and told.window_size != length:
            raise CorruptAdapterError(
                f"{source}: expected a zstd window of at most {MAX_WINDOW_BYTES} bytes, found "
                f"{told.window_size}; do not use this adapter"
            )
        content = _thread.decompressor.decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as reason:
        raise CorruptAdapterError(
            f"{source}: expected a whole zstd frame of {length} bytes, found {reason}; "
            "fetch the adapter again"
        ) from reason
    if len(content) != length:
        raise CorruptAdapterError(
            f"{source}: expected a zstd frame of {length} bytes, found {len(content)}; "
            "do not use this adapter"
        )
    return np.frombuffer(content, np.uint8)
