"""Strict JSON, headers of safetensors files, and directories that appear whole or not at all."""

import ctypes
import errno
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from safetensors import SafetensorError

from safeweights_peft.delta import WEIGHT_DTYPES, Array
from safeweights_peft.errors import SafeWeightsError

PathLike = str | os.PathLike[str]

MAX_JSON_BYTES = 100_000_000  # of a safetensors header too, as in the safetensors library
MAX_FILE_BYTES = 2**63 - 1
MAX_DIMS = 64  # of a tensor, as in numpy

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": WEIGHT_DTYPES["float32"],
    "BF16": WEIGHT_DTYPES["bfloat16"],
    "F16": WEIGHT_DTYPES["float16"],
    "F8_E4M3": WEIGHT_DTYPES["float8_e4m3fn"],
    "F8_E5M2": WEIGHT_DTYPES["float8_e5m2"],
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Safetensors dtypes that this package can read; a file may hold others, which stay untouched."""

_DTYPE = re.compile("[A-Z0-9_]{1,32}")
_ANOTHER = "give another path"
_FETCH_AGAIN = "fetch the file again, or do not use it"
_LFS_POINTER = b"version https://git-lfs"
_HERE, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


class StoredTensor(NamedTuple):
    """One entry of a safetensors header."""

    dtype: str  # as safetensors names it, such as "BF16"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    size_bytes: int

    def open(self, path: Path) -> Array:
        """Map the tensor, so that only the touched pages are read."""
        dtype = STORED_DTYPES[self.dtype]
        if not self.size_bytes:
            return np.empty(0, dtype)
        raw = np.memmap(os.fspath(path), np.uint8, "r", self.offset, (self.size_bytes,))
        return raw.view(np.ndarray).view(dtype)


def read_json(
    path: Path, error: type[SafeWeightsError], hint: str = _FETCH_AGAIN
) -> dict[str, Any]:
    """Read a JSON object strictly: whole UTF-8, no repeated keys, no NaN or infinity."""
    _check_is_file(path, error)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            found = str(path.stat().st_size)
            _refuse(error, path, f"at most {MAX_JSON_BYTES} bytes", found, hint=hint)
        content = path.read_bytes()
    except OSError as reason:
        _refuse(error, path, "a readable file", str(reason), reason)
    return parse_json(content, str(path), error, hint)


def parse_json(
    content: bytes, source: str, error: type[SafeWeightsError], hint: str = _FETCH_AGAIN
) -> dict[str, Any]:
    """Parse a JSON object as :func:`read_json` does."""
    try:
        parsed = json.loads(
            content.decode(), object_pairs_hook=_unique, parse_constant=_no_constant
        )
        if b"\\u" in content:
            json.dumps(parsed, ensure_ascii=False).encode()  # a lone surrogate cannot be printed
    except (ValueError, RecursionError) as reason:
        _refuse(error, source, "JSON", str(reason), reason, hint)
    if not isinstance(parsed, dict):
        _refuse(error, source, "a JSON object", type(parsed).__name__, hint=hint)
    return parsed


def read_header(path: Path, error: type[SafeWeightsError]) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file, and none of its tensors."""
    # The safetensors library accepts a header that names a tensor twice, and gives no offsets.
    # https://github.com/huggingface/safetensors#format
    _check_is_file(path, error)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            opening = file.read(len(_LFS_POINTER))
            if opening == _LFS_POINTER:
                hint = "run `git lfs pull` where it was cloned, or fetch it from the Hub"
                found = "a git-lfs pointer, which stands for the file"
                _refuse(error, path, "a safetensors file", found, hint=hint)
            length = int.from_bytes(opening[:8], "little")
            file.seek(8)
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                _refuse(error, path, "a safetensors header", f"{length} bytes of it in {size}")
            content = file.read(length)
    except OSError as reason:
        _refuse(error, path, "a readable file", str(reason), reason)
    header = parse_json(content, f"{path}: header", error)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {
        name: _stored_tensor(path, name, entry, start, error) for name, entry in header.items()
    }
    _check_cover(path, tensors, start, size, error)
    return tensors


