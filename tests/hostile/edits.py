"""Ways to break an adapter on disk: functions that make edits, each of which changes one copy."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from safetensors.numpy import load_file, save_file

from safeweights_peft.delta import digest
from safeweights_peft.patch.records import indices_key, tensor_key, values_key

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
VICTIM, OTHER = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
"""The parameters of the sound adapters: [48, 32] and [32], float32."""

INDICES, CONTENT = indices_key(VICTIM), "content"
"""What can be edited: the victim's indices, and its values or, in a map, its scores."""

UNPICKLED = "UNPICKLED"
"""The environment variable that names the directory which a pickle would make."""

Edit = Callable[[Path], object]
Tensors = dict[str, np.ndarray]
Config = dict[str, Any]


def tensors(change: Callable[[Tensors], object], forge: bool = True) -> Edit:
    """Change the stored tensors and, like a careful forger, the digest in the config."""

    def apply(folder: Path) -> None:
        stored = {key: np.array(value) for key, value in load_file(folder / TENSORS).items()}
        content_key = (
            values_key(VICTIM) if values_key(VICTIM) in stored else tensor_key(VICTIM, "scores")
        )
        stored[CONTENT] = stored.pop(content_key)
        change(stored)
        if CONTENT in stored:
            stored[content_key] = stored.pop(CONTENT)
        save_file(stored, folder / TENSORS, {"format": "pt"})
        if forge and {INDICES, content_key} <= stored.keys():
            record(digest=digest(stored[INDICES], stored[content_key]))(folder)

    return apply


def put(key: str, change: Callable[[np.ndarray], Any], forge: bool = True) -> Edit:
    """Change one stored tensor."""

    def edit(stored: Tensors) -> None:
        stored[key] = np.array(change(stored[key]), order="C")

    return tensors(edit, forge)


def entry(key: str, position: int, value: float, forge: bool = True) -> Edit:
    """Change one entry of a stored tensor."""

    def change(array: np.ndarray) -> np.ndarray:
        array[position] = value
        return array

    return put(key, change, forge)


def swap(array: np.ndarray) -> np.ndarray:
    """Exchange two neighbours."""
    array[[3, 4]] = array[[4, 3]]
    return array


def repeat(array: np.ndarray) -> np.ndarray:
    """Write one entry over the next."""
    array[4] = array[3]
    return array


def drop(key: str) -> Edit:
    """Remove a stored tensor."""
    return tensors(lambda stored: stored.pop(key))


def add(name: str, array: np.ndarray) -> Edit:
    """Store one more tensor."""
    return tensors(lambda stored: stored.update({name: array}))


def config(change: Callable[[Config], object]) -> Edit:
    """Change the config."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        change(content)
        (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")

    return apply


def top(**fields: Any) -> Edit:
    """Change fields of the config."""
    return config(lambda content: content.update(fields))


def record(**fields: Any) -> Edit:
    """Change fields of the victim's record."""
    return config(lambda content: content["tensors"][VICTIM].update(fields))


def block(**fields: Any) -> Edit:
    """Change fields of the victim's block."""
    return config(lambda content: content["tensors"][VICTIM]["blocks"][0].update(fields))


def without(*path: str) -> Edit:
    """Remove a field of the config, however deep."""

    def change(content: Config) -> None:
        for step in path[:-1]:
            content = content[step]
        del content[path[-1]]

    return config(change)


def rename(old: str, new: str) -> Edit:
    """Give a parameter another name, in the config and in the tensors' file."""

    def move(content: Config) -> None:
        content["tensors"][new] = content["tensors"].pop(old)

    def apply(folder: Path) -> None:
        config(move)(folder)
        module, _, own = new.rpartition(".")
        stored = load_file(folder / TENSORS)
        for key in [key for key in stored if f".{old.rpartition('.')[0]}.safeweights" in key]:
            kind = key.split("safeweights_")[1].split("__")[0]
            stored[f"base_model.model.{module}.safeweights_{kind}__{own}"] = stored.pop(key)
        save_file(stored, folder / TENSORS, {"format": "pt"})

    return apply


