"""Read tensors, or some entries of them, from a checkpoint directory.

Here live lazy reads: a shard's header when its first key is asked for, and of the data only the
pages that are touched. Adapters do not.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from safeweights_peft.checkpoint.index import CheckpointIndex, open_index
from safeweights_peft.checkpoint.windows import WINDOW_BYTES, windows
from safeweights_peft.delta import Array
from safeweights_peft.errors import CheckpointError
from safeweights_peft.files import STORED_DTYPES, StoredTensor, read_header


@dataclass(frozen=True)
class TensorInfo:
    """Where and what a tensor of a checkpoint is.

    Attributes:
        shape: Its shape.
        dtype: Its dtype by torch's name; one that numpy cannot read keeps safetensors' name.
        shard: File name of its shard.
        offset: Position of its first byte in the shard.
        size_bytes: Its number of bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    shard: str
    offset: int
    size_bytes: int


class CheckpointReader:
    """A checkpoint directory, opened for reading.

    Attributes:
        index: Its shards.
    """

    index: CheckpointIndex

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Find the shards."""
        self.index = open_index(Path(directory))
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._stamps: dict[str, tuple[int, int, int]] = {}

    def copied_to(self, directory: Path) -> Self:
        """Open a copy that is being made of this checkpoint, before its files are there."""
        copy = type(self).__new__(type(self))
        copy.index = replace(self.index, directory=directory)
        copy._headers = {shard: self._header(shard) for shard in self.index.shards}
        copy._stamps = {}
        return copy

    def check_unchanged(self, shard: str) -> None:
        """Check that a shard is the file whose header was read, as it was then."""
        if self._stamp(shard) != self._stamps[shard]:
            raise CheckpointError(
                f"{self.directory / shard}: expected it to stay as it is, found it changed "
                "meanwhile; try again when nothing else writes to it"
            )

    @property
    def directory(self) -> Path:
        """The directory."""
        return self.index.directory

    @property
    def size_bytes(self) -> int:
        """Size of all shards."""
        return sum((self.directory / name).stat().st_size for name in self.index.shards)

    def keys(self) -> list[str]:
        """List the tensors."""
        return sorted(self.index.weight_map)

    def unlisted(self) -> list[str]:
        """List tensors that stand in a shard although the index doesn't name them."""
        headers = (self._header(shard) for shard in self.index.shards)
        return sorted({key for header in headers for key in header} - self.index.weight_map.keys())

    def __contains__(self, key: str) -> bool:
        """Tell whether the checkpoint has a key."""
        return key in self.index.weight_map

    def find_key(self, key: str) -> str | None:
        """Find a tensor whose key may have lost its prefix, or got one; refuse one of several."""
        if key in self:
            return key
        others = [key.removeprefix(prefix) for prefix in _prefixes(key)]
        others += [prefix + key for prefix in self._prefixes]
        matches = sorted({other for other in others if other in self})
        if len(matches) > 1:
            raise CheckpointError(
                f"{self.directory}: expected one tensor {key}, whatever its prefix, found "
                f"{' and '.join(matches)}; use the model class that the adapter was made with"
            )
        return matches[0] if matches else None

    @cached_property
    def _prefixes(self) -> set[str]:
        return {prefix for key in self.index.weight_map for prefix in _prefixes(key)}

    def info(self, key: str) -> TensorInfo:
        """Look a tensor up, without reading it."""
        shard, stored = self._stored(key)
        dtype = STORED_DTYPES[stored.dtype].name if stored.dtype in STORED_DTYPES else stored.dtype
        return TensorInfo(stored.shape, dtype, shard, stored.offset, stored.size_bytes)

    def read(self, key: str) -> Array:
        """Read a whole tensor."""
        path, stored = self._readable(key)
        return np.array(stored.open(path)).reshape(stored.shape)

    def read_windows(self, key: str) -> Iterator[Array]:
        """Read a whole tensor as bytes, one window after the other, whatever its dtype."""
        info = self.info(key)
        path, end = self.directory / info.shard, info.offset + info.size_bytes
        for start in range(info.offset, end, WINDOW_BYTES):
            yield np.fromfile(path, np.uint8, min(WINDOW_BYTES, end - start), offset=start)

    def gather(self, key: str, flat_indices: Array) -> Array:
        """Read some entries of a tensor; only the pages that hold them are touched."""
        path, stored = self._readable(key)
        dtype = STORED_DTYPES[stored.dtype]
        check_bounds(key, flat_indices, stored.size_bytes // dtype.itemsize)
        entries = np.empty(flat_indices.shape, dtype)
        for window, local, positions in windows(path, stored.offset, dtype, flat_indices):
            entries[positions] = window[local]
        return entries

    def gather_pieces(
        self, pieces: Mapping[str, tuple[Array | slice, Array]], count: int, dtype: np.dtype[Any]
    ) -> Array:
        """Read entries that lie in several tensors."""
        entries = np.empty(count, dtype)
        for key, (positions, local) in pieces.items():
            entries[positions] = self.gather(key, local)
        return entries

    def _readable(self, key: str) -> tuple[Path, StoredTensor]:
        shard, stored = self._stored(key)
        path = self.directory / shard
        if stored.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{path}: {key}: expected one of {', '.join(STORED_DTYPES)}, "
                f"found {stored.dtype}; use an unquantized checkpoint"
            )
        return path, stored

    def _stored(self, key: str) -> tuple[str, StoredTensor]:
        shard = self.index.weight_map.get(key)
        if shard is None:
            raise CheckpointError(
                f"{self.directory}: expected a tensor {key}, found none; "
                "use the base that the adapter was made for"
            )
        stored = self._header(shard).get(key)
        if stored is None:
            raise CheckpointError(
                f"{self.directory / shard}: expected {key}, as the index says, found no such "
                "tensor; fetch the checkpoint again"
            )
        return shard, stored

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        """Read a header once; a tensor that the index places elsewhere too would be ambiguous."""
        if shard in self._headers:
            return self._headers[shard]
        stamp = self._stamp(shard)
        header = read_header(self.directory / shard, CheckpointError)
        for key in header:
            home = self.index.weight_map.get(key, shard)
            if home != shard:
                raise CheckpointError(
                    f"{self.directory / shard}: {key}: expected it in {home} alone, as the index "
                    "says, found it here too; fetch the checkpoint again"
                )
        self._headers[shard], self._stamps[shard] = header, stamp
        return header

    def _stamp(self, shard: str) -> tuple[int, int, int]:
        """Identify a file as it now is: its inode, size, and time of the last change."""
        try:
            found = (self.directory / shard).stat()
        except OSError:
            return 0, 0, 0  # reading it will tell
        return found.st_ino, found.st_size, found.st_mtime_ns


def _prefixes(key: str) -> Iterator[str]:
    """List the leading paths of a key that name modules alone."""
    # A class with a head and one without save one model under two prefixes, such as `transformer.`
    # and none. A layer's number is never part of one: without it another layer would match.
    parts = key.split(".")[:-1]
    for count, part in enumerate(parts, 1):
        if part.isdigit():
            return
        yield ".".join(parts[:count]) + "."


def check_bounds(key: str, flat_indices: Array, numel: int) -> None:
    """Check that flat indices point into a tensor."""
    if flat_indices.size and (flat_indices.min() < 0 or flat_indices.max() >= numel):
        raise CheckpointError(
            f"{key}: expected indices from 0 to {numel - 1}, found {flat_indices.min()} to "
            f"{flat_indices.max()}; use the base that the adapter was made for"
        )
