"""An adapter's entries in a checkpoint: where they are, what they hold, whose they are."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import DTYPES, Array, digest
from safeweights_peft.errors import BaseMismatchError
from safeweights_peft.format import AdapterMetadata, TensorRecord, entries_by_block

PathLike = str | os.PathLike[str]


def base_state(
    reader: CheckpointReader, metadata: AdapterMetadata, indices: Mapping[str, Array]
) -> Literal["base", "merged"]:
    """Tell whether a checkpoint is an adapter's base, or already holds its merged values.

    Args:
        reader: The checkpoint.
        metadata: The adapter's metadata.
        indices: The checked flat indices of each parameter.

    Returns:
        "base" or "merged".

    Raises:
        BaseMismatchError: It is neither; the message names the first tensor that differs.
    """
    is_base = is_merged = True
    for name, record in metadata.tensors.items():
        for copy in copies(reader, record):
            found = digest(gather_entries(reader, name, copy, indices[name]))
            is_base &= found == record.base_digest
            is_merged &= found == record.merged_digest
            if not is_base and not is_merged:
                raise BaseMismatchError(
                    f"{name}: expected in {copy.keys[0]} of {reader.directory} the values with "
                    f"digest {record.base_digest}, found {found}; use "
                    f"{metadata.base_model_name_or_path or 'the base of the adapter'}"
                    f"{f' at revision {metadata.revision}' if metadata.revision else ''}"
                )
    return "base" if is_base else "merged"


def gather_entries(
    reader: CheckpointReader, name: str, record: TensorRecord, indices: Array
) -> Array:
    """Read a parameter's entries from the checkpoint tensors that hold them.

    Args:
        reader: The checkpoint.
        name: The parameter's name, for messages.
        record: Its record; every block must be there, in the recorded dtype and shape.
        indices: Its checked flat indices; ``(count,)``.

    Returns:
        The entries, in the checkpoint's dtype; ``(count,)``.
    """
    for block in record.blocks:
        _check_tensor(reader, name, block.key, block.shape, record.dtype)
    pieces = entries_by_block(record, indices)
    return reader.gather_pieces(pieces, indices.size, DTYPES[record.dtype])


def copies(reader: CheckpointReader, record: TensorRecord) -> list[TensorRecord]:
    """Give a record once for its blocks, and once for each tied key that is on disk.

    Args:
        reader: The checkpoint.
        record: A parameter's record.

    Returns:
        The record, then its copies under other keys.
    """
    tied = [key for key in record.tied_keys if key in reader]
    return [record] + [
        replace(record, blocks=(replace(record.blocks[0], key=key),)) for key in tied
    ]


def _check_tensor(
    reader: CheckpointReader, name: str, key: str, shape: tuple[int, ...], dtype: str
) -> None:
    if key not in reader:
        raise BaseMismatchError(
            f"{name}: expected a tensor {key} in {reader.directory}, found none; "
            "use the base that the adapter was made for"
        )
    info = reader.info(key)
    if (info.shape, info.dtype) != (shape, dtype):
        raise BaseMismatchError(
            f"{name}: expected {key} in {reader.directory} as {dtype} {list(shape)}, found "
            f"{info.dtype} {list(info.shape)}; use the base that the adapter was made for"
        )
