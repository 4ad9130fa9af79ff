"""Copy a checkpoint and change the copy's tensors; the copy appears whole or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from safeweights_peft.checkpoint.reader import INDEX_FILE, CheckpointReader, check_bounds, windows
from safeweights_peft.checkpoint.threads import in_threads
from safeweights_peft.delta import Array, bits_differ
from safeweights_peft.errors import CheckpointError
from safeweights_peft.files import PathLike, publish

OnBytes = Callable[[int, int], None]
"""Called with the bytes copied so far and in total."""

# What may be copied, not what may not: a missing tokenizer file fails loudly, while weights in
# another format would bring the unchanged model along.
_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
_LEGAL_PREFIXES = ("license", "licence", "notice", "copying", "use_policy")
_ADAPTER_FILE = "adapter_config.json"
_NOT_COPIED = {_ADAPTER_FILE, "trainer_state.json"}
_TEMPLATES = "additional_chat_templates"
_HINT = "write what has the tensor's own dtype and shape"

# Errors of kernels and file systems that cannot copy a range; any other is a failure.
_CANNOT_COPY = {
    errno.EBADF,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.ETXTBSY,
    errno.EXDEV,
}


class CheckpointDraft:
    """A checkpoint that is being changed, usually a copy that is not published yet."""

    reader: CheckpointReader

    def __init__(self, reader: CheckpointReader) -> None:
        """Open it for changes, which reach the disk when it is published or synced."""
        self.reader = reader

    def patch(self, key: str, flat_indices: Array, entries: Array) -> None:
        """Overwrite some entries of a tensor on disk, and check that they are there."""
        info = self.reader.check_tensor(key, dtype=entries.dtype.name, hint=_HINT)
        check_bounds(key, flat_indices, info.size_bytes // entries.dtype.itemsize)
        path = self.reader.directory / info.shard
        parts = windows(path, info.offset, entries.dtype, flat_indices, "r+")
        for window, local, positions in parts:
            window[local] = entries[positions]
            if bits_differ(window[local], entries[positions]).any():
                raise CheckpointError(
                    f"{path}: expected in {key} what was written there, found other entries; "
                    "the disk may be failing, try another"
                )

    def write(self, key: str, tensor: Array) -> None:
        """Overwrite a tensor on disk whole."""
        info = self.reader.check_tensor(key, tensor.shape, tensor.dtype.name, hint=_HINT)
        if tensor.size:
            path = os.fspath(self.reader.directory / info.shard)
            raw = np.memmap(path, np.uint8, "r+", info.offset, (info.size_bytes,))
            raw.view(np.ndarray).view(tensor.dtype)[:] = tensor.reshape(-1)


@contextmanager
def draft_copy(
    reader: CheckpointReader,
    out_dir: PathLike,
    *,
    overwrite: bool = False,
    progress: OnBytes | None = None,
    change: Callable[[CheckpointDraft, str], None] | None = None,
) -> Iterator[CheckpointDraft]:
    """Copy a checkpoint to a temporary sibling directory; publish it if the block succeeds."""
    with publish(Path(out_dir), overwrite, CheckpointError) as directory:
        draft = CheckpointDraft(reader.copied_to(directory))
        _copy_files(reader, draft, progress, change)
        yield draft


def files_to_copy(reader: CheckpointReader) -> dict[str, int]:
    """List the files to copy with their sizes: shards, index, and what loading needs."""
    names = reader.shards + _side_files(reader.directory)
    return {name: (reader.directory / name).stat().st_size for name in names}


def files_that_load(directory: Path) -> list[str]:
    """List the files beside the shards that can change what a loaded checkpoint does."""
    names = _side_files(directory)
    # transformers loads an adapter whose config lies beside the weights.
    names += [_ADAPTER_FILE] if (directory / _ADAPTER_FILE).is_file() else []
    return sorted(name for name in names if name != INDEX_FILE and not _is_legal_text(name))


def _copy_files(
    reader: CheckpointReader,
    draft: CheckpointDraft,
    progress: OnBytes | None,
    change: Callable[[CheckpointDraft, str], None] | None,
) -> None:
    def copy(name: str) -> int:
        target = draft.reader.directory / name
        target.parent.mkdir(exist_ok=True)
        copy_file(reader.directory / name, target)
        if name in reader.shards:
            reader.check_unchanged(name)
            if change is not None:
                change(draft, name)
        return sizes[name]

    sizes = files_to_copy(reader)
    done, total = 0, sum(sizes.values())
    for size in in_threads(copy, sizes):
        done += size
        if progress is not None:
            progress(done, total)


def _side_files(directory: Path) -> list[str]:
    """List the files beside the shards that loading needs, relative to the directory."""
    files = [path for path in directory.iterdir() if path.is_file() and _is_side_file(path.name)]
    files += (directory / _TEMPLATES).glob("*.jinja")
    return sorted(path.relative_to(directory).as_posix() for path in files)


def _is_legal_text(name: str) -> bool:
    return name.lower().startswith(_LEGAL_PREFIXES) and Path(name).suffix in ("", ".txt")


def _is_side_file(name: str) -> bool:
    lower = name.lower()
    if name.startswith(".") or lower in _NOT_COPIED:
        return False
    if lower.endswith(".index.json"):
        return name == INDEX_FILE
    starts = (*_LEGAL_PREFIXES, "tokenizer.model")
    return Path(lower).suffix in _SIDE_SUFFIXES or lower.startswith(starts)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file: share its blocks, else copy in the kernel, else through memory."""
    if not _copy_in_kernel(source, target):
        shutil.copyfile(source, target)


def _copy_in_kernel(source: Path, target: Path) -> bool:
    if not hasattr(os, "copy_file_range"):
        return False
    # On btrfs, XFS and NFS the files share blocks, which are copied when one of them changes.
    # https://man7.org/linux/man-pages/man2/copy_file_range.2.html
    with source.open("rb") as reader, target.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        while left:
            try:
                count = os.copy_file_range(reader.fileno(), writer.fileno(), left)
            except OSError as reason:
                if reason.errno not in _CANNOT_COPY:
                    raise
                return False
            if not count:
                return False
            left -= count
    return True
