"""Adapters as directories: what is written is read, whole or not at all."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from safeweights_peft.delta import DTYPES, SparseDelta, digest
from safeweights_peft.errors import CorruptAdapterError, FormatError
from safeweights_peft.patch.artifacts import Adapter, SafetyMap, check_tensors, in_encoding
from safeweights_peft.patch.io import (
    inspect,
    read_adapter,
    read_map,
    validate,
    write_adapter,
    write_map,
)
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Encoding, Mode, indices_key, values_key
from tests.tiny_files import as_map, dense, fused_experts, random_checkpoint, random_patch

RECORDS = {
    "model.up.weight": dense("model.up.weight", (4, 6), "bfloat16"),
    "model.experts.gate_up_proj": fused_experts("experts", 2, 3, 4, "float16"),
    "model.norm.weight": dense("model.norm.weight", (7,), "float32"),
}


def tiny_patch(**options: object) -> Adapter:
    return random_patch(RECORDS, random_checkpoint(RECORDS), **options)  # type: ignore[arg-type]


def files_in(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir())


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    values_dtype = draw(st.sampled_from(list(DTYPES)))
    tensors, deltas = {}, {}
    for number in range(draw(st.integers(1, 3))):
        name = f"layers.{number}.weight"
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        numel = int(np.prod(shape))
        chosen = draw(st.sets(st.integers(0, numel - 1), max_size=numel))
        floats = st.floats(-60000, 60000, width=16)
        values = draw(st.lists(floats, min_size=len(chosen), max_size=len(chosen)))
        deltas[name] = SparseDelta(
            shape,
            np.array(sorted(chosen), draw(st.sampled_from([np.int32, np.int64, np.uint16]))),
            np.array(values, DTYPES[values_dtype]),
        )
        any_digest = digest(np.array([number]))
        tensors[name] = dense(
            name, shape, "bfloat16", base_digest=any_digest, merged_digest=any_digest
        )
    metadata = AdapterMetadata(
        mode=Mode.SET,
        values_dtype=values_dtype,
        scale=draw(st.floats(-8, 8)),
        selection={"seed": draw(st.integers(0, 9))},
        tensors=tensors,
    )
    return Adapter(metadata, deltas)


@settings(deadline=None)
@given(adapters())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, adapter: Adapter
) -> None:
    path = tmp_path_factory.mktemp("round-trip") / "patch"
    written = write_adapter(path, adapter)
    found = read_adapter(path)
    assert found.metadata == written == validate(path)
    assert replace_contents(found.metadata) == replace_contents(adapter.metadata)
    assert found.deltas.keys() == adapter.deltas.keys()
    for name, delta in adapter.deltas.items():
        assert found.deltas[name].shape == delta.shape
        assert found.deltas[name].indices.dtype == np.int32
        assert found.deltas[name].values.tobytes() == delta.values.tobytes()
        np.testing.assert_array_equal(found.deltas[name].indices, delta.indices)


def replace_contents(metadata: AdapterMetadata) -> AdapterMetadata:
    """Take out what the writer computes."""
    tensors = {
        name: replace(record, count=0, digest=None, content_digest=None, encoding=Encoding.PLAIN)
        for name, record in metadata.tensors.items()
    }
    return replace(metadata, tensors=tensors)


def test_a_map_survives_too(tmp_path: Path) -> None:
    safety_map = as_map(tiny_patch())
    written = write_map(tmp_path / "map", safety_map)
    found = read_map(tmp_path / "map")
    assert found.metadata == written == validate(tmp_path / "map")
    for name in RECORDS:
        np.testing.assert_array_equal(found.indices[name], safety_map.indices[name])
        np.testing.assert_array_equal(found.scores[name], safety_map.scores[name])


def test_the_directory_holds_two_files_that_peft_can_open(tmp_path: Path) -> None:
    write_adapter(tmp_path / "patch", tiny_patch())
    assert files_in(tmp_path) == ["patch"]
    assert files_in(tmp_path / "patch") == ["adapter_config.json", "adapter_model.safetensors"]
    modes = {(tmp_path / "patch" / file).stat().st_mode for file in files_in(tmp_path / "patch")}
    assert len(modes) == 1
    with safe_open(tmp_path / "patch" / "adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert indices_key("model.up.weight") in set(file.keys())


def test_writing_is_deterministic(tmp_path: Path) -> None:
    adapter = tiny_patch()
    for name in ("one", "two"):
        shuffled = dict(reversed(adapter.deltas.items())) if name == "two" else adapter.deltas
        write_adapter(tmp_path / name, Adapter(adapter.metadata, shuffled))
    for file in files_in(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_an_existing_directory_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_adapter(tmp_path / "patch", tiny_patch())
    (tmp_path / "patch" / "README.md").write_text("a card of the old patch")
    second = tiny_patch(seed=5)
    with pytest.raises(FormatError, match="give --overwrite to replace it"):
        write_adapter(tmp_path / "patch", second)
    written = write_adapter(tmp_path / "patch", second, overwrite=True)
    assert read_adapter(tmp_path / "patch").metadata == written
    assert files_in(tmp_path) == ["patch"]
    assert "README.md" not in files_in(tmp_path / "patch")


def test_an_interrupted_writer_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)  # both files are written by then
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "patch", tiny_patch())
    assert files_in(tmp_path) == []


def test_a_killed_writer_leaves_no_adapter(tmp_path: Path) -> None:
    code = """