def count_data(path: Path, enough: int) -> int:
    """Count a file's bytes that are no holes, where the system tells; stop at enough."""
    found = end = 0
    size = path.stat().st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    with path.open("rb") as file:
        while found < enough and end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as reason:
                if reason.errno == errno.ENXIO:  # no data behind the last hole
                    break
                return size
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found += end - start
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        sync(draft)
        draft.replace(path)
    except OSError as error:  # the system names the draft, or nothing at all
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)


def check_target(path: Path, overwrite: bool, error: type[SafeWeightsError]) -> Path:
    """Check that a directory may be published at a path."""
    target = Path(os.path.realpath(path))
    _recover(target)
    check_new(path, error)
    if not target.exists():
        return target
    if not target.is_dir():
        _refuse(error, path, "a directory or nothing", "a file", hint=_ANOTHER)
    if Path.cwd().is_relative_to(target):
        _refuse(error, path, "another directory", "the current one", hint=_ANOTHER)
    if not overwrite and any(target.iterdir()):
        _refuse(
            error,
            path,
            "an empty directory or none",
            "files",
            hint="give --overwrite to replace it",
        )
    return target


def check_new_file(path: Path, error: type[SafeWeightsError]) -> None:
    """Check that a file may be written at a path where there is none."""
    if os.path.lexists(path):
        _refuse(error, path, "no file there", "one", hint="give another name")
    check_new(path, error)


def check_new(path: Path, error: type[SafeWeightsError]) -> None:
    """Check that something may be made at a path, with the directories that lead to it."""
    parent = Path(os.path.realpath(path)).parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        _refuse(error, path, "a path below directories", f"the file {parent}", hint=_ANOTHER)
    # The system's own answer, which knows file systems that are mounted read-only.
    if not os.access(parent, os.W_OK | os.X_OK):
        found = f"that {parent} takes no new files (read-only, or no permission)"
        _refuse(error, path, "a writable place", found, hint=_ANOTHER)


@contextmanager
def lock(path: Path, error: type[SafeWeightsError]) -> Iterator[None]:
    """Keep other processes from writing a result; refuse at once if one is writing it."""
    try:
        import fcntl
    except ImportError:  # as on Windows; two writers are found out when the second publishes
        yield
        return
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.with_name(f".{target.name}.lock")
    with ExitStack() as stack:
        while True:
            file = stack.enter_context(place.open("w"))
            try:
                # The system lets go of it when the process ends, however that happens.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as reason:
                hint = "wait until it has ended, or give another path"
                _refuse(error, path, "no other process at work on it", "one", reason, hint)
            except OSError:  # some network file systems lock nothing
                break
            # Whoever held it may have deleted the file between its opening and its locking.
            if place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat()):
                stack.callback(place.unlink, missing_ok=True)
                break
        yield


def check_apart(path: Path, inputs: Mapping[str, PathLike], error: type[SafeWeightsError]) -> None:
    """Check that a target directory neither contains an input nor lies inside one."""
    target = Path(os.path.realpath(path))
    for role, input_path in inputs.items():
        source = Path(os.path.realpath(input_path))
        if source.is_relative_to(target) or target.is_relative_to(source):
            found = f"one that shares {source}"
            _refuse(error, path, f"a directory apart from {role}", found, hint=_ANOTHER)


@contextmanager
def publish(path: Path, overwrite: bool, error: type[SafeWeightsError]) -> Iterator[Path]:
    """Fill a temporary sibling directory; rename it into place once it is complete and on disk."""
    target = check_target(path, overwrite, error)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.mkdir(parents=True)
        yield draft
        _open_to_readers(draft)
        _sync_all(draft)
        _replace(target, draft, overwrite)
    except (OSError, SafetensorError) as reason:  # as safetensors reports a full disk
        _refuse(error, path, "a writable directory", str(reason), reason, "free space or move it")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse(
    error: type[SafeWeightsError],
    source: Path | str,
    expected: str,
    found: str,
    reason: BaseException | None = None,
    hint: str = _FETCH_AGAIN,
) -> NoReturn:
    raise error(f"{source}: expected {expected}, found {found[:200]}; {hint}") from reason