def insert(addition: str) -> Edit:
    """Write something at the end of the config's object, which no JSON library would write."""

    def apply(folder: Path) -> None:
        text = (folder / CONFIG).read_text(encoding="utf-8").rstrip()
        (folder / CONFIG).write_text(f"{text[:-1]}, {addition}}}", encoding="utf-8")

    return apply


def raw(name: str, change: Callable[[bytes], bytes]) -> Edit:
    """Change a file's bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def header(change: Callable[[Config], object], length: int | None = None) -> Edit:
    """Change the header of the tensors' file, or only what it says of its own length."""

    def apply(folder: Path) -> None:
        content = (folder / TENSORS).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        parsed = json.loads(content[8:end])
        change(parsed)
        new = json.dumps(parsed).encode()
        size = struct.pack("<Q", len(new) if length is None else length)
        (folder / TENSORS).write_bytes(size + new + content[end:])

    return apply


def head(**fields: Any) -> Edit:
    """Change fields of the victim's indices in the header."""
    return header(lambda parsed: parsed[INDICES].update(fields))


def header_text(content: bytes) -> Edit:
    """Replace the header by some bytes."""

    def change(whole: bytes) -> bytes:
        end = 8 + int.from_bytes(whole[:8], "little")
        return struct.pack("<Q", len(content)) + content + whole[end:]

    return raw(TENSORS, change)


def twice_in_header(folder: Path) -> None:
    """Name the victim's indices twice, which some safetensors libraries accept."""
    content = (folder / TENSORS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8:end])
    entry_text = f"{json.dumps(INDICES)}: {json.dumps(parsed[INDICES])}"
    header_text(content[8:end].rstrip()[:-1] + f", {entry_text}}}".encode())(folder)


def overlap(parsed: Config) -> None:
    """Let two tensors share bytes."""
    first, second = sorted(
        (key for key in parsed if key != "__metadata__"),
        key=lambda key: parsed[key]["data_offsets"],
    )[:2]
    length = parsed[second]["data_offsets"][1] - parsed[second]["data_offsets"][0]
    begin = parsed[first]["data_offsets"][0]
    parsed[second]["data_offsets"] = [begin, begin + length]


def replace(name: str, make: Callable[[Path], object]) -> Edit:
    """Put something else into a file's place."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def link(target: str) -> Callable[[Path], None]:
    """Make a symbolic link."""
    return lambda path: path.symlink_to(target)


def missing(name: str) -> Edit:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


class Exploit:
    """A pickle that makes a directory where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Say what to call."""
        return os.mkdir, (os.environ[UNPICKLED],)


def pickles(folder: Path) -> None:
    """Put pickles beside the tensors."""
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Exploit()))


def only_pickles(folder: Path) -> None:
    """Put pickles into the tensors' place."""
    (folder / TENSORS).unlink()
    pickles(folder)


def hole(folder: Path) -> None:
    """Claim terabytes of tensors, consistently, in a file that is a hole."""
    count = 2**40

    def claim(content: Config) -> None:
        content["tensors"] = {VICTIM: content["tensors"][VICTIM]}
        content["tensors"][VICTIM].update(shape=[count], count=count, blocks=[])

    config(claim)(folder)
    kind = "scores" if json.loads((folder / CONFIG).read_text())["mode"] == "spa" else "values"
    content_key = INDICES.replace("indices", kind)
    parts = {
        INDICES: {"dtype": "I64", "shape": [count], "data_offsets": [0, 8 * count]},
        content_key: {"dtype": "F32", "shape": [count], "data_offsets": [8 * count, 12 * count]},
    }
    content = json.dumps(parts).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + 12 * count)


