"""Read, write and check adapter directories.

Here live safety patches and safety maps as files. Models and checkpoints do not: nothing here can
tell whether an adapter fits a base (see ``merge``). Every check stands in :func:`check_tensors` and
in ``metadata``, so that a state dict goes through the same ones as a file.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from safeweights_peft.delta import (
    DTYPES,
    Array,
    SparseDelta,
    check_finite,
    check_indices,
    digest,
    index_dtype,
)
from safeweights_peft.errors import CorruptAdapterError, FormatError
from safeweights_peft.files import STORED_DTYPES, StoredTensor, publish, read_header, read_json
from safeweights_peft.format.blocks import check_coverage
from safeweights_peft.format.codec import decode_indices, encode_indices
from safeweights_peft.format.metadata import (
    FORMAT_VERSION,
    AdapterMetadata,
    Mode,
    indices_key,
    scores_key,
    values_key,
)

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

PathLike = str | os.PathLike[str]
Layout = tuple[Any, tuple[int, ...]]  # dtype (a foreign name if numpy has none), shape


@dataclass(frozen=True, eq=False)
class Adapter:
    """A safety patch.

    Attributes:
        metadata: Its description, of mode "set".
        deltas: The change of each parameter, by its name in memory.
    """

    metadata: AdapterMetadata
    deltas: dict[str, SparseDelta]

    @property
    def indices(self) -> dict[str, Array]:
        """The flat indices of each parameter's entries, as a safety map has them; ``(count,)``."""
        return {name: delta.indices for name, delta in self.deltas.items()}


@dataclass(frozen=True, eq=False)
class SafetyMap:
    """A safety map.

    Attributes:
        metadata: Its description, of mode "spa".
        indices: The flat indices of each parameter's entries, by its name in memory; ``(count,)``.
        scores: The float32 score of each of these entries; ``(count,)``.
    """

    metadata: AdapterMetadata
    indices: dict[str, Array]
    scores: dict[str, Array]


def write_adapter(path: PathLike, adapter: Adapter, *, overwrite: bool = False) -> AdapterMetadata:
    """Write a safety patch as a directory that appears whole or not at all.

    Counts and digests of the content are computed here; the digests of the base must be there.

    Args:
        path: The directory.
        adapter: The patch.
        overwrite: Replace an existing non-empty directory, whatever it holds.

    Returns:
        The metadata as written.

    Raises:
        FormatError: The patch contradicts its own metadata.
    """
    values = {name: delta.values for name, delta in adapter.deltas.items()}
    for name, delta in adapter.deltas.items():
        record = adapter.metadata.tensors.get(name)
        if record is not None and record.shape != delta.shape:
            raise FormatError(
                f"{path}: {name}: expected a delta of the recorded shape {list(record.shape)}, "
                f"found {list(delta.shape)}; give the parameter's own shape"
            )
    return _write(Path(path), adapter.metadata, Mode.SET, adapter.indices, values, overwrite)


def write_map(path: PathLike, safety_map: SafetyMap, *, overwrite: bool = False) -> AdapterMetadata:
    """Write a safety map as a directory that appears whole or not at all.

    Counts and digests of the content are computed here; the digests of the base must be there.

    Args:
        path: The directory.
        safety_map: The map.
        overwrite: Replace an existing non-empty directory, whatever it holds.

    Returns:
        The metadata as written.
    """
    indices, scores = safety_map.indices, safety_map.scores
    return _write(Path(path), safety_map.metadata, Mode.SPA, indices, scores, overwrite)


def read_adapter(path: PathLike) -> Adapter:
    """Read and fully check a safety patch.

    Args:
        path: The directory.

    Returns:
        The patch, held in memory.
    """
    metadata, tensors = _read(Path(path), Mode.SET)
    deltas = {}
    for name, record in metadata.tensors.items():
        indices = decode_indices(record.encoding, tensors[indices_key(name)])
        deltas[name] = SparseDelta(record.shape, indices, tensors[values_key(name)])
    return Adapter(metadata, deltas)


def read_map(path: PathLike) -> SafetyMap:
    """Read and fully check a safety map.

    Args:
        path: The directory.

    Returns:
        The map, held in memory.
    """
    metadata, tensors = _read(Path(path), Mode.SPA)
    indices = {
        name: decode_indices(record.encoding, tensors[indices_key(name)])
        for name, record in metadata.tensors.items()
    }
    scores = {name: tensors[scores_key(name)] for name in metadata.tensors}
    return SafetyMap(metadata, indices, scores)