def _check_is_file(path: Path, error: type[SafeWeightsError]) -> None:
    """Refuse what could be read forever, such as a device or a pipe."""
    if not path.is_file():
        found = "something else" if path.exists() else "nothing"
        _refuse(error, path, "a file", found, hint="give a complete directory")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {repeated[:80]!r} twice in one object")
    return unique


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")


def _stored_tensor(
    path: Path, name: str, entry: Any, start: int, error: type[SafeWeightsError]
) -> StoredTensor:
    """Check one entry of a header."""
    source = f"{path}: {name[:200]!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(error, source, "dtype, shape and data_offsets", str(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype) or not _are_sizes(shape):
        _refuse(error, source, "a dtype and a shape", f"{dtype!r} and {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(error, source, "ascending data_offsets", repr(offsets))
    size_bytes = offsets[1] - offsets[0]
    if dtype in STORED_DTYPES:
        needed = math.prod(shape) * STORED_DTYPES[dtype].itemsize
        if size_bytes != needed:
            _refuse(error, source, f"{needed} bytes for {dtype} {shape}", str(size_bytes))
    return StoredTensor(dtype, tuple(shape), start + offsets[0], size_bytes)


def _are_sizes(values: Any) -> bool:
    """Check for a list of at most MAX_DIMS sizes or positions."""
    return (isinstance(values, list) and len(values) <= MAX_DIMS) and all(
        type(value) is int and 0 <= value <= MAX_FILE_BYTES for value in values
    )


def _check_cover(
    path: Path,
    tensors: dict[str, StoredTensor],
    start: int,
    size: int,
    error: type[SafeWeightsError],
) -> None:
    """Check that the tensors cover the file from the header to its end, each byte once."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.offset != at:
            _refuse(error, f"{path}: {name[:200]!r}", f"bytes from {at}", f"{tensor.offset}")
        at += tensor.size_bytes
    if at != size:
        _refuse(error, path, f"{at} bytes, as its header says", str(size))


def _open_to_readers(directory: Path) -> None:
    """Give files the permissions that the umask leaves to new ones."""
    # The safetensors library makes files that only their owner can read. The umask is read off the
    # directory, because os.umask() cannot tell it without setting it for all threads.
    usual = directory.stat().st_mode & 0o666
    for path in filter(Path.is_file, directory.rglob("*")):
        path.chmod(usual)


def _sync_all(directory: Path) -> None:
    """Flush every file, then every directory, so that the rename comes last."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def _replace(target: Path, draft: Path, overwrite: bool) -> None:
    """Rename a draft into place; an old directory takes the draft's name, and is deleted."""
    if overwrite:
        _swap(target, draft)
    else:
        draft.rename(target)
    try:
        sync(target.parent)
    except OSError:
        _swap(draft, target)
        raise


def _swap(target: Path, draft: Path) -> None:
    """Exchange two directories; the first may be missing."""
    if not target.exists():
        draft.rename(target)
    elif not _exchange(target, draft):
        _rename_twice(target, draft)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step, if the system can; return whether it did."""
    # Linux can on its own file systems, so that both names exist at every moment.
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and not rename(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE)


def _rename_twice(target: Path, draft: Path) -> None:
    """Exchange two directories through a third name, which :func:`_recover` knows."""
    aside = draft.with_suffix(".old")
    target.rename(aside)
    try:
        draft.rename(target)
        aside.rename(draft)
    except OSError:
        if target.exists():
            target.rename(draft)
        aside.rename(target)
        raise


def _recover(target: Path) -> None:
    """Restore a directory that a killed process had moved aside."""
    if not target.exists():
        name = f".{escape(target.name)}.{'[0-9a-f]' * 8}.old"
        for aside in filter(Path.is_dir, target.parent.glob(name)):
            aside.rename(target)
            return
