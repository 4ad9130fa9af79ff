"""An adapter's entries in a checkpoint: where they are, what they hold, whose they are."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import WEIGHT_DTYPES, Array, digest
from safeweights_peft.errors import BaseMismatchError, CheckpointError
from safeweights_peft.files import read_json
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import TensorRecord, entries_by_block
from safeweights_peft.patch.stored import BaseEntries

PathLike = str | os.PathLike[str]


def base_state(
    reader: CheckpointReader, metadata: AdapterMetadata, indices: Mapping[str, Array]
) -> Literal["base", "merged"]:
    """Tell whether a checkpoint is an adapter's base, or already holds its merged values."""
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
    """Read a parameter's entries from the checkpoint tensors that hold them."""
    for block in record.blocks:
        _check_tensor(reader, name, block.key, block.shape, record.dtype)
    pieces = entries_by_block(record, indices)
    return reader.gather_pieces(pieces, indices.size, WEIGHT_DTYPES[record.dtype])


def base_entries(reader: CheckpointReader) -> BaseEntries:
    """Give a base's entries to what decodes a patch or encodes it."""

    def read(name: str, record: TensorRecord, indices: Array) -> Array:
        return gather_entries(reader, name, copies(reader, record)[0], indices)

    return read


def copies(reader: CheckpointReader, record: TensorRecord) -> list[TensorRecord]:
    """Give a record by the checkpoint's own keys: for its blocks, and for each tied key on disk.

    Checkpoints of one model differ in the prefix of their keys. Whoever relies on the
    entries that are found there compares digests.
    """
    blocks = [
        replace(block, key=reader.find_key(block.key) or block.key) for block in record.blocks
    ]
    tied = [key for key in map(reader.find_key, record.tied_keys) if key is not None]
    return [replace(record, blocks=tuple(blocks))] + [
        replace(record, blocks=(replace(blocks[0], key=key),)) for key in tied
    ]


def check_floats(reader: CheckpointReader) -> None:
    """Refuse a checkpoint whose weights are quantized to integers.

    Scaled float8 weights are what they are on disk; a patch fits them or not, as digests tell.
    """
    config = reader.directory / "config.json"
    described = read_json(config, CheckpointError) if config.is_file() else {}
    quantization = described.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    for key in reader.keys():
        dtype = reader.info(key).dtype
        if not dtype.lower().startswith(("f", "bf")):
            raise CheckpointError(
                f"{reader.directory}: expected float weights, found {key} in {dtype}, quantized by "
                f"{str(method)[:80]!r}; use the model that was quantized"
            )


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
