"""Hostile compact files: each lie in a record, a frame or a stream gives one clear error."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from safeweights_peft.delta import SparseDelta, add_rounded, digest
from safeweights_peft.errors import CorruptAdapterError, FormatError, UnsupportedVersionError
from safeweights_peft.patch.artifacts import Adapter, check_tensors, in_encoding
from safeweights_peft.patch.io import (
    inspect,
    read_artifact,
    read_map,
    read_metadata,
    validate,
    write_adapter,
    write_map,
)
from safeweights_peft.patch.records import (
    Encoding,
    TensorRecord,
    indices_key,
    tensor_key,
    values_key,
)
from tests.tiny_files import (
    Tensors,
    as_map,
    dense,
    edit_config,
    edit_tensors,
    memory_entries,
    random_checkpoint,
    random_patch,
)

NAME = "model.up.weight"
INDICES, VALUES = indices_key(NAME), values_key(NAME)
RECORDS = {NAME: dense(NAME, (64, 80), "bfloat16")}
COUNT, NUMEL = 512, 64 * 80
BASE = random_checkpoint(RECORDS)


def base_entries(name: str, record: TensorRecord, indices: np.ndarray) -> np.ndarray:
    return memory_entries(record, BASE)[indices]


def small_patch() -> Adapter:
    """A patch of small values, so that most steps are short."""
    whole = random_patch(RECORDS, BASE)
    (record,), (delta,) = whole.metadata.tensors.values(), whole.deltas.values()
    values = delta.values / 40
    merged = digest(add_rounded(base_entries(NAME, record, delta.indices), values))
    metadata = replace(whole.metadata, tensors={NAME: replace(record, merged_digest=merged)})
    return Adapter(metadata, {NAME: SparseDelta(delta.shape, delta.indices, values)})


PATCH = small_patch()


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    adapter = Adapter(in_encoding(PATCH.metadata, Encoding.COMPACT), PATCH.deltas)
    write_adapter(tmp_path / "patch", adapter, base=base_entries)
    streams = read_metadata(tmp_path / "patch").tensors[NAME].streams
    assert [stream.coding.value for stream in streams.values()] == ["gaps8", "steps8"]
    assert streams["values"].escapes > 0
    return tmp_path / "patch"


def frame(content: bytes, **options: Any) -> bytes:
    """One zstd frame, honest unless told otherwise."""
    return zstandard.ZstdCompressor(**options).compress(content)


def set_stream(kind: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["tensors"][NAME]["streams"][kind].update(changes)


def set_record(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["tensors"][NAME].update(changes)


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        at = config["tensors"][NAME]
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return edit


CONFIG_EDITS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (drop("streams"), "streams: expected a JSON object, found NoneType"),
    (drop("streams", "values"), "streams: expected indices and values, found indices"),
    (set_record(streams={}), "streams: expected indices and values, found none"),
    (set_record(streams=[]), "streams: expected a JSON object, found list"),
    (set_record(encoding="plain"), "'streams': expected only base_digest"),
    (set_stream("indices", more=1), "'more': expected only bytes, coding, escapes"),
    (drop("streams", "indices", "bytes"), "bytes: expected list, found nothing"),
    (drop("streams", "indices", "escapes"), "escapes: expected int, found nothing"),
    (drop("streams", "indices", "coding"), "coding: expected str, found nothing"),
    (set_stream("indices", coding=8), "coding: expected str, found int"),
    (set_stream("indices", coding="steps8"), "coding: expected one of plain, gaps8.*'steps8'"),
    (set_stream("indices", coding="planes"), "coding: expected one of plain, gaps8"),
    (set_stream("values", coding="gaps8"), "coding: expected one of plain, steps8"),
    (set_stream("values", coding="steps32"), "coding: expected steps of at most 16 bits"),
    (set_stream("values", coding="steps16"), "escapes: expected at most 0"),
    (set_stream("values", coding="planes"), "escapes: expected at most 0"),
    (set_stream("values", coding="planes", escapes=0), "expected bytes of 4 frames, found 3"),
    (set_stream("values", coding="plain", escapes=0), "expected bytes of 0 frames, found 3"),
    (set_stream("indices", escapes=-1), "escapes: expected at least 0, found -1"),
    (set_stream("indices", escapes=True), "escapes: expected int, found bool"),
    (set_stream("indices", escapes=COUNT + 1), f"escapes: expected at most {COUNT}"),
    (set_stream("values", escapes=2**62), f"escapes: expected at most {COUNT}"),
    (set_stream("values", escapes=0), "expected bytes of 1 frames, found 3"),
    (set_stream("indices", bytes=[]), "expected bytes of 1 frames, found 0"),
    (set_stream("indices", bytes=[0]), "bytes: expected at most 64 integers of at least 1"),
    (set_stream("indices", bytes=[-1]), "bytes: expected at most 64 integers"),
    (set_stream("indices", bytes=[1.0]), "bytes: expected at most 64 integers"),
    (set_stream("indices", bytes=[2**62]), "bytes: expected at most 2112 bytes, found 46116860"),
    (set_stream("indices", coding="gaps16"), "expected bytes of 2 frames, found 1"),
    (set_record(count=0), "coding: expected plain for no entries"),
    (set_record(count=COUNT - 1), "expected a zstd frame of"),
    (set_record(content_digest="sha256:" + "0" * 64), "expected digest sha256:000"),
    (set_record(content_digest=1), "content_digest: expected str"),
    (lambda config: config.update(scale=0.5), "expected scale 1 and values_dtype float32"),
    (lambda config: config.update(values_dtype="bfloat16"), "expected scale 1 and values_dtype"),
    (lambda config: config.update(format_minor=-1), "format_minor: expected at least 0"),
    (lambda config: config.update(format_minor="1"), "format_minor: expected int, found str"),
    (lambda config: config.update(format_minor=None), "format_minor: expected int, found NoneType"),
]


@pytest.mark.parametrize(("edit", "message"), CONFIG_EDITS, ids=[text for _, text in CONFIG_EDITS])
def test_a_record_that_lies_about_its_streams_is_refused(
    patch: Path, edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_config(patch, edit)
    with pytest.raises(CorruptAdapterError, match=message):
        read_artifact(patch)


def test_an_unknown_coding_asks_for_a_newer_package(patch: Path) -> None:
    edit_config(patch, set_stream("indices", coding="rice"))
    with pytest.raises(UnsupportedVersionError, match=r"coding: expected one of plain, .*'rice'"):
        inspect(patch)


def replace_frames(path: Path, kind: str, frames: list[bytes], escapes: int) -> None:
    """Put other frames into a file, with a config and digests that go with them."""
    key = {"indices": INDICES, "values": VALUES, "scores": tensor_key(NAME, "scores")}[kind]
    tensors: Tensors = {}

    def edit(stored: Tensors) -> None:
        stored[key] = np.frombuffer(b"".join(frames), np.uint8)
        tensors.update(stored)

    edit_tensors(path, edit)
    set_streams = set_stream(kind, bytes=[len(content) for content in frames], escapes=escapes)
    forged = digest(*(tensors[key] for key in sorted(tensors)))
    edit_config(path, set_streams)
    edit_config(path, set_record(digest=forged, content_digest=None))


def gaps(*lasts: int, escapes: int = 0) -> bytes:
    """Gaps of one, then some others, ``COUNT`` in all, and escapes before the last."""
    plain = [0] * (COUNT - len(lasts)) + list(lasts)
    return bytes(plain[:-1] + [255] * escapes + plain[-1:])


def headless(content: bytes) -> bytes:
    return frame(content, write_content_size=False)


def with_dictionary(content: bytes) -> bytes:
    dictionary = zstandard.train_dictionary(300, [bytes([i % 7, i % 5]) * 20 for i in range(99)])
    return frame(content, dict_data=dictionary)


def wide_window(content: bytes) -> bytes:
    """An honest frame whose header asks for a window of 2 GiB."""
    return (
        b"\x28\xb5\x2f\xfd\x80"
        + bytes([21 << 3])
        + len(content).to_bytes(4, "little")
        + ((len(content) << 3 | 1).to_bytes(3, "little") + content)
    )


def bomb(claimed: int, content: int) -> bytes:
    """A frame that claims one size and holds another: blocks of one repeated byte."""
    blocks = [min(content - at, 2**17) for at in range(0, content, 2**17)]
    body = b"".join(
        (size << 3 | 2 | (at == len(blocks) - 1)).to_bytes(3, "little") + b"\0"
        for at, size in enumerate(blocks)
    )
    return b"\x28\xb5\x2f\xfd\xe0" + claimed.to_bytes(8, "little") + body


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
WHOLE = f"expected a whole zstd frame of {COUNT} bytes, found"
FRAMES: list[tuple[str, list[bytes], int, str]] = [
    ("no frame", [b"not zstd at all"], 0, WHOLE),
    ("one byte", [b"\x28"], 0, WHOLE),
    ("cut", [frame(gaps())[:-1]], 0, WHOLE),
    ("trailing bytes", [frame(gaps()) + b"\0"], 0, WHOLE),
    ("two frames", [frame(gaps()) * 2], 0, WHOLE),
    ("a skippable frame before", [SKIPPABLE + frame(gaps())], 0, "expected a .*zstd frame of 512"),
    ("a skippable frame behind", [frame(gaps()) + SKIPPABLE], 0, WHOLE),
    ("another checksum", [frame(gaps(), write_checksum=True)[:-1] + b"\0"], 0, WHOLE),
    ("too short", [frame(gaps()[:-1])], 0, f"zstd frame of {COUNT} bytes, found one of 511"),
    ("too long", [frame(gaps() + b"\0")], 0, f"zstd frame of {COUNT} bytes, found one of 513"),
    ("no content size", [headless(gaps())], 0, "expected a zstd frame of 512 bytes, found one of"),
    ("a dictionary", [with_dictionary(gaps())], 0, f"zstd frame of {COUNT} bytes, found"),
    ("a window of 2 GiB", [wide_window(gaps())], 0, "window of at most 8388608 bytes, found 2147"),
    ("a bomb that says so", [bomb(2**40, 2**20)], 0, "found one of 1099511627776"),
    ("a bomb that denies it", [bomb(COUNT, 2**25)], 0, WHOLE),
    ("less than it claims", [bomb(COUNT, COUNT - 1)], 0, WHOLE),
    ("an escape at the end", [frame(gaps()[:-1] + b"\xff")], 0, "found 511 and an escape at the"),
    ("a missing escape", [frame(gaps(0, 0))], 1, "zstd frame of 513 bytes, found one of 512"),
    ("fewer gaps", [frame(b"\xff" + gaps()[1:])], 0, f"expected {COUNT} gaps, found 511"),
    ("more gaps", [frame(gaps() + b"\0")], 1, f"expected {COUNT} gaps, found 513"),
    ("a gap too far", [frame(gaps(*[254] * 19))], 0, "indices from 0 to 5119, found 5337"),
    ("one too far", [frame(gaps(*[254] * 18, 37))], 0, "indices from 0 to 5119, found 5120"),
    ("escapes too far", [frame(gaps(0, escapes=512))], 512, "indices from 0 to 5119, found 131071"),
]


@pytest.mark.parametrize(
    ("frames", "escapes", "message"),
    [lie[1:] for lie in FRAMES],
    ids=[lie[0] for lie in FRAMES],
)
def test_frames_that_lie_are_refused_though_every_digest_is_forged(
    patch: Path, frames: list[bytes], escapes: int, message: str
) -> None:
    replace_frames(patch, "indices", frames, escapes)
    inspect(patch)  # the header agrees with the config
    tracemalloc.start()
    for read in (read_artifact, validate):
        with pytest.raises(CorruptAdapterError, match=message) as caught:
            read(patch)
        assert f"adapter_model.safetensors: {INDICES}: " in str(caught.value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_the_last_index_may_be_the_last_entry(patch: Path) -> None:
    replace_frames(patch, "indices", [frame(gaps(*[254] * 18, 36))], 0)
    assert int(read_artifact(patch).indices[NAME][-1]) == NUMEL - 1


@pytest.mark.parametrize(
    ("narrow", "escapes", "message"),
    [
        (b"\x80" * 2 + b"\1" * (COUNT - 2), 3, "expected 3 escapes, found 2"),
        (b"\x80" * 4 + b"\1" * (COUNT - 4), 3, "expected 3 escapes, found 4"),
        (b"\x80" * 3 + b"\1" * (COUNT - 4), 3, f"zstd frame of {COUNT} bytes, found one of 511"),
    ],
)
def test_steps_that_lie_are_refused_without_a_base(
    patch: Path, narrow: bytes, escapes: int, message: str
) -> None:
    wide = frame(b"\1" * escapes)
    replace_frames(patch, "values", [frame(narrow), wide, wide], escapes)
    with pytest.raises(CorruptAdapterError, match=f"{VALUES}: .*{message}"):
        read_artifact(patch)


def test_escaped_steps_of_another_number_are_refused(patch: Path) -> None:
    narrow = b"\x80" * 3 + b"\1" * (COUNT - 3)
    replace_frames(patch, "values", [frame(narrow), frame(b"\1" * 3), frame(b"\1" * 2)], 3)
    with pytest.raises(CorruptAdapterError, match=r"zstd frame of 3 bytes, found one of 2"):
        read_artifact(patch)


def test_steps_to_what_is_no_number_are_refused(patch: Path) -> None:
    bits = int(base_entries(NAME, RECORDS[NAME], PATCH.deltas[NAME].indices)[:1].view(np.int16)[0])
    ordinal = bits if bits >= 0 else -1 - (bits & 0x7FFF)
    step = (0x7F80 - ordinal) % 2**16  # to infinity
    wide = [frame(bytes([step % 256])), frame(bytes([step // 256]))]
    replace_frames(patch, "values", [frame(b"\x80" + b"\0" * (COUNT - 1)), *wide], 1)
    coded = read_artifact(patch)
    with pytest.raises(CorruptAdapterError, match=f"{NAME}: values: expected finite values, found"):
        coded.decode(base_entries)  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_planes_of_what_is_no_number_are_refused(tmp_path: Path, value: float) -> None:
    safety_map = as_map(PATCH)
    compact = type(safety_map)(
        in_encoding(safety_map.metadata, Encoding.COMPACT), safety_map.indices, safety_map.scores
    )
    write_map(tmp_path / "map", compact)
    scores = safety_map.scores[NAME].copy()
    scores[5] = value
    planes = scores.view(np.uint8).reshape(-1, 4)
    frames = [frame(np.ascontiguousarray(planes[:, place]).tobytes()) for place in range(4)]
    replace_frames(tmp_path / "map", "scores", frames, 0)
    with pytest.raises(
        CorruptAdapterError, match=f"{tensor_key(NAME, 'scores')}: expected finite values"
    ):
        read_map(tmp_path / "map")


def test_a_flipped_bit_anywhere_in_the_data_is_noticed(patch: Path) -> None:
    file = patch / "adapter_model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content), 7):
        broken = bytearray(content)
        broken[at] ^= 1 << at % 8
        file.write_bytes(broken)
        with pytest.raises(FormatError, match=r"adapter_model.safetensors: "):
            read_artifact(patch)


def test_a_coded_tensor_must_be_bytes(patch: Path) -> None:
    edit_tensors(patch, lambda tensors: tensors.update({INDICES: tensors[INDICES].view(np.int8)}))
    with pytest.raises(CorruptAdapterError, match=r"expected uint8 \[\d+\], found int8"):
        inspect(patch)


def test_coded_tensors_in_memory_go_through_the_same_checks(patch: Path) -> None:
    metadata = read_metadata(patch)
    tensors: Tensors = {}
    edit_tensors(patch, tensors.update)
    found = check_tensors(metadata, tensors, "the state dict")[NAME]
    np.testing.assert_array_equal(found.indices, PATCH.deltas[NAME].indices)
    tensors[INDICES] = tensors[INDICES][::-1].copy()
    with pytest.raises(CorruptAdapterError, match=rf"^the state dict: {INDICES}: expected a whole"):
        check_tensors(metadata, tensors, "the state dict")