def read_artifact(path: PathLike) -> Adapter | SafetyMap:
    """Read and fully check a safety patch or a safety map, whichever its mode says it is.

    Args:
        path: The directory.

    Returns:
        The patch or the map, held in memory.
    """
    return read_map(path) if read_metadata(path).mode is Mode.SPA else read_adapter(path)


def validate(path: PathLike) -> AdapterMetadata:
    """Read and fully check a safety patch or a safety map.

    Args:
        path: The directory.

    Returns:
        Its metadata.
    """
    return _read(Path(path), None)[0]


def inspect(path: PathLike) -> dict[str, Any]:
    """Describe an adapter from its config and header, without reading a tensor.

    Args:
        path: The directory.

    Returns:
        Plain JSON: what the config says, with totals; indices, values and digests are not checked.
    """
    folder = Path(path)
    metadata = read_metadata(folder)
    _check_header(folder, metadata)
    records = metadata.tensors
    entries = sum(record.count for record in records.values())
    numel = sum(record.numel for record in records.values())
    return {
        "format_version": FORMAT_VERSION,
        "mode": metadata.mode.value,
        "base_model_name_or_path": metadata.base_model_name_or_path,
        "revision": metadata.revision,
        "transformers_version": metadata.transformers_version,
        "scale": metadata.scale,
        "values_dtype": metadata.values_dtype,
        "selection": metadata.selection,
        "parameters": len(records),
        "entries": entries,
        "numel": numel,
        "density": entries / numel,
        "size_bytes": (folder / TENSORS_FILE).stat().st_size,
        "tensors": {
            name: {
                "shape": list(record.shape),
                "dtype": record.dtype,
                "count": record.count,
                "density": record.count / record.numel,
                "keys": list(record.keys),
            }
            for name, record in records.items()
        },
    }


def read_metadata(path: PathLike) -> AdapterMetadata:
    """Read and check ``adapter_config.json`` alone.

    Args:
        path: The directory.

    Returns:
        The metadata.

    Raises:
        FormatError: There is no adapter, or only a pickled one.
    """
    folder = Path(path)
    config, tensors = folder / CONFIG_FILE, folder / TENSORS_FILE
    if not config.is_file():
        raise FormatError(
            f"{folder}: expected a directory with {CONFIG_FILE}, found none; "
            "give the directory of a safety patch or a safety map"
        )
    metadata = AdapterMetadata.from_config(read_json(config, CorruptAdapterError), str(config))
    if not tensors.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        found = "adapter_model.bin, a pickle, which can run code" if pickled else "none"
        raise FormatError(
            f"{folder}: expected {TENSORS_FILE}, found {found}; ask the author for {TENSORS_FILE}"
        )
    return metadata


def check_tensors(metadata: AdapterMetadata, tensors: Mapping[str, Array], source: str) -> None:
    """Check every tensor of an adapter: names, dtypes, sizes, then order, bounds, values, digest.

    Args:
        metadata: The checked description.
        tensors: The stored arrays, by their safetensors names.
        source: What messages call them, such as the file's path.
    """
    found = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    _check_layout(metadata, found, source)
    for name in metadata.tensors:
        _check_content(metadata, name, tensors, source)


def _content_key(metadata: AdapterMetadata, name: str) -> str:
    """Name the safetensors entry that goes with the indices."""
    return values_key(name) if metadata.mode is Mode.SET else scores_key(name)


def _check_layout(metadata: AdapterMetadata, found: Mapping[str, Layout], source: str) -> None:
    """Check names, dtypes and shapes, which a header alone tells."""
    expected: dict[str, Layout] = {}
    for name, record in metadata.tensors.items():
        expected[indices_key(name)] = (index_dtype(record.numel), (record.count,))
        content_dtype = DTYPES[metadata.values_dtype]
        expected[_content_key(metadata, name)] = (content_dtype, (record.count,))
    for key in found:
        if key not in expected:
            raise CorruptAdapterError(
                f"{source}: {key[:200]!r}: expected only tensors that {CONFIG_FILE} names, found "
                "this one; do not use this adapter"
            )
    for key, (dtype, shape) in expected.items():
        if found.get(key) != (dtype, shape):
            now = f"{found[key][0]} {list(found[key][1])}" if key in found else "nothing"
            raise CorruptAdapterError(
                f"{source}: {key}: expected {dtype} {list(shape)}, found {now}; "
                "do not use this adapter"
            )


