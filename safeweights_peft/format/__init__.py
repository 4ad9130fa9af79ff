"""Safety patches and safety maps as directories; ``docs/format.md`` is the normative text."""

from safeweights_peft.format.artifacts import (
    Adapter,
    Artifact,
    EncodedPatch,
    SafetyMap,
    in_encoding,
)
from safeweights_peft.format.blocks import Block
from safeweights_peft.format.entries import (
    BaseEntries,
    StoredEntries,
    check_layout,
    content_key,
    decode_entries,
    stored_arrays,
)
from safeweights_peft.format.io import (
    check_tensors,
    inspect,
    read_adapter,
    read_artifact,
    read_map,
    read_metadata,
    validate,
    write_adapter,
    write_map,
)
from safeweights_peft.format.metadata import FORMAT_MINOR, FORMAT_VERSION, AdapterMetadata
from safeweights_peft.format.records import (
    Encoding,
    Mode,
    TensorRecord,
    entries_by_block,
    indices_key,
    parse_key,
    record_from_json,
    record_to_json,
    scores_key,
    values_key,
)

__all__ = [
    "FORMAT_MINOR",
    "FORMAT_VERSION",
    "Adapter",
    "AdapterMetadata",
    "Artifact",
    "BaseEntries",
    "Block",
    "EncodedPatch",
    "Encoding",
    "Mode",
    "SafetyMap",
    "StoredEntries",
    "TensorRecord",
    "check_layout",
    "check_tensors",
    "content_key",
    "decode_entries",
    "entries_by_block",
    "in_encoding",
    "indices_key",
    "inspect",
    "parse_key",
    "read_adapter",
    "read_artifact",
    "read_map",
    "read_metadata",
    "record_from_json",
    "record_to_json",
    "scores_key",
    "stored_arrays",
    "validate",
    "values_key",
    "write_adapter",
    "write_map",
]
