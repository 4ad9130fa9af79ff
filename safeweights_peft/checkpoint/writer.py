"""Copy a checkpoint and change its tensors in place, in some entries or whole.

Here live the choice of the files to copy, and the draft that appears whole or not at all. What to
change does not: see ``merge``.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from safeweights_peft.checkpoint.copying import copy_file
from safeweights_peft.checkpoint.index import INDEX_FILE
from safeweights_peft.checkpoint.reader import CheckpointReader, TensorInfo, check_bounds
from safeweights_peft.checkpoint.threads import in_threads
from safeweights_peft.checkpoint.windows import windows
from safeweights_peft.delta import Array, bits_differ
from safeweights_peft.errors import CheckpointError
from safeweights_peft.files import publish

Progress = Callable[[int, int], None]
"""Called with the bytes copied so far, and the bytes to copy."""

# A list of what may come along: a forgotten tokenizer file fails loudly, whereas weights in another
# format would carry the unchanged model into the merged one.
_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
_LEGAL_PREFIXES = ("license", "licence", "notice", "copying", "use_policy")
_ADAPTER_FILE = "adapter_config.json"
_NOT_COPIED = {_ADAPTER_FILE, "trainer_state.json"}
_TEMPLATES = "additional_chat_templates"


class CheckpointDraft:
    """A checkpoint that is being changed, mostly a copy that is not published yet.

    What is written reaches the disk when the copy is published; else its files are to be synced.

    Attributes:
        reader: The checkpoint, as it now is.
    """

    reader: CheckpointReader

    def __init__(self, reader: CheckpointReader) -> None:
        """Open it for changes."""
        self.reader = reader

    def patch(self, key: str, flat_indices: Array, entries: Array) -> None:
        """Overwrite some entries of a tensor on disk, and check that they are there."""
        info = self._check_dtype(key, entries)
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
        info = self._check_dtype(key, tensor)
        if tensor.shape != info.shape:
            raise CheckpointError(
                f"{key}: expected shape {list(info.shape)}, found {list(tensor.shape)}; "
                "write a tensor of the checkpoint's own shape"
            )
        if tensor.size:
            path = os.fspath(self.reader.directory / info.shard)
            raw = np.memmap(path, np.uint8, "r+", info.offset, (info.size_bytes,))
            raw.view(np.ndarray).view(tensor.dtype)[:] = tensor.reshape(-1)

    def _check_dtype(self, key: str, values: Array) -> TensorInfo:
        info = self.reader.info(key)
        if values.dtype.name != info.dtype:
            raise CheckpointError(
                f"{key}: expected entries of dtype {info.dtype}, found {values.dtype.name}; "
                "round them to the checkpoint's dtype first"
            )
        return info


@contextmanager
def draft_copy(
    reader: CheckpointReader,
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    change: Callable[[CheckpointDraft, str], None] | None = None,
) -> Iterator[CheckpointDraft]:
    """Copy a checkpoint to a temporary sibling directory; publish it when the block ends well.

    Copied are the shards, their index, and what loading needs: configs, tokenizer, chat templates,
    processor, custom code and licence. Not copied are model cards, adapters, other weight formats.
    """
    with publish(Path(out_dir), overwrite, CheckpointError) as directory:
        draft = CheckpointDraft(reader.copied_to(directory))
        _copy_files(reader, draft, progress, change)
        yield draft


def files_to_copy(reader: CheckpointReader) -> dict[str, int]:
    """List what :func:`draft_copy` copies."""
    names = reader.index.shards + _side_files(reader.directory)
    return {name: (reader.directory / name).stat().st_size for name in names}


def files_that_load(directory: Path) -> list[str]:
    """List the files beside the shards that can change what a checkpoint does once it is loaded.

    That is what :func:`draft_copy` copies but for the index and legal texts; and the config of an
    adapter, which transformers loads with the model.
    """
    names = _side_files(directory)
    names += [_ADAPTER_FILE] if (directory / _ADAPTER_FILE).is_file() else []
    return sorted(name for name in names if name != INDEX_FILE and not _is_legal_text(name))


def _copy_files(
    reader: CheckpointReader,
    draft: CheckpointDraft,
    progress: Progress | None,
    change: Callable[[CheckpointDraft, str], None] | None,
) -> None:
    def copy(name: str) -> int:
        target = draft.reader.directory / name
        target.parent.mkdir(exist_ok=True)
        copy_file(reader.directory / name, target)
        if name in reader.index.shards:
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
    """List what loading needs beside the shards, relative to the directory."""
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
