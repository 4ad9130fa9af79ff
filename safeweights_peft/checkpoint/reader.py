"""Read tensors of a checkpoint directory, whole or some entries, and touch no other pages."""

import copy
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from safeweights_peft.delta import Array
from safeweights_peft.errors import CheckpointError, SafeWeightsError
from safeweights_peft.files import STORED_DTYPES, PathLike, StoredTensor, read_header, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WINDOW_BYTES = 2**22
"""Bytes to map at once: a mapped page counts as memory until it is unmapped."""

_PICKLED = ("*.bin", "*.pt", "*.pth")


class TensorInfo(NamedTuple):
    """Where a checkpoint tensor lies, and in what form."""

    shape: tuple[int, ...]
    dtype: str  # torch's name, or safetensors' where numpy cannot read it
    shard: str
    offset: int  # of its first byte in the shard
    size_bytes: int


class CheckpointReader:
    """A checkpoint directory, open for reading; headers are read on demand."""

    directory: Path
    weight_map: dict[str, str]  # the shard's file name for each key

    def __init__(self, directory: PathLike) -> None:
        """Find the shards."""
        self.directory = Path(directory)
        self.weight_map = _read_weight_map(self.directory)
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._stamps: dict[str, tuple[int, int, int]] = {}

    def copied_to(self, directory: Path) -> Self:
        """Open a copy of this checkpoint whose files are still to be written."""
        other = copy.copy(self)
        other.directory = directory
        other._headers = {shard: self._header(shard) for shard in self.shards}
        other._stamps = {}
        return other

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Open this checkpoint with other keys for some of its own."""
        other = copy.copy(self)
        other.weight_map = {names.get(key, key): shard for key, shard in self.weight_map.items()}
        other._headers = {
            shard: {names.get(key, key): stored for key, stored in self._header(shard).items()}
            for shard in self.shards
        }
        return other

    def check_unchanged(self, shard: str) -> None:
        """Check that a shard is still the file whose header was read."""
        if self._stamp(shard) != self._stamps[shard]:
            raise CheckpointError(
                f"{self.directory / shard}: expected it to stay as it is, found it changed "
                "meanwhile; try again when nothing else writes to it"
            )

    @property
    def shards(self) -> list[str]:
        """The file names of the shards, sorted."""
        return sorted(set(self.weight_map.values()))

    @property
    def size_bytes(self) -> int:
        """Size of all shards."""
        return sum((self.directory / shard).stat().st_size for shard in self.shards)

    def keys(self) -> list[str]:
        """List the keys, sorted."""
        return sorted(self.weight_map)

    def unlisted(self) -> list[str]:
        """List tensors that are in a shard but not in the index."""
        headers = (self._header(shard) for shard in self.shards)
        return sorted({key for header in headers for key in header} - self.weight_map.keys())

    def __contains__(self, key: str) -> bool:
        """Check whether the checkpoint has a key."""
        return key in self.weight_map

    def find_key(self, key: str) -> str | None:
        """Find a key as it is, without its prefix or with one more; refuse several matches."""
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
        return {prefix for key in self.weight_map for prefix in _prefixes(key)}

    def info(self, key: str) -> TensorInfo:
        """Look up a tensor without reading it."""
        shard, stored = self._stored(key)
        dtype = STORED_DTYPES[stored.dtype].name if stored.dtype in STORED_DTYPES else stored.dtype
        return TensorInfo(stored.shape, dtype, shard, stored.offset, stored.size_bytes)

    def check_tensor(
        self,
        key: str,
        shape: tuple[int, ...] | None = None,
        dtype: str | None = None,
        *,
        name: str | None = None,
        error: type[SafeWeightsError] = CheckpointError,
        hint: str,
    ) -> TensorInfo:
        """Look up a tensor; refuse a missing one, or another shape or dtype."""
        info = self.info(key) if key in self else None
        if info and shape in (None, info.shape) and dtype in (None, info.dtype):
            return info
        expected = ([dtype] if dtype else []) + ([] if shape is None else [str(list(shape))])
        found = f"{info.dtype} {list(info.shape)}" if info else "none"
        where = key if name in (None, key) else f"{name}: {key}"
        raise error(
            f"{where}: expected {' '.join(expected)} in {self.directory}, found {found}; {hint}"
        )

    def read(self, key: str) -> Array:
        """Read a whole tensor."""
        path, stored = self._readable(key)
        return np.array(stored.open(path)).reshape(stored.shape)

    def read_windows(self, key: str) -> Iterator[Array]:
        """Read a whole tensor as bytes, window by window, whatever its dtype."""
        info = self.info(key)
        path, end = self.directory / info.shard, info.offset + info.size_bytes
        for start in range(info.offset, end, WINDOW_BYTES):
            yield np.fromfile(path, np.uint8, min(WINDOW_BYTES, end - start), offset=start)

    def gather(self, key: str, flat_indices: Array) -> Array:
        """Read a tensor's entries at flat indices; touch only the pages that hold them."""
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
        """Read entries of several tensors: by key, positions in the result and flat indices."""
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
        shard = self.weight_map.get(key)
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
        """Read a header once; refuse a tensor that the index places in another shard."""
        if shard in self._headers:
            return self._headers[shard]
        stamp = self._stamp(shard)
        header = read_header(self.directory / shard, CheckpointError)
        for key in header:
            home = self.weight_map.get(key, shard)
            if home != shard:
                raise CheckpointError(
                    f"{self.directory / shard}: {key}: expected it in {home} alone, as the index "
                    "says, found it here too; fetch the checkpoint again"
                )
        self._headers[shard], self._stamps[shard] = header, stamp
        return header

    def _stamp(self, shard: str) -> tuple[int, int, int]:
        """Identify a file's current state by inode, size and time of change."""
        try:
            status = (self.directory / shard).stat()
        except OSError:
            return 0, 0, 0  # reading it will tell
        return status.st_ino, status.st_size, status.st_mtime_ns