def _check_content(
    metadata: AdapterMetadata, name: str, tensors: Mapping[str, Array], source: str
) -> None:
    """Check the entries of one parameter."""
    record, key = metadata.tensors[name], indices_key(name)
    stored, content = tensors[key], tensors[_content_key(metadata, name)]
    indices = decode_indices(record.encoding, stored)
    check_indices(f"{source}: {key}", indices, record.shape)
    check_finite(f"{source}: {_content_key(metadata, name)}", content)
    check_coverage(f"{source}: {name}", record.blocks, indices)
    found = digest(stored, content)
    if found != record.digest:
        raise CorruptAdapterError(
            f"{source}: {name}: expected digest {record.digest}, found {found}; "
            "fetch the adapter again"
        )


def _check_header(folder: Path, metadata: AdapterMetadata) -> dict[str, StoredTensor]:
    """Check the file's header against the config, before any tensor is read."""
    path = folder / TENSORS_FILE
    header = read_header(path, CorruptAdapterError)
    found = {
        key: (STORED_DTYPES.get(tensor.dtype, tensor.dtype), tensor.shape)
        for key, tensor in header.items()
    }
    _check_layout(metadata, found, str(path))
    return header


def _read(folder: Path, mode: Mode | None) -> tuple[AdapterMetadata, dict[str, Array]]:
    metadata = read_metadata(folder)
    if mode not in (None, metadata.mode):
        other = "read_map" if mode is Mode.SET else "read_adapter"
        raise FormatError(
            f"{folder}: mode: expected {mode}, found {metadata.mode}; use {other} for it"
        )
    path = folder / TENSORS_FILE
    header = _check_header(folder, metadata)
    for name, record in metadata.tensors.items():
        # While they are mapped: a file may be a hole of terabytes, which only costs when copied.
        key = indices_key(name)
        check_indices(f"{path}: {key}", header[key].open(path), record.shape)
    tensors = {key: np.array(tensor.open(path)) for key, tensor in header.items()}
    check_tensors(metadata, tensors, str(path))
    return metadata, tensors


def _write(
    path: Path,
    metadata: AdapterMetadata,
    mode: Mode,
    indices: Mapping[str, Array],
    contents: Mapping[str, Array],
    overwrite: bool,
) -> AdapterMetadata:
    tensors: dict[str, Array] = {}
    records = {}
    _check_names(path, metadata, mode, indices, contents)
    for name, record in metadata.tensors.items():
        check_indices(f"{path}: {name}", indices[name], record.shape)
        stored = encode_indices(record.encoding, indices[name], record.numel)
        content = np.ascontiguousarray(contents[name])
        tensors[indices_key(name)] = np.ascontiguousarray(stored)
        tensors[_content_key(metadata, name)] = content
        records[name] = replace(record, count=stored.size, digest=digest(stored, content))
    config = _to_json(path, replace(metadata, tensors=records))
    written = AdapterMetadata.from_config(json.loads(config), str(path))
    check_tensors(written, tensors, str(path))
    with publish(path, overwrite, FormatError) as draft:
        (draft / CONFIG_FILE).write_text(config, encoding="utf-8")
        save_file(tensors, draft / TENSORS_FILE, metadata={"format": "pt"})
        # The library makes files for their owner alone, which a shared folder is not meant for.
        shutil.copymode(draft / CONFIG_FILE, draft / TENSORS_FILE)
    return written


def _check_names(
    path: Path,
    metadata: AdapterMetadata,
    mode: Mode,
    indices: Mapping[str, Array],
    contents: Mapping[str, Array],
) -> None:
    if metadata.mode is not mode:
        raise FormatError(f"{path}: mode: expected {mode}, found {metadata.mode}; set the mode")
    names = metadata.tensors.keys()
    for name in sorted((names ^ indices.keys()) | (names ^ contents.keys())):
        raise FormatError(
            f"{path}: {name}: expected a record, indices, and values or scores, found not all of "
            "them; give all or none"
        )


def _to_json(path: Path, metadata: AdapterMetadata) -> str:
    try:
        return json.dumps(metadata.to_config(), indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as reason:
        raise FormatError(
            f"{path}: {CONFIG_FILE}: expected plain JSON, found {reason}; "
            "put only finite numbers, strings, lists and objects into selection"
        ) from reason
