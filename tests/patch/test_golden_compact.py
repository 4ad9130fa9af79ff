"""Compact files of format 1.1 stay readable, and mean what they meant."""

import re
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.delta import WEIGHT_DTYPES, add_rounded, digest
from safeweights_peft.patch.codec import decode_gaps, decode_steps, decompress, take_steps, value_of
from safeweights_peft.patch.io import inspect, read_adapter, read_map, write_adapter, write_map
from safeweights_peft.patch.metadata import Fields
from safeweights_peft.patch.metadata import _stream_from_json as stream_from_json
from safeweights_peft.patch.placement import STREAMS, Coding
from safeweights_peft.patch.records import TensorRecord
from tests.tiny_files import dense, fused_experts

GOLDEN = Path(__file__).parents[1] / "golden" / "format_v1_compact"
PAGE = Path(__file__).parents[2] / "docs" / "format.md"
CONTENT_IDS = {
    "patch": "sha256:922287eed2703039206747786e538b4429e82264141ebf864959c588ba03bd62",
    "map": "sha256:67192199fcb0a473d2c01ddf65f12ed6356436974db99c54a331d706050c5653",
}

# By parameter: a record, how far entries lie apart, and what some of the steps are multiplied by.
PARAMETERS: dict[str, tuple[TensorRecord, int, int]] = {
    "model.embed_tokens.weight": (
        dense("embed", (1000, 64), "bfloat16", tied_keys=("lm_head.weight",)),
        200,
        50,
    ),
    "model.layers.0.mlp.experts.gate_up_proj": (
        fused_experts("experts", 2, 20, 30, "float16"),
        8,
        40,
    ),
    "model.layers.0.self_attn.k_proj.weight": (dense("k_proj", (300, 700), "bfloat16"), 700, 1),
    "model.layers.0.self_attn.q_proj.weight": (dense("q_proj", (50, 60), "float8_e4m3fn"), 7, 1),
    "model.layers.0.self_attn.v_proj.weight": (dense("v_proj", (50, 60), "float32"), 11, 2**19),
    "model.large.weight": (dense("large", (2**16, 2**17), "bfloat16"), 3 * 2**21, 1),
    "model.norm.weight": (dense("norm", (9,), "float32"), 3, 1),
}