def windows(
    path: Path,
    offset: int,
    dtype: np.dtype[Any],
    flat_indices: Array,
    mode: Literal["r", "r+"] = "r",
) -> Iterator[tuple[Array, Array, Array | slice]]:
    """Map parts of a tensor that hold entries; yield each with local indices and positions."""
    order: Array | slice = slice(None)
    if (flat_indices[1:] < flat_indices[:-1]).any():
        order = np.argsort(flat_indices)
    ordered = flat_indices[order]
    size = WINDOW_BYTES // dtype.itemsize
    start = 0
    while start < ordered.size:
        first = int(ordered[start]) // size * size
        # In the indices' own dtype: with another, numpy would convert all indices first.
        last = np.array(min(first + size - 1, int(ordered[-1])), ordered.dtype)
        stop = int(np.searchsorted(ordered, last, side="right"))
        length = (int(ordered[stop - 1]) - first + 1) * dtype.itemsize
        raw = np.memmap(os.fspath(path), np.uint8, mode, offset + first * dtype.itemsize, (length,))
        positions = slice(start, stop) if isinstance(order, slice) else order[start:stop]
        # intp is what numpy indexes with, so that it converts them once.
        local = np.subtract(ordered[start:stop], first, dtype=np.intp)
        yield raw.view(np.ndarray).view(dtype), local, positions
        start = stop


def check_bounds(key: str, flat_indices: Array, numel: int) -> None:
    """Check that flat indices point into a tensor."""
    if flat_indices.size and (flat_indices.min() < 0 or flat_indices.max() >= numel):
        raise CheckpointError(
            f"{key}: expected indices from 0 to {numel - 1}, found {flat_indices.min()} to "
            f"{flat_indices.max()}; use the base that the adapter was made for"
        )


def _prefixes(key: str) -> Iterator[str]:
    """List the leading paths of a key that name modules alone."""
    # Classes with a head and without save one model under two prefixes, as `transformer.` and none.
    # A layer's number is never part of one, or another layer's tensor could match.
    parts = key.split(".")[:-1]
    for count, part in enumerate(parts, 1):
        if part.isdigit():
            return
        yield ".".join(parts[:count]) + "."


def _read_weight_map(directory: Path) -> dict[str, str]:
    """Find the shard of each tensor, from the single file or the index."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found both; remove the stale one"
        )
    if single.is_file():
        return dict.fromkeys(read_header(single, CheckpointError), SINGLE_FILE)
    if not index.is_file():
        found, hint = "neither", "give the directory of a model, not of an adapter"
        if any(next(directory.glob(pattern), None) for pattern in _PICKLED):
            found = "only pickled weights, which can run code when they are loaded"
            hint = "convert them with transformers: save_pretrained writes safetensors"
        raise CheckpointError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}; {hint}"
        )
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected an object of shard names, found "
            f"{type(weight_map).__name__}; fetch the index again"
        )
    for key, shard in weight_map.items():
        _check_shard_name(index, key, shard)
    for shard in sorted(set(weight_map.values())):
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"{directory / shard}: expected a shard that {INDEX_FILE} names, found no file; "
                "fetch the checkpoint again"
            )
    return weight_map


def _check_shard_name(index: Path, key: str, shard: object) -> None:
    """Refuse names that could leave the directory, on this system or another."""
    is_plain = (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and shard.isprintable()
        and ":" not in shard
        and PurePosixPath(shard).name == shard
        and PureWindowsPath(shard).name == shard
    )
    if not is_plain:
        raise CheckpointError(
            f"{index}: {key[:200]}: expected a file name ending in .safetensors without a path, "
            f"found {str(shard)[:200]!r}; do not use this checkpoint"
        )
