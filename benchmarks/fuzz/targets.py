"""What is fuzzed: functions of bytes, each of which may raise nothing but ``FormatError``.

``metadata`` takes bytes as a config. ``artifact`` takes them as a list of changes to small sound
adapters, in every encoding: to the config, to the header of the tensors' file, and to its bytes,
with digests forged or not; so it comes past the first check. ``streams`` takes them as frames and
the numbers that a record says of them. What is read without an error has to be in order.
"""

import json
import struct
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from safeweights_peft.delta import WEIGHT_DTYPES, SparseDelta, add_rounded, check_indices, digest
from safeweights_peft.errors import FormatError
from safeweights_peft.files import parse_json
from safeweights_peft.patch.artifacts import Adapter, SafetyMap, in_encoding
from safeweights_peft.patch.codec import compress, decode_gaps, decode_steps, decompress, split
from safeweights_peft.patch.groups import Group, count_groups, spread_groups
from safeweights_peft.patch.io import read_artifact, write_adapter, write_map
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block, Coding, Stream
from safeweights_peft.patch.records import Encoding, Mode, TensorRecord

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SHAPES = {"model.up.weight": (40, 30), "model.norm.weight": (30,)}
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3, 77, 255, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e39, ""),
    *(
        "plain",
        "compact",
        "rows",
        "columns",
        "set",
        "spa",
        "gaps8",
        "gaps16",
        "gaps32",
        "steps8",
        "steps16",
    ),
    *("steps32", "planes", "float32", "bfloat16", "float16", "float8_e5m2", "\x1b[2J", "a.b"),
    *([], {}, [1], [2**62, 4], [1] * 65, {"a": 1}),
]
STORED = ("I32", "I64", "U8", "F32", "BF16", "F16", "BOOL", "F8_E4M3")


class Choices:
    """Numbers and bytes out of a string of bytes; zeros when it is at its end."""

    def __init__(self, data: bytes) -> None:
        """Take the bytes."""
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        """Take some bytes, or fewer at the end."""
        self._at += count
        return self._data[self._at - count : self._at]

    def below(self, limit: int) -> int:
        """Choose a number below a limit of at most 2**16."""
        return int.from_bytes(self.take(1 if limit <= 256 else 2), "little") % limit

    def pick(self, options: Any) -> Any:
        """Choose one of several things."""
        return options[self.below(len(options))]


def metadata(data: bytes) -> None:
    """Read bytes as a config."""
    try:
        read = AdapterMetadata.from_config(parse_json(data, CONFIG, FormatError), CONFIG)
    except FormatError:
        return
    again = AdapterMetadata.from_config(read.to_config(), CONFIG)
    assert again == read, "a config that is written as another"


def artifact(data: bytes) -> None:
    """Change a sound adapter and read it."""
    choices = Choices(data)
    config, whole = choices.pick(sound_adapters())
    config, end = json.loads(config), 8 + int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8:end]), bytearray(whole[end:])
    for _ in range(choices.below(4)):
        _change(choices, config)
    for _ in range(choices.below(3)):
        _change_header(choices, header, body)
    if choices.below(2):
        _forge(config, header, body)
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        content = json.dumps(header).encode()
        Path(folder, CONFIG).write_text(json.dumps(config), encoding="utf-8")
        Path(folder, TENSORS).write_bytes(struct.pack("<Q", len(content)) + content + body)
        try:
            adapter = read_artifact(folder)
        except FormatError:
            return
    for name, indices in adapter.indices.items():
        check_indices(name, indices, adapter.metadata.tensors[name].shape)


def streams(data: bytes) -> None:
    """Decode frames as a record describes them."""
    choices = Choices(data)
    coding = choices.pick([coding for coding in Coding if coding is not Coding.PLAIN])
    count, escapes = choices.below(2**12), choices.below(2**8)
    numel, itemsize = 1 + choices.below(2**16), choices.pick([1, 2, 4])
    stream = Stream(coding, min(escapes, count))
    lengths = stream.frames(count, itemsize)
    if not count or coding.width > itemsize or not all(lengths):
        return
    if choices.below(4):  # else the rest is frames already
        planes = [np.frombuffer(choices.take(n).ljust(n, b"\1"), np.uint8) for n in lengths]
        frames = compress(planes)
    else:
        frames = [choices.take(choices.below(2**8)) for _ in lengths]
    stored = np.frombuffer(b"".join(frames), np.uint8)
    try:
        planes = decompress("here", stored, [len(frame) for frame in frames], lengths)
        if coding.value.startswith("gaps"):
            check_indices("here", decode_gaps("here", planes, count, numel), (numel,))
        elif coding.value.startswith("steps"):
            steps = decode_steps("here", stream, planes, itemsize)
            assert steps.shape == (count,), "steps of another number"
    except FormatError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "metadata": metadata,
    "artifact": artifact,
    "streams": streams,
}


