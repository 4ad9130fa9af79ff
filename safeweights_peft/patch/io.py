"""Read, write and check safety patches and safety maps as directories."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from safeweights_peft.delta import Array, check_indices, refuse
from safeweights_peft.errors import CorruptAdapterError, FormatError
from safeweights_peft.files import (
    STORED_DTYPES,
    PathLike,
    StoredTensor,
    count_data,
    publish,
    read_header,
    read_json,
)
from safeweights_peft.patch.artifacts import (
    MAX_ENTRIES_PER_BYTE,
    Adapter,
    BaseEntries,
    SafetyMap,
    StoredEntries,
    StoredPatch,
    check_layout,
    check_tensors,
    decode_entries,
    encode_entries,
    stored_arrays,
)
from safeweights_peft.patch.metadata import FORMAT_VERSION, AdapterMetadata
from safeweights_peft.patch.records import (
    LINES,
    Encoding,
    Mode,
    TensorRecord,
    check_state,
    tensor_key,
)

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE)
"""The files that decide an adapter's result; readers ignore all others."""


def write_adapter(
    path: PathLike, adapter: Adapter, *, base: BaseEntries | None = None, overwrite: bool = False
) -> AdapterMetadata:
    """Write a safety patch as a directory that appears whole or not at all.

    Counts and content digests are computed; base digests must be set.

    Args:
        path: The directory.
        adapter: The patch; each record names the encoding to use.
        base: Reads the base's entries, so that float32 values can be stored as steps from them.
        overwrite: Replace an existing non-empty directory, whatever it holds.

    Returns:
        The metadata as written; parameters that compact would not shrink are plain.

    Raises:
        FormatError: The patch contradicts its own metadata.

    Example:
        >>> from safeweights_peft import read_adapter, write_adapter
        >>> patch = read_adapter("demo/run/patch")
        >>> written = write_adapter("copy", patch)
        >>> written.content_id == patch.metadata.content_id
        True
    """
    for name, delta in adapter.deltas.items():
        record = adapter.metadata.tensors.get(name)
        if record is not None and record.shape != delta.shape:
            raise FormatError(
                f"{path}: {name}: expected a delta of the recorded shape {list(record.shape)}, "
                f"found {list(delta.shape)}; give the parameter's own shape"
            )
    values = {name: delta.values for name, delta in adapter.deltas.items()}
    return _write(path, Mode.SET, adapter.metadata, adapter.indices, values, base, overwrite)


def write_map(path: PathLike, safety_map: SafetyMap, *, overwrite: bool = False) -> AdapterMetadata:
    """Write a safety map as a directory that appears whole or not at all.

    Counts and content digests are computed; base digests must be set.

    Args:
        path: The directory.
        safety_map: The map; each record names the encoding to use.
        overwrite: Replace an existing non-empty directory, whatever it holds.

    Returns:
        The metadata as written; parameters that compact would not shrink are plain.

    Example:
        >>> from safeweights_peft import read_map, write_map
        >>> safety_map = read_map("demo/run/map")
        >>> written = write_map("copy", safety_map)
        >>> written.content_id == safety_map.metadata.content_id
        True
    """
    indices, scores = safety_map.indices, safety_map.scores
    return _write(path, Mode.SPA, safety_map.metadata, indices, scores, None, overwrite)


def read_adapter(path: PathLike, base: BaseEntries | None = None) -> Adapter:
    """Read and fully check a safety patch.

    Args:
        path: The directory.
        base: Reads the base's entries; needed only if values are stored as steps from them.

    Returns:
        The patch, in memory.

    Example:
        >>> from safeweights_peft import read_adapter
        >>> patch = read_adapter("demo/run/patch")
        >>> delta = patch.deltas["model.layers.0.mlp.up_proj.weight"]
        >>> delta.shape, delta.indices.shape == delta.values.shape
        ((48, 32), True)
    """
    return read_patch(path).decode(base)


def read_patch(path: PathLike) -> StoredPatch:
    """Read and check a safety patch, before its base is read or without it."""
    return StoredPatch(*_read(path, Mode.SET))