import os, sys
from safeweights_peft import write_adapter
from tests.patch.test_io import tiny_patch
os.fsync = lambda *_: os._exit(9)
write_adapter(sys.argv[1], tiny_patch())
"""
    out = tmp_path / "patch"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(out)], check=False, cwd=root)
    assert done.returncode == 9
    assert not out.exists()


def test_only_a_directory_with_a_config_is_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"expected a directory with adapter_config.json"):
        read_adapter(tmp_path)
    with pytest.raises(FormatError, match=r"expected a directory with adapter_config.json"):
        inspect(tmp_path / "missing")


def test_pickled_tensors_are_refused_and_the_reason_said(tmp_path: Path) -> None:
    write_adapter(tmp_path / "patch", tiny_patch())
    tensors = tmp_path / "patch" / "adapter_model.safetensors"
    tensors.rename(tensors.with_name("adapter_model.bin"))
    with pytest.raises(FormatError, match=r"found adapter_model.bin, a pickle, which can run code"):
        read_adapter(tmp_path / "patch")
    tensors.with_name("adapter_model.bin").unlink()
    with pytest.raises(FormatError, match=r"expected adapter_model.safetensors, found none"):
        validate(tmp_path / "patch")


def test_links_are_followed(tmp_path: Path) -> None:
    write_adapter(tmp_path / "blobs", tiny_patch())
    (tmp_path / "snapshot").mkdir()
    for file in files_in(tmp_path / "blobs"):
        (tmp_path / "snapshot" / file).symlink_to(tmp_path / "blobs" / file)
    assert read_adapter(tmp_path / "snapshot").metadata.mode is Mode.SET


def test_each_reader_refuses_the_other_kind(tmp_path: Path) -> None:
    write_adapter(tmp_path / "patch", tiny_patch())
    write_map(tmp_path / "map", as_map(tiny_patch()))
    with pytest.raises(
        FormatError,
        match=r"a safety map, found a safety patch; give the directory of a safety map",
    ):
        read_map(tmp_path / "patch")
    with pytest.raises(FormatError, match=r"a safety patch, found a safety map; give the dir"):
        read_adapter(tmp_path / "map")


def refusals() -> list[tuple[Adapter | SafetyMap, str]]:
    patch = tiny_patch()
    name = "model.up.weight"
    metadata, delta = patch.metadata, patch.deltas[name]
    record = metadata.tensors[name]
    spa = as_map(patch)

    def with_record(**changes: object) -> AdapterMetadata:
        changed = replace(record, **changes)  # type: ignore[arg-type]
        return replace(metadata, tensors=metadata.tensors | {name: changed})

    def with_delta(shape: tuple[int, ...], dtype: str) -> Adapter:
        other = SparseDelta(shape, delta.indices, delta.values.astype(DTYPES[dtype]))
        return Adapter(metadata, patch.deltas | {name: other})

    wrapped = spa.indices[name].astype(np.int64) + 2**32  # int32 would wrap it into range
    scores = spa.scores[name]
    return [
        (Adapter(spa.metadata, patch.deltas), "mode: expected set, found spa"),
        (SafetyMap(metadata, spa.indices, spa.scores), "mode: expected spa, found set"),
        (Adapter(metadata, {}), "expected a record, indices, and values"),
        (Adapter(metadata, patch.deltas | {"a.b": delta}), "a.b: expected a record"),
        (with_delta((24,), "float32"), r"expected a delta of the recorded shape \[4, 6\]"),
        (with_delta((4, 6), "float16"), "expected float32 .*, found float16"),
        (Adapter(replace(metadata, selection={"x": np.nan}), patch.deltas), "plain JSON"),
        (Adapter(replace(metadata, selection={"x": {1}}), patch.deltas), "plain JSON"),
        (Adapter(replace(metadata, scale=np.inf), patch.deltas), "plain JSON"),
        (Adapter(with_record(base_digest=None), patch.deltas), "expected a digest and a base"),
        (Adapter(with_record(merged_digest=None), patch.deltas), "expected a merged_digest"),
        (Adapter(with_record(blocks=()), patch.deltas), "blocks that hold every selected"),
        (
            SafetyMap(spa.metadata, spa.indices | {name: wrapped}, spa.scores),
            "expected indices from 0 to 23",
        ),
        (
            SafetyMap(spa.metadata, spa.indices | {"a.b": wrapped}, spa.scores),
            "a.b: expected a record",
        ),
        (
            SafetyMap(spa.metadata, spa.indices, spa.scores | {name: scores[:1]}),
            r"expected float32 \[2\], found float32 \[1\]",
        ),
        (
            SafetyMap(spa.metadata, spa.indices, spa.scores | {name: scores.astype(np.float64)}),
            "found float64",
        ),
        (
            SafetyMap(spa.metadata, spa.indices, spa.scores | {name: scores * np.nan}),
            "expected finite values, found nan",
        ),
    ]


@pytest.mark.parametrize(("artifact", "message"), refusals(), ids=[m for _, m in refusals()])
def test_the_writer_refuses_what_a_reader_would(
    tmp_path: Path, artifact: Adapter | SafetyMap, message: str
) -> None:
    write = write_adapter if isinstance(artifact, Adapter) else write_map
    with pytest.raises(FormatError, match=message):
        write(tmp_path / "out", artifact)  # type: ignore[arg-type]
    assert files_in(tmp_path) == []


def test_tensors_in_memory_go_through_the_same_checks() -> None:
    patch = tiny_patch()
    tensors = {indices_key(n): d.indices for n, d in patch.deltas.items()}
    tensors |= {values_key(n): d.values for n, d in patch.deltas.items()}
    records = {
        name: replace(record, count=delta.count, digest=digest(delta.indices, delta.values))
        for (name, record), delta in zip(
            patch.metadata.tensors.items(), patch.deltas.values(), strict=True
        )
    }
    metadata = replace(patch.metadata, tensors=records)
    check_tensors(metadata, tensors, "the state dict")
    tensors[indices_key("model.up.weight")] = np.array([0, 24], np.int32)
    with pytest.raises(CorruptAdapterError, match=r"^the state dict: .* found 24; do not use"):
        check_tensors(metadata, tensors, "the state dict")


def test_inspect_tells_sizes_without_reading_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "patch"
    write_adapter(path, tiny_patch(density=0.25))
    file = path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a wrong value, which only a reader of tensors can notice
    file.write_bytes(content)
    facts = inspect(path)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["parameters"], facts["entries"], facts["numel"]) == (3, 6 + 12 + 1, 24 + 48 + 7)
    assert facts["density"] == 19 / 79
    assert (facts["rows"], facts["columns"]) == (0, 0)
    assert facts["size_bytes"] == len(content)
    assert facts["tensors"]["model.up.weight"]["keys"] == ["model.up.weight"]
    with pytest.raises(CorruptAdapterError, match=r"adapter_model.safetensors: "):
        validate(path)


def test_inspect_refuses_a_header_that_contradicts_the_config(tmp_path: Path) -> None:
    write_adapter(tmp_path / "patch", tiny_patch())
    config = tmp_path / "patch" / "adapter_config.json"
    config.write_text(config.read_text().replace('"count": 2', '"count": 3'))
    with pytest.raises(CorruptAdapterError, match=r"expected int32 \[3\], found int32 \[2\]"):
        inspect(tmp_path / "patch")


def test_values_that_say_nothing_are_stored_plain_so_that_no_file_is_a_bomb(tmp_path: Path) -> None:
    """Zeros side by side would take a byte for thousands of entries, which no reader takes."""
    name = "model.up.weight"
    records = {name: dense(name, (64, 128), "bfloat16")}
    patch = random_patch(records, random_checkpoint(records), density=1)
    zeros = np.zeros(64 * 128, np.float32)
    scores = {name: zeros}
    safety_map = replace(as_map(patch), scores=scores)
    metadata = in_encoding(safety_map.metadata, Encoding.COMPACT)
    written = write_map(tmp_path / "map", replace(safety_map, metadata=metadata))
    assert {kind: each.coding.value for kind, each in written.tensors[name].streams.items()} == {
        "indices": "gaps8",
        "scores": "plain",
    }
    np.testing.assert_array_equal(read_map(tmp_path / "map").scores[name], zeros)
