"""Files of format 1.2 with rows and columns stay readable, and mean what they meant."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES, SparseDelta, add_rounded, digest
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import read_adapter, read_map, write_adapter, write_map
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Encoding, Mode, TensorRecord, indices_key
from tests.tiny_files import as_map, dense, fused_experts

GOLDEN = Path(__file__).parents[1] / "golden" / "format_v1_rows"
PAGE = Path(__file__).parents[2] / "docs" / "format.md"
CONTENT_IDS = {
    "patch": "sha256:cd689ea82a462e15c0ae23a8290dc68839776c6e186f65a9822f1be8984a3b54",
    "map": "sha256:b5a1db0a950c1d8ac9b4990283bda43eda875726a7e72b150cc75e33bfaff0fb",
}
COLUMNS, PLAIN, ROWS = Encoding.COLUMNS, Encoding.PLAIN, Encoding.ROWS

# By parameter: a record, its encoding, the stored numbers, and the flat indices by ranges.
PARAMETERS: dict[str, tuple[TensorRecord, Encoding, list[int], list[range]]] = {
    "model.embed_tokens.weight": (
        dense("embed", (8, 4), "bfloat16", tied_keys=("lm_head.weight",)),
        ROWS,
        [0, 7],
        [range(4), range(28, 32)],
    ),
    "model.large.weight": (
        dense("large", (2**24, 256), "bfloat16"),
        ROWS,
        [5, 2**24 - 1],
        [range(1280, 1536), range(2**32 - 256, 2**32)],
    ),
    "model.layers.0.mlp.experts.gate_up_proj": (
        fused_experts("experts.0", 2, 1, 3, "float16"),
        COLUMNS,
        [1, 5],
        [range(1, 5, 3), range(8, 12, 3)],
    ),
    "model.layers.0.self_attn.k_proj.weight": (
        dense("k_proj", (6, 10), "bfloat16"),
        PLAIN,
        [*range(21, 30)],
        [range(21, 30)],
    ),
    "model.layers.0.self_attn.o_proj.weight": (
        dense("o_proj", (6, 10), "float32"),
        COLUMNS,
        [3, 8],
        [range(3, 60, 10), range(8, 60, 10)],
    ),
    "model.layers.0.self_attn.q_proj.weight": (
        dense("q_proj", (6, 10), "float8_e4m3fn"),
        ROWS,
        [1, 4],
        [range(10, 20), range(40, 50)],
    ),
    "model.layers.1.mlp.experts.gate_up_proj": (
        fused_experts("experts.1", 2, 2, 3, "bfloat16"),
        ROWS,
        [1, 2, 7],
        [range(3, 9), range(21, 24)],
    ),
    "model.norm.weight": (dense("norm", (4,), "float32"), PLAIN, [*range(4)], [range(4)]),
}


def expected() -> dict[str, tuple[TensorRecord, np.ndarray, np.ndarray, np.ndarray]]:
    """By parameter: its record, the indices, the base's entries and the values."""
    found = {}
    for name, (record, _, _, parts) in PARAMETERS.items():
        dtype = np.int32 if record.numel < 2**31 else np.int64
        indices = np.sort(np.concatenate([np.array(part, dtype) for part in parts]))
        base = ((1 + 17 * indices % 23) / 16).astype(WEIGHT_DTYPES[record.dtype])
        values = ((indices % 31 - 15) / 64).astype(np.float32).astype(DTYPES["bfloat16"])
        found[name] = record, indices, base, values
    return found


def make_patch() -> Adapter:
    """Make the patch of the files anew."""
    tensors, deltas = {}, {}
    for name, (record, indices, base, values) in expected().items():
        merged = add_rounded(base, values, 0.5)
        tensors[name] = replace(record, base_digest=digest(base), merged_digest=digest(merged))
        deltas[name] = SparseDelta(record.shape, indices, values)
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path="someone/tiny",
        revision="0123abc",
        values_dtype="bfloat16",
        scale=0.5,
        transformers_version="5.23.0",
        selection={"method": "fisher", "granularity": "auto"},
        tensors=tensors,
    )
    return Adapter(metadata, deltas)


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_the_files_hold_numbers_of_rows_and_columns(kind: str) -> None:
    read = read_adapter if kind == "patch" else read_map
    metadata = read(GOLDEN / kind).metadata
    assert metadata.content_id == CONTENT_IDS[kind]
    assert metadata.tensors.keys() == PARAMETERS.keys()
    stored = load_file(GOLDEN / kind / "adapter_model.safetensors")
    for name, (_, encoding, numbers, _) in PARAMETERS.items():
        assert metadata.tensors[name].encoding is encoding
        assert stored[indices_key(name)].tolist() == numbers


def test_the_patch_reads_as_it_was_written() -> None:
    adapter = read_adapter(GOLDEN / "patch")
    for name, (record, indices, base, values) in expected().items():
        delta, digests = adapter.deltas[name], adapter.metadata.tensors[name]
        assert delta.shape == record.shape
        assert delta.indices.dtype == indices.dtype
        np.testing.assert_array_equal(delta.indices, indices)
        assert delta.values.tobytes() == values.tobytes()
        merged = add_rounded(base, values, adapter.metadata.scale)
        assert (digest(base), digest(merged)) == (digests.base_digest, digests.merged_digest)
        assert digests.content_digest == digest(indices)


def test_the_map_reads_as_it_was_written() -> None:
    safety_map = read_map(GOLDEN / "map")
    for name, (_, indices, _, values) in expected().items():
        np.testing.assert_array_equal(safety_map.indices[name], indices)
        assert safety_map.scores[name].tobytes() == np.abs(values.astype(np.float32)).tobytes()


@pytest.mark.parametrize("kind", ["patch", "map"])
@pytest.mark.parametrize("again", [True, False], ids=["rewritten", "made anew"])
def test_writing_gives_the_same_adapter_and_tensors(kind: str, again: bool, tmp_path: Path) -> None:
    if kind == "patch":
        written = write_adapter(
            tmp_path / kind, read_adapter(GOLDEN / kind) if again else make_patch()
        )
    else:
        written = write_map(
            tmp_path / kind, read_map(GOLDEN / kind) if again else as_map(make_patch())
        )
    assert written.content_id == CONTENT_IDS[kind]
    name = "adapter_model.safetensors"
    assert (tmp_path / kind / name).read_bytes() == (GOLDEN / kind / name).read_bytes()


def test_the_specification_says_what_the_files_hold() -> None:
    page = PAGE.read_text()
    for encoding in Encoding:
        assert f"| `{encoding}` |" in page
    assert (
        "In a [2, 2, 3] tensor the `columns` 1 and 5 are the flat\nindices 1, 4, 8 and 11." in page
    )
