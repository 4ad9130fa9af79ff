"""Reads a patch by docs/format.md alone, in 70 lines; a reader of strangers' files checks more.

    safeweights enhance demo/base --out demo/small --movement-steps 2 --steps 2 --limit 2
    safeweights convert demo/small/patch --encoding compact --out demo/compact
    python examples/read_compact.py demo/compact demo/base

The first two commands make a compact patch to try with.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import zstandard

PLAIN = {"coding": "plain"}


def load(folder):
    """Find the bytes of each tensor in a folder of safetensors files."""
    for path in Path(folder).glob("*.safetensors"):
        start = 8 + int.from_bytes((data := path.read_bytes())[:8], "little")
        for key, entry in json.loads(data[8:start]).items():
            if key != "__metadata__":
                first, stop = entry["data_offsets"]
                yield key, data[start + first : start + stop]


def numbers(frames, sizes):
    """Decompress byte planes and put numbers together."""
    ends = np.cumsum(sizes)
    planes = [zstandard.decompress(frames[e - n : e]) for e, n in zip(ends, sizes, strict=True)]
    return np.stack([np.frombuffer(raw, "u1") for raw in planes], 1).view(f"u{len(sizes)}")[:, 0]


def read_indices(stored, stream, numel):
    """Add up gaps."""
    if stream["coding"] == "plain":
        return np.frombuffer(stored, "i4" if numel < 2**31 else "i8")
    symbols = numbers(stored, stream["bytes"])
    ends = symbols < np.iinfo(symbols.dtype).max
    return np.cumsum(symbols + ends.astype("i8"))[ends] - 1


def spread(numbers, encoding, shape):
    """Turn the numbers of rows or columns into flat indices."""
    *_, rows, columns = shape
    if encoding == "rows":
        return (numbers.astype("i8")[:, None] * columns + np.arange(columns)).ravel()
    matrix, column = np.divmod(numbers.astype("i8"), columns)
    return np.sort((matrix * rows + np.arange(rows)[:, None]) * columns + column, axis=None)


def read_values(stored, stream, base, values_dtype):
    """Take steps from the base's entries, or joins planes."""
    coding, sizes, top = stream["coding"], stream.get("bytes"), 2 ** (8 * base.itemsize - 1)
    if coding in ("plain", "planes"):
        return np.frombuffer(numbers(stored, sizes) if sizes else stored, values_dtype)
    width, signed, unsigned = int(coding[5:]) // 8, f"i{base.itemsize}", f"u{base.itemsize}"
    steps = numbers(stored, sizes[:width]).view(f"i{width}").astype(signed)
    if stream["escapes"]:
        wide = numbers(stored[sum(sizes[:width]) :], sizes[width:])
        steps[steps == -(2 ** (8 * width - 1))] = wide.view(signed)
    bits = base.view(unsigned).astype("i8")
    ordinals = (np.where(bits < top, bits + top, 2 * top - 1 - bits) + steps) % (2 * top)
    bits = np.where(ordinals < top, 2 * top - 1 - ordinals, ordinals - top)
    merged, base = bits.astype(unsigned).view(base.dtype).astype("f4"), base.astype("f4")
    return np.where(bits == top, np.nextafter(-base, np.float32(-np.inf)), merged - base)


def base_entries(record, indices, tensors):
    """Find the base's entries, by blocks."""
    dtype = np.dtype(getattr(ml_dtypes, record["dtype"], record["dtype"]))
    memory = np.zeros(np.prod(record["shape"], dtype="i8"), f"u{dtype.itemsize}")
    for block in record["blocks"]:
        steps = np.multiply(block["strides"], dtype.itemsize)
        view = np.lib.stride_tricks.as_strided(memory[block["offset"] :], block["shape"], steps)
        view[...] = np.frombuffer(tensors[block["key"]], memory.dtype).reshape(view.shape)
    return memory[indices].view(dtype)


def read_patch(folder, base_folder):
    """Read each parameter's name, indices and values."""
    stored, tensors = dict(load(folder)), dict(load(base_folder))
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    dtype = getattr(ml_dtypes, config["values_dtype"], config["values_dtype"])
    for name, record in config["tensors"].items():
        key = "base_model.model.{}.safeweights_%s__{}".format(*name.rsplit(".", 1))
        streams = record.get("streams") or {"indices": PLAIN, "values": PLAIN}
        numel = int(np.prod(record["shape"], dtype=object))
        indices = read_indices(stored[key % "indices"], streams["indices"], numel)
        if record["encoding"] in ("rows", "columns"):
            indices = spread(indices, record["encoding"], record["shape"])
        base = base_entries(record, indices, tensors)
        yield name, indices, read_values(stored[key % "values"], streams["values"], base, dtype)


if __name__ == "__main__":
    for name, indices, values in read_patch(*sys.argv[1:]):
        print(f"{name}: {len(indices)} entries, the first is {values[:1]} at {indices[:1]}")