def hole_of_rows(folder: Path) -> None:
    """Claim terabytes in one row, whose number takes eight bytes and whose values are a hole."""
    count = 2**40
    block = {"key": "victim", "shape": [2, count], "offset": 0, "strides": [count, 1]}

    def claim(content: Config) -> None:
        content["tensors"] = {VICTIM: content["tensors"][VICTIM]}
        record = content["tensors"][VICTIM]
        record.pop("streams", None)
        record.update(shape=[2, count], count=count, blocks=[block], encoding="rows", tied_keys=[])

    config(claim)(folder)
    kind = "scores" if json.loads((folder / CONFIG).read_text())["mode"] == "spa" else "values"
    parts = {
        INDICES: {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        INDICES.replace("indices", kind): {
            "dtype": "F32",
            "shape": [count],
            "data_offsets": [8, 8 + 4 * count],
        },
    }
    content = json.dumps(parts).encode()
    with (folder / TENSORS).open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + 8 + 4 * count)


def frame(content: bytes, **options: Any) -> bytes:
    """Compress some bytes as a writer does, or with other options of zstd."""
    plain = {"level": 1, "write_checksum": False, "write_content_size": True}
    return zstandard.ZstdCompressor(**(plain | options)).compress(content)


def sized(content: bytes, size: int) -> bytes:
    """Compress some bytes into a frame that says that they are more or fewer."""
    whole = frame(content)
    single = whole[4] >> 5 & 1  # then there is a content size, and no window descriptor
    start = 5 + (1 - single) + {0: single, 1: 2, 2: 4, 3: 8}[whole[4] >> 6]
    return whole[:4] + bytes([0xE0]) + size.to_bytes(8, "little") + whole[start:]


def gaps(indices: np.ndarray) -> bytes:
    """Code indices as gaps of one byte, of which none needs an escape."""
    found = np.diff(indices.astype(np.int64), prepend=-1) - 1
    assert found.max() < 255
    return found.astype(np.uint8).tobytes()


def float_planes(values: np.ndarray) -> list[bytes]:
    """Split values into byte planes."""
    rows = values.view(np.uint8).reshape(values.size, values.itemsize)
    return [rows[:, place].tobytes() for place in range(values.itemsize)]


def coded(
    key: str, frames: Callable[[np.ndarray], list[bytes]], coding: str, **fields: Any
) -> Edit:
    """Store the indices or the content as frames, in a compact record.

    Fields of the stream, such as ``escapes`` or ``bytes``, may be given to be wrong.
    """

    def apply(folder: Path) -> None:
        made: list[bytes] = []

        def change(array: np.ndarray) -> np.ndarray:
            made.extend(frames(array))
            return np.frombuffer(b"".join(made), np.uint8)

        put(key, change)(folder)
        stream = {
            "coding": coding,
            "escapes": 0,
            "bytes": [len(content) for content in made],
        } | fields
        mode = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["mode"]
        content_kind = "scores" if mode == "spa" else "values"
        kind, other = ("indices", content_kind)[:: 1 if key == INDICES else -1]
        plain = {"coding": "plain", "escapes": 0, "bytes": []}
        record(encoding="compact", streams={kind: stream, other: plain})(folder)

    return apply


def gap_frame(change: Callable[[bytes], bytes], coding: str = "gaps8", **fields: Any) -> Edit:
    """Store the indices as one frame of gaps, made of them by a function."""
    return coded(INDICES, lambda array: [change(gaps(array))], coding, **fields)


def bomb(entries: int) -> Edit:
    """Claim many entries, all side by side and all 0, in frames of a few hundred bytes."""
    block = b"\0" * min(entries, 2**22)

    def zeros(_: np.ndarray) -> bytes:
        return frame(block) if len(block) == entries else sized(block, entries)

    def apply(folder: Path) -> None:
        coded(INDICES, lambda array: [zeros(array)], "gaps8")(folder)
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        streams = content["tensors"][VICTIM]["streams"]
        (kind,) = streams.keys() - {"indices"}
        planes = [zeros(block)] * 4

        def store(stored: Tensors) -> None:
            stored[CONTENT] = np.frombuffer(b"".join(planes), np.uint8)

        tensors(store)(folder)
        streams[kind] = {
            "coding": "planes",
            "escapes": 0,
            "bytes": [len(plane) for plane in planes],
        }
        shape = [entries]
        record(streams=streams, shape=shape, count=entries)(folder)
        block_fields = {"shape": shape, "strides": [1], "offset": 0, "key": VICTIM}
        record(blocks=[block_fields])(folder)

    return apply