def read_map(path: PathLike) -> SafetyMap:
    """Read and fully check a safety map.

    Args:
        path: The directory.

    Returns:
        The map, in memory.

    Example:
        >>> from safeweights_peft import read_map
        >>> safety_map = read_map("demo/run/map")
        >>> safety_map.indices.keys() == safety_map.scores.keys()
        True
    """
    return _as_map(*_read(path, Mode.SPA))


def read_artifact(path: PathLike) -> StoredPatch | SafetyMap:
    """Read and check a safety patch or a safety map, by its mode."""
    metadata, entries = _read(path)
    return (_as_map if metadata.mode is Mode.SPA else StoredPatch)(metadata, entries)


def validate(path: PathLike) -> AdapterMetadata:
    """Read and fully check a safety patch or a safety map.

    Args:
        path: The directory.

    Returns:
        Its metadata.

    Example:
        >>> from safeweights_peft import validate
        >>> validate("demo/run/patch").base_model_name_or_path
        'demo/base'
    """
    return _read(path)[0]


def inspect(path: PathLike) -> dict[str, Any]:
    """Describe an adapter from its config and header, without reading a tensor.

    Args:
        path: The directory.

    Returns:
        Plain JSON: what the config says, with totals; rows and columns are those stored by number.
        Indices, values and digests are not checked.

    Example:
        >>> from safeweights_peft import inspect
        >>> facts = inspect("demo/run/patch")
        >>> facts["mode"], facts["density"] == facts["entries"] / facts["numel"]
        ('set', True)
    """
    metadata = read_metadata(path)
    _check_header(Path(path) / TENSORS_FILE, metadata)
    records = metadata.tensors
    entries = sum(record.count for record in records.values())
    numel = sum(record.numel for record in records.values())
    lines = {name: _count_stored_lines(record) for name, record in records.items()}
    return {
        "format_version": FORMAT_VERSION,
        "content_id": metadata.content_id,
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
        **{kind.value: sum(own[kind] for own in lines.values()) for kind in LINES},
        "size_bytes": file_bytes(path)[1],
        "tensors": {
            name: {
                "shape": list(record.shape),
                "dtype": record.dtype,
                "count": record.count,
                "encoding": record.encoding.value,
                "density": record.count / record.numel,
                **lines[name],
                "keys": list(record.keys),
            }
            for name, record in records.items()
        },
    }


def _count_stored_lines(record: TensorRecord) -> dict[str, int]:
    """Count the whole rows and columns that are stored by number, as headers tell no others."""
    return {kind.value: record.index_count if record.encoding is kind else 0 for kind in LINES}


def file_bytes(path: PathLike) -> tuple[int, int]:
    """Return the sizes of an adapter's config and tensors."""
    folder = Path(path)
    return (folder / CONFIG_FILE).stat().st_size, (folder / TENSORS_FILE).stat().st_size


def read_metadata(path: PathLike) -> AdapterMetadata:
    """Read and check ``adapter_config.json`` alone."""
    folder = Path(path)
    config, tensors = folder / CONFIG_FILE, folder / TENSORS_FILE
    if not config.is_file():
        raise FormatError(f"{folder}: expected a directory with {CONFIG_FILE}, {_explain(folder)}")
    metadata = AdapterMetadata.from_config(read_json(config, CorruptAdapterError), str(config))
    if not tensors.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        found = "adapter_model.bin, a pickle, which can run code" if pickled else "none"
        raise FormatError(
            f"{folder}: expected {TENSORS_FILE}, found {found}; ask the author for {TENSORS_FILE}"
        )
    return metadata


def _explain(folder: Path) -> str:
    """Say what a directory holds instead of an adapter, and what to give."""
    if (folder / "map").is_dir() or (folder / "patch").is_dir():  # of a run of `enhance`
        return f"found a run; give {folder / 'patch'} or {folder / 'map'}"
    hint = "give the directory of a safety patch or a safety map"
    if (folder / "config.json").is_file():
        return f"found a model; {hint}, and the model before it"
    return f"found none; {hint}"


def _as_map(metadata: AdapterMetadata, entries: dict[str, StoredEntries]) -> SafetyMap:
    indices = {name: stored.indices for name, stored in entries.items()}
    return SafetyMap(metadata, indices, {name: stored.content for name, stored in entries.items()})