def seeds(name: str) -> list[bytes]:
    """Make the first inputs of a target; all of them are read, or refused, without a finding."""
    if name == "metadata":
        return [config.encode() for config, _ in sound_adapters()]
    random = np.random.default_rng(0)
    made = [bytes([n]) + random.bytes(40) for n in range(16)]
    if name == "streams":
        frames = compress(split(np.arange(64, dtype=np.uint32)))
        made += [bytes([n, 64, 0, 0, 0, 16, 2, 0]) + b"".join(frames) for n in range(8)]
    return made


@cache
def sound_adapters() -> list[tuple[str, bytes]]:
    """Make small adapters in every encoding: a config's text and a tensor file's bytes."""
    made = []
    with tempfile.TemporaryDirectory() as root:
        for dtype in ("float32", "bfloat16"):
            for encoding in Encoding:
                patch, base = _patch(dtype, encoding.group)
                scores = {name: np.abs(delta.values) for name, delta in patch.deltas.items()}
                out = Path(root, dtype, encoding)
                metadata = in_encoding(patch.metadata, encoding)
                write_adapter(out / "patch", replace(patch, metadata=metadata), base=base)
                write_map(out / "map", SafetyMap(_as_map(metadata), patch.indices, scores))
                made += [out / "patch", out / "map"]
        return [((p / CONFIG).read_text("utf-8"), (p / TENSORS).read_bytes()) for p in made]


def _patch(dtype: str, group: Group | None) -> tuple[Adapter, Callable[..., Any]]:
    random = np.random.default_rng(0)
    deltas, records, entries = {}, {}, {}
    for name, shape in SHAPES.items():
        numel = int(np.prod(shape))
        total = count_groups(shape, group)[0] if group and len(shape) > 1 else numel
        indices = np.sort(random.choice(total, total // 3, replace=False)).astype(np.int32)
        if group and len(shape) > 1:
            indices = spread_groups(indices, group, shape)
        values = random.normal(scale=0.01, size=indices.size).astype(np.float32)
        blank = TensorRecord(shape=shape, dtype=dtype, blocks=(Block.dense(name, shape),))
        base = random.normal(size=indices.size).astype(np.float32)
        base = entries[name] = base.astype(WEIGHT_DTYPES[dtype])
        merged = digest(add_rounded(base, values))
        records[name] = replace(blank, base_digest=digest(base), merged_digest=merged)
        deltas[name] = SparseDelta(shape, indices, values)
    described = AdapterMetadata(mode=Mode.SET, base_model_name_or_path="a", tensors=records)
    return Adapter(described, deltas), lambda name, record, indices: entries[name]


def _as_map(metadata: AdapterMetadata) -> AdapterMetadata:
    tensors = {
        name: replace(record, merged_digest=None) for name, record in metadata.tensors.items()
    }
    return replace(metadata, mode=Mode.SPA, tensors=tensors)


@cache
def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _change(choices: Choices, node: Any) -> None:
    """Go down into JSON, and change what is there: replace, remove, move or count up."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = choices.pick(keys)
        if isinstance(node[key], dict | list) and node[key] and choices.below(8):
            node = node[key]
            continue
        way = choices.below(4)
        if way == 0:
            del node[key]
        elif way == 1 and type(node[key]) is int:
            node[key] += choices.below(2**16) - 2**8
        elif way == 2:
            node[key] = deepcopy(node[choices.pick(keys)])
        else:
            node[key] = deepcopy(choices.pick(ODD))
        return


def _change_header(choices: Choices, header: dict[str, Any], body: bytearray) -> None:
    """Change a header entry, or some bytes of a tensor."""
    way = choices.below(4)
    if way == 0:
        return _change(choices, header)
    entries = [entry for entry in header.values() if isinstance(entry, dict) and "dtype" in entry]
    if not entries:
        return None
    entry = choices.pick(entries)
    if way == 1:
        entry["dtype"] = choices.pick(STORED)
        return None
    offsets = entry.get("data_offsets")
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets):
        start, stop = (min(max(n, 0), len(body)) for n in offsets)
        for _ in range(1 + choices.below(8)):
            if start < stop:
                body[start + choices.below(2**16) % (stop - start)] = choices.below(256)
    return None


def _forge(config: dict[str, Any], header: dict[str, Any], body: bytearray) -> None:
    """Make the digests those of the changed bytes, where they can be found; forget the others."""
    tensors = config.get("tensors")
    for name, record in tensors.items() if isinstance(tensors, dict) else ():
        if not isinstance(record, dict):
            continue
        module, _, own = str(name).rpartition(".")
        parts = []
        for kind in ("indices", "values", "scores"):
            entry = header.get(f"base_model.model.{module}.safeweights_{kind}__{own}")
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            if isinstance(offsets, list) and len(offsets) == 2:
                if all(type(n) is int and 0 <= n <= len(body) for n in offsets):
                    parts.append(np.frombuffer(bytes(body[slice(*offsets)]), np.uint8))
        record["digest"] = digest(*parts)
        if "content_digest" in record:
            record["content_digest"] = None