def indices_of(record: TensorRecord, apart: int) -> np.ndarray:
    count = min(300, record.numel // apart)
    found = [n * apart + n * n % apart for n in range(count)]
    return np.array(found, np.int32 if record.numel < 2**31 else np.int64)


def base_of(name: str, record: TensorRecord, indices: np.ndarray) -> np.ndarray:
    """The base that the files were made for; positive, so that bits count up with the numbers."""
    return ((1 + 17 * indices % 23) / 16).astype(WEIGHT_DTYPES[record.dtype])


def merged_of(base: np.ndarray, factor: int) -> np.ndarray:
    """What the patch makes of the base; in float16 all steps are large, elsewhere one in 40."""
    often = 1 if base.dtype == np.float16 else 40
    steps = [(n * n * 5 % 29 - 14) * (factor if n % often == 0 else 1) for n in range(base.size)]
    bits = base.view(f"u{base.itemsize}").astype(np.int64) + steps
    return bits.astype(f"u{base.itemsize}").view(base.dtype)


def expected() -> dict[str, tuple[TensorRecord, np.ndarray, np.ndarray, np.ndarray]]:
    """By parameter: its record, the indices, the base's entries and the merged ones."""
    found = {}
    for name, (record, apart, factor) in PARAMETERS.items():
        indices = indices_of(record, apart)
        base = base_of(name, record, indices)
        found[name] = record, indices, base, merged_of(base, factor)
    return found


def test_the_patch_reads_as_it_was_written() -> None:
    adapter = read_adapter(GOLDEN / "patch", base_of)
    assert adapter.metadata.content_id == CONTENT_IDS["patch"]
    for name, (record, indices, base, merged) in expected().items():
        delta = adapter.deltas[name]
        assert delta.shape == record.shape
        assert delta.indices.dtype == indices.dtype
        np.testing.assert_array_equal(delta.indices, indices)
        values = merged.astype(np.float32) - base.astype(np.float32)
        assert delta.values.tobytes() == values.tobytes()
        assert add_rounded(base, delta.values).tobytes() == merged.tobytes()
        digests = adapter.metadata.tensors[name]
        assert (digest(base), digest(merged)) == (digests.base_digest, digests.merged_digest)


def test_the_map_reads_as_it_was_written() -> None:
    safety_map = read_map(GOLDEN / "map")
    assert safety_map.metadata.content_id == CONTENT_IDS["map"]
    for name, (_, indices, base, merged) in expected().items():
        np.testing.assert_array_equal(safety_map.indices[name], indices)
        scores = np.abs(merged.astype(np.float32) - base.astype(np.float32))
        assert safety_map.scores[name].tobytes() == scores.tobytes()


def test_the_files_hold_every_coding_but_the_widest_steps() -> None:
    found = set()
    for kind in ("patch", "map"):
        facts = inspect(GOLDEN / kind)
        assert {record["encoding"] for record in facts["tensors"].values()} == {"compact", "plain"}
    for read in (read_adapter(GOLDEN / "patch", base_of), read_map(GOLDEN / "map")):
        for record in read.metadata.tensors.values():
            found |= {stream.coding for stream in record.streams.values()}
    assert found >= set(Coding) - {Coding.STEPS32, Coding.PLAIN}


def hex_lines(after: str) -> list[bytes]:
    """The lines of hexadecimal bytes that follow a sentence of the specification."""
    rest = PAGE.read_text().split(after, 1)[1]
    block = re.search(r"\n\n((?: {4}[0-9a-f ]+\n)+)", rest)
    assert block is not None
    return [bytes.fromhex(line) for line in block[1].splitlines()]


def test_the_example_in_the_specification_decodes_to_what_it_says() -> None:
    record = dense("page", (1000,), "bfloat16", count=4)
    symbols, frame = hex_lines("As bytes, and as a frame that")
    said = re.search(r'"indices": (\{.*?\})', PAGE.read_text().split("#### Example", 1)[1])
    assert said is not None
    assert said[1] == '{"coding": "gaps8", "escapes": 2, "bytes": [15]}'
    description = {"coding": "gaps8", "escapes": 2, "bytes": [15]}
    stream = stream_from_json(Fields(description, "page"), "indices", record)
    stored = np.frombuffer(frame, np.uint8)
    planes = decompress("page", stored, stream.sizes, stream.frames(4))
    assert planes[0].tobytes() == symbols
    assert decode_gaps("page", planes, 4, 1000).tolist() == [3, 4, 260, 770]

    *contents, first, second, third = hex_lines("one plane of four bytes, then two of one byte")
    description = {"coding": "steps8", "escapes": 1, "bytes": [13, 10, 10]}
    stream = stream_from_json(Fields(description, "page"), "values", record)
    stored = np.frombuffer(first + second + third, np.uint8)
    planes = decompress("page", stored, stream.sizes, stream.frames(4, 2))
    assert [plane.tobytes() for plane in planes] == contents
    base = np.array([1, -1, 0.5, 0], np.float32).astype(WEIGHT_DTYPES["bfloat16"])
    merged = take_steps(base, decode_steps("page", stream, planes, 2))
    bits = ["3f81", "bf81", "4000", "8001"]
    assert [f"{number:04x}" for number in merged.view(np.uint16).tolist()] == bits
    values = [0.0078125, -0.0078125, 1.5, -(2.0**-133)]
    assert value_of(base, merged).tolist() == values


def test_the_specification_names_every_coding() -> None:
    page = PAGE.read_text()
    names = [*Coding, *STREAMS, "streams", "coding", "escapes", "bytes", "format_minor"]
    for name in [*names, "content_digest"]:
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_a_rewritten_adapter_is_the_same(kind: str, tmp_path: Path) -> None:
    if kind == "patch":
        written = write_adapter(tmp_path / kind, read_adapter(GOLDEN / kind, base_of), base=base_of)
    else:
        written = write_map(tmp_path / kind, read_map(GOLDEN / kind))
    assert written.content_id == CONTENT_IDS[kind]
