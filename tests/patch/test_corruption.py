"""Hostile files: every way to break one gives one clear error, never a wrong answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeweights_peft.delta import DTYPES, digest
from safeweights_peft.errors import CorruptAdapterError, FormatError, UnsupportedVersionError
from safeweights_peft.patch.io import (
    inspect,
    read_adapter,
    read_map,
    validate,
    write_adapter,
    write_map,
)
from safeweights_peft.patch.records import indices_key, tensor_key, values_key
from tests.tiny_files import (
    Tensors,
    as_map,
    dense,
    edit_config,
    edit_tensors,
    fused_experts,
    random_checkpoint,
    random_patch,
)

NAME = "model.up.weight"
INDICES, VALUES = indices_key(NAME), values_key(NAME)
RECORDS = {
    NAME: dense(NAME, (6, 8), "bfloat16"),
    "model.experts.gate_up_proj": fused_experts("experts", 2, 3, 4, "bfloat16"),
}


@pytest.fixture(scope="module")
def sound_patch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "patch"
    write_adapter(path, random_patch(RECORDS, random_checkpoint(RECORDS)))
    return path


@pytest.fixture
def patch(sound_patch: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_patch, tmp_path / "patch"))


def put(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[key] = np.array(change(tensors[key]), order="C")

    return edit


def put_first(key: str, value: Any) -> Callable[[Tensors], None]:
    def change(array: np.ndarray) -> np.ndarray:
        array[0] = value
        return array

    return put(key, change)


def put_last(key: str, value: Any) -> Callable[[Tensors], None]:
    return put(key, lambda array: np.append(array[:-1], array.dtype.type(value)))


def add(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: np.zeros(2, np.float32)})


TENSOR_EDITS = [
    ("unsorted", put(INDICES, lambda a: a[::-1]), f"{INDICES}: expected ascending indices"),
    ("duplicate", put(INDICES, lambda a: np.repeat(a[:1], a.size)), f"{INDICES}: expected ascend"),
    ("negative", put_first(INDICES, -1), f"{INDICES}: expected indices from 0 to 47, found -1"),
    ("too large", put_last(INDICES, 48), f"{INDICES}: expected indices from 0 to 47, found 48"),
    ("huge", put_last(INDICES, 2**31 - 1), f"{INDICES}: .* found 2147483647"),
    ("moved", put_last(INDICES, 47), f"{NAME}: expected digest sha256:.*, found sha256:"),
    ("NaN", put_first(VALUES, np.nan), f"{VALUES}: expected finite values, found nan"),
    ("infinity", put_first(VALUES, np.inf), f"{VALUES}: expected finite values, found inf"),
    ("another value", put_first(VALUES, 0.5), f"{NAME}: expected digest"),
    ("negative zero", put_first(VALUES, -0.0), f"{NAME}: expected digest"),
    ("int64", put(INDICES, lambda a: a.astype(np.int64)), r"expected int32 \[4\], found int64"),
    ("uint32", put(INDICES, lambda a: a.astype(np.uint32)), "expected int32"),
    ("float32", put(INDICES, lambda a: a.astype(np.float32)), "expected int32"),
    ("float64", put(VALUES, lambda a: a.astype(np.float64)), "expected float32"),
    ("bfloat16", put(VALUES, lambda a: a.astype(DTYPES["bfloat16"])), "expected float32"),
    ("fewer values", put(VALUES, lambda a: a[:-1]), r"expected float32 \[4\], found float32 \[3\]"),
    ("fewer indices", put(INDICES, lambda a: a[:-1]), r"expected int32 \[4\], found int32 \[3\]"),
    ("rank 2", put(INDICES, lambda a: a.reshape(2, 2)), r"expected int32 \[4\], found .*\[2, 2\]"),
    ("rank 0", put(VALUES, lambda a: a[0].reshape(())), r"expected float32 \[4\], found .*\[\]"),
    ("no values", lambda tensors: tensors.pop(VALUES), f"{VALUES}: expected .*, found nothing"),
    ("no indices", lambda tensors: tensors.pop(INDICES), f"{INDICES}: expected .*, found nothing"),
    ("extra tensor", add("base_model.model.lm_head.weight"), "expected only tensors that adapter_"),
    (
        "scores too",
        add(tensor_key(NAME, "scores")),
        "expected only tensors that adapter_config.json names",
    ),
    ("unknown module", add(values_key("a.b")), "expected only tensors that adapter_config.json"),
]


@pytest.mark.parametrize(
    ("edit", "message"),
    [(edit, message) for _, edit, message in TENSOR_EDITS],
    ids=[name for name, _, _ in TENSOR_EDITS],
)
def test_broken_tensors_are_refused_by_name(
    patch: Path, edit: Callable[[Tensors], object], message: str
) -> None:
    edit_tensors(patch, edit)
    for read in (read_adapter, validate):
        with pytest.raises(CorruptAdapterError, match=message) as caught:
            read(patch)
        assert str(patch / "adapter_model.safetensors") in str(caught.value)


def forge_digest(patch: Path) -> None:
    """Make the recorded digest that of the broken content, as an attacker would."""
    tensors: Tensors = {}
    edit_tensors(patch, tensors.update)
    edit_config(
        patch,
        lambda config: config["tensors"][NAME].update(
            digest=digest(tensors[INDICES], tensors[VALUES])
        ),
    )


DIGEST_MATTERS = {"moved", "another value", "negative zero"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [(edit, message) for name, edit, message in TENSOR_EDITS[:8] if name not in DIGEST_MATTERS],
    ids=[name for name, _, _ in TENSOR_EDITS[:8] if name not in DIGEST_MATTERS],
)
def test_a_forged_digest_does_not_help(
    patch: Path, edit: Callable[[Tensors], object], message: str
) -> None:
    edit_tensors(patch, edit)
    forge_digest(patch)
    with pytest.raises(CorruptAdapterError, match=message):
        read_adapter(patch)


def config_edit(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["tensors"][NAME].update(changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (config_edit(count=3), r"expected int32 \[3\], found int32 \[4\]"),
        (config_edit(count=49), "count: expected at most 48, found 49"),
        (config_edit(shape=[2**31]), r"expected int64 \[4\], found int32"),
        (config_edit(shape=[2**62, 4]), r"expected fewer than 2\*\*63 entries"),
        (config_edit(shape=[1], count=1, blocks=[]), r"expected int32 \[1\]"),
        (config_edit(blocks=[]), f"{NAME}: expected blocks that hold every selected entry"),
        (config_edit(digest="sha256:" + "0" * 64), "expected digest sha256:000"),
        (lambda config: config.update(values_dtype="float16"), "expected float16"),
        (lambda config: config.update(scale=None), "scale: expected a number"),
        (lambda config: config["tensors"].pop(NAME), "expected only tensors that adapter_config"),
        (
            lambda config: config["tensors"]["model.experts.gate_up_proj"]["blocks"][1].update(
                offset=0
            ),
            "overlapping|hold every",
        ),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    patch: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(patch, edit)
    with pytest.raises(CorruptAdapterError, match=message):
        read_adapter(patch)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"\x80\x04}q\x00.", "expected JSON"),  # a pickle
        (b"{", "expected JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"scale": 1, "scale": 2}', "the key 'scale' twice"),
        (b'{"scale": NaN}', "found NaN, which is not JSON"),
    ],
)
def test_a_config_that_is_not_json_is_refused(patch: Path, content: bytes, message: str) -> None:
    (patch / "adapter_config.json").write_bytes(content)
    with pytest.raises(CorruptAdapterError, match=message):
        inspect(patch)


def test_another_version_is_refused_before_the_tensors_are_looked_at(patch: Path) -> None:
    (patch / "adapter_model.safetensors").write_bytes(b"of the future")
    edit_config(patch, lambda config: config.update(format_version=2))
    with pytest.raises(UnsupportedVersionError, match="format_version: expected 1, found 2"):
        read_adapter(patch)


def test_an_unknown_encoding_is_refused(patch: Path) -> None:
    edit_config(patch, config_edit(encoding="bitmask"))
    with pytest.raises(
        UnsupportedVersionError,
        match=r"encoding: expected one of plain, compact, rows, columns, found",
    ):
        read_adapter(patch)


def test_a_file_cut_anywhere_is_refused(patch: Path) -> None:
    file = patch / "adapter_model.safetensors"
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"adapter_model.safetensors"):
            read_adapter(patch)


def test_a_byte_changed_anywhere_is_refused(patch: Path) -> None:
    """Any change is noticed, save in the safetensors metadata and padding, which say nothing."""
    file = patch / "adapter_model.safetensors"
    content = file.read_bytes()
    sound = read_adapter(patch)
    header_end = 8 + int.from_bytes(content[:8], "little")
    unnoticed = []
    for at in range(len(content)):
        for flip in (0x01, 0x20, 0x80):
            broken = bytearray(content)
            broken[at] ^= flip
            file.write_bytes(broken)
            try:
                found = read_adapter(patch)
            except FormatError:
                continue
            unnoticed.append(at)
            for name, delta in sound.deltas.items():
                np.testing.assert_array_equal(found.deltas[name].indices, delta.indices)
                np.testing.assert_array_equal(found.deltas[name].values, delta.values)
    assert all(8 <= at < header_end for at in unnoticed)


def test_a_byte_added_is_refused(patch: Path) -> None:
    file = patch / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CorruptAdapterError, match="as its header says"):
        read_adapter(patch)


def test_an_absurd_header_costs_no_memory(patch: Path) -> None:
    edit_config(patch, config_edit(count=2**40, shape=[2**40], blocks=[]))
    header = {
        INDICES: {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]},
        VALUES: {"dtype": "F32", "shape": [2**40], "data_offsets": [2**43, 2**43 + 2**42]},
    }
    content = json.dumps(header).encode()
    file = patch / "adapter_model.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(CorruptAdapterError, match="bytes, as its header says"):
        read_adapter(patch)


def test_broken_scores_are_refused(tmp_path: Path) -> None:
    write_map(tmp_path / "map", as_map(random_patch(RECORDS, random_checkpoint(RECORDS))))
    edit_tensors(tmp_path / "map", put_first(tensor_key(NAME, "scores"), np.nan))
    with pytest.raises(
        CorruptAdapterError, match=f"{tensor_key(NAME, 'scores')}: expected finite values"
    ):
        read_map(tmp_path / "map")
