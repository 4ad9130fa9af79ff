"""Files of every format version stay readable, by this package and from `docs/format.md` alone."""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeweights_peft.delta import DTYPES, add_rounded, digest
from safeweights_peft.patch.io import read_adapter, read_map, write_adapter, write_map
from safeweights_peft.patch.metadata import FORMAT_MINOR
from safeweights_peft.patch.records import Encoding, Mode

GOLDEN = Path(__file__).parents[1] / "golden" / "format_v1"
EMBEDDINGS, EXPERTS, NORM = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.norm.weight",
)
INDICES = {EMBEDDINGS: [0, 7, 19], EXPERTS: [1, 6, 13, 23], NORM: [2]}
VALUES = {  # bfloat16, exactly
    EMBEDDINGS: [0.25, -0.333984375, 0.00099945068359375],
    EXPERTS: [1.0, -0.010009765625, 0.30078125, 2.5],
    NORM: [0.69921875],
}


def base_entries(name: str, numel: int, dtype: str) -> np.ndarray:
    """The base that the files were made for."""
    entries = ((17 * np.arange(numel)) % 23 - 11) / 16
    return entries.astype(np.float32).astype(DTYPES[dtype])[INDICES[name]]


def test_the_patch_reads_as_it_was_written() -> None:
    adapter = read_adapter(GOLDEN / "patch")
    metadata = adapter.metadata
    assert (metadata.mode, metadata.scale, metadata.values_dtype) == (Mode.SET, 0.5, "bfloat16")
    assert (metadata.base_model_name_or_path, metadata.revision) == ("someone/tiny", "0123abc")
    assert metadata.selection == {"method": "esi", "density": 0.15, "seed": 0}
    assert {name: delta.indices.tolist() for name, delta in adapter.deltas.items()} == INDICES
    assert {name: delta.values.tolist() for name, delta in adapter.deltas.items()} == VALUES
    assert metadata.tensors[EMBEDDINGS].tied_keys == ("lm_head.weight",)
    assert [block.key.split("experts.")[1] for block in metadata.tensors[EXPERTS].blocks] == [
        "0.w1.weight",
        "0.w3.weight",
        "1.w1.weight",
        "1.w3.weight",
    ]


def test_the_rule_still_gives_the_recorded_digests() -> None:
    adapter = read_adapter(GOLDEN / "patch")
    for name, record in adapter.metadata.tensors.items():
        base = base_entries(name, record.numel, record.dtype)
        merged = add_rounded(base, adapter.deltas[name].values, adapter.metadata.scale)
        assert (digest(base), digest(merged)) == (record.base_digest, record.merged_digest)


def test_the_map_reads_as_it_was_written() -> None:
    safety_map = read_map(GOLDEN / "map")
    assert safety_map.metadata.mode is Mode.SPA
    assert {name: part.tolist() for name, part in safety_map.indices.items()} == INDICES
    for name, scores in safety_map.scores.items():
        assert scores.dtype == np.float32
        assert scores.tolist() == [abs(value) for value in VALUES[name]]


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_a_rewritten_adapter_has_the_same_bytes_but_for_what_is_new(
    kind: str, tmp_path: Path
) -> None:
    if kind == "patch":
        write_adapter(tmp_path / kind, read_adapter(GOLDEN / kind))
    else:
        write_map(tmp_path / kind, read_map(GOLDEN / kind))
    name = "adapter_model.safetensors"
    assert (tmp_path / kind / name).read_bytes() == (GOLDEN / kind / name).read_bytes()
    name = "adapter_config.json"
    config = json.loads((tmp_path / kind / name).read_text())
    assert config.pop("format_minor") == FORMAT_MINOR
    for record in config["tensors"].values():
        assert record.pop("content_digest").startswith("sha256:")
    assert config == json.loads((GOLDEN / kind / name).read_text())


def stored_bytes(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Read a safetensors file with the standard library, as a reader in another language would."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__")
    return {
        key: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_the_files_can_be_read_without_this_package(kind: str) -> None:
    config: dict[str, Any] = json.loads((GOLDEN / kind / "adapter_config.json").read_text())
    tensors = stored_bytes(GOLDEN / kind / "adapter_model.safetensors")
    word = "values" if kind == "patch" else "scores"
    for name, record in config["tensors"].items():
        module, _, own = name.rpartition(".")
        prefix = f"base_model.model.{module}.safeweights_"
        dtype, shape, indices = tensors.pop(f"{prefix}indices__{own}")
        assert (dtype, shape) == ("I32", [record["count"]])
        assert list(struct.unpack(f"<{record['count']}i", indices)) == INDICES[name]
        dtype, shape, content = tensors.pop(f"{prefix}{word}__{own}")
        assert (dtype, shape) == ("BF16" if kind == "patch" else "F32", [record["count"]])
        found = f"sha256:{hashlib.sha256(indices + content).hexdigest()}"
        assert found == record["digest"]
    assert not tensors


def test_the_example_in_the_specification_is_the_golden_record() -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    (example,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    config = json.loads((GOLDEN / "patch" / "adapter_config.json").read_text())
    assert json.loads(example) == config["tensors"][EXPERTS]
    assert f"`{EXPERTS}`" in page


def test_the_specification_names_every_field_and_encoding() -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    config = json.loads((GOLDEN / "patch" / "adapter_config.json").read_text())
    record = config["tensors"][EXPERTS]
    for name in [*config, *record, *record["blocks"][0], *Encoding, *DTYPES, *Mode]:
        assert f"`{name}`" in page or f'"{name}"' in page, name