def _check_header(file: Path, metadata: AdapterMetadata) -> dict[str, StoredTensor]:
    """Check the file's header against the config, before any tensor is read."""
    header = read_header(file, CorruptAdapterError)
    layouts = {
        key: (STORED_DTYPES.get(tensor.dtype, tensor.dtype), tensor.shape)
        for key, tensor in header.items()
    }
    check_layout(metadata, layouts, str(file))
    return header


def _check_holes(file: Path, metadata: AdapterMetadata) -> None:
    """Refuse a few numbers of rows whose values are a hole: it takes no space, their indices do."""
    records = metadata.tensors.values()
    count = sum(record.count for record in records if record.encoding.group is not None)
    found = count_data(file, least := -(-count // MAX_ENTRIES_PER_BYTE))
    if found < least:
        most = f"at most {MAX_ENTRIES_PER_BYTE} entries for each of {found} bytes that are no hole"
        refuse(str(file), most, count)


def _read(
    path: PathLike, mode: Mode | None = None
) -> tuple[AdapterMetadata, dict[str, StoredEntries]]:
    metadata, file = read_metadata(path), Path(path) / TENSORS_FILE
    if mode not in (None, metadata.mode):
        raise FormatError(
            f"{path}: expected a {mode.artifact}, found a {metadata.mode.artifact}; give the "
            f"directory of a {mode.artifact}"
        )
    header, entries = _check_header(file, metadata), {}
    _check_holes(file, metadata)
    for name in metadata.tensors:  # only one at a time is in memory as it is stored
        stored = {key: header[key].open(file) for key in stored_arrays(metadata, name)}
        entries[name] = decode_entries(metadata, name, stored, str(file), mapped=True)
    records = {name: stored.record for name, stored in entries.items()}
    return replace(metadata, tensors=records), entries


def _write(
    path: PathLike,
    mode: Mode,
    metadata: AdapterMetadata,
    indices: Mapping[str, Array],
    contents: Mapping[str, Array],
    base: BaseEntries | None,
    overwrite: bool,
) -> AdapterMetadata:
    if metadata.mode is not mode:
        raise FormatError(f"{path}: mode: expected {mode}, found {metadata.mode}; set the mode")
    names, tensors, records = metadata.tensors.keys(), {}, {}
    for name in sorted((names ^ indices.keys()) | (names ^ contents.keys())):
        raise FormatError(
            f"{path}: {name}: expected a record, indices, and values or scores, found not all of "
            "them; give all or none"
        )
    for name, record in metadata.tensors.items():
        check_indices(f"{path}: {name}", indices[name], record.shape)
        entries = None
        if base is not None and metadata.may_need_base and metadata.values_dtype == "float32":
            entries = base(name, record, indices[name])
            check_state(f"{path}: {name}", entries, record)
        records[name], stored, content = encode_entries(
            mode, record, indices[name], contents[name], entries
        )
        tensors[tensor_key(name, "indices")] = stored
        tensors[tensor_key(name, mode.content)] = content
    config = _to_json(path, replace(metadata, tensors=records))
    written = AdapterMetadata.from_config(json.loads(config), str(path))
    check_tensors(written, tensors, str(path))  # as readers do: nothing broken is published
    with publish(Path(path), overwrite, FormatError) as draft:
        (draft / CONFIG_FILE).write_text(config, encoding="utf-8")
        save_file(tensors, draft / TENSORS_FILE, metadata={"format": "pt"})
    return written


def _to_json(path: PathLike, metadata: AdapterMetadata) -> str:
    # Of a small patch in few bytes, indentation would be a tenth.
    is_compact = any(record.encoding is Encoding.COMPACT for record in metadata.tensors.values())
    indent = None if is_compact else 2
    try:
        config = metadata.to_config()
        return json.dumps(config, indent=indent, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as reason:
        raise FormatError(
            f"{path}: {CONFIG_FILE}: expected plain JSON, found {reason}; "
            "put only finite numbers, strings, lists and objects into selection"
        ) from reason
