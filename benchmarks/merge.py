"""Merging from shards to shards, against copying the same checkpoint with `cp -r`.

    python benchmarks/merge.py [--gigabytes 2] [--rounds 5] [--kills 100]

A bfloat16 checkpoint of eight shards and two patches of 1 % of its entries are made in a temporary
directory (``--folder`` chooses the disk): of entries anywhere, which lie in every page of every
file, and of 1 % of the rows. Each way is a process of its own, from its start to its end, and peak
memory is that of the whole process, mapped files included; the ways take turns. Files are warm in
the system's cache. A merge brings its result to the disk before it ends, so that it survives a
power failure; `cp -r` doesn't, so there is a column for `cp -r` followed by `sync`. Times are
medians, and ratios the medians of each round's.

The bare loop is what changing the entries takes in itself: their positions and new values lie ready
in a file, numpy writes them into the mapped shards and syncs these, and nothing is checked or kept.

Then, on a smaller checkpoint, merges, merges in place and unmerges are killed (SIGKILL) at random
moments of their work. A merge must have left the whole result or none, and the next call must
finish the merge in place or restore the base, bit for bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from merge_kills import kill_at_random

from safeweights_peft import Adapter, SparseDelta, write_adapter
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, add_rounded, digest, index_dtype
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord

DENSITY = 0.01
SHARDS = 8
SPREADS = {"random": "anywhere", "rows": "in rows"}
ROWS, COLUMNS = 4096, 2048
TENSOR_BYTES = ROWS * COLUMNS * 2


def write_shard(path: Path, keys: list[str], entries: np.random.Generator) -> None:
    """Write one shard, a tensor at a time."""
    header = {
        key: {
            "dtype": "BF16",
            "shape": [ROWS, COLUMNS],
            "data_offsets": [at * TENSOR_BYTES, (at + 1) * TENSOR_BYTES],
        }
        for at, key in enumerate(keys)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in keys:
            tensor = entries.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)
            file.write(tensor.astype(DTYPES["bfloat16"]).view(np.uint16).data)


def build_base(path: Path, gigabytes: float) -> None:
    """Write a checkpoint of random entries."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    count = max(SHARDS, round(gigabytes * 1e9 / TENSOR_BYTES))
    keys = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(count)]
    weight_map, entries = {}, np.random.default_rng(0)
    for number in range(SHARDS):
        shard, part = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors", keys[number::SHARDS]
        write_shard(path / shard, part, entries)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": count * TENSOR_BYTES}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def choose(spread: str, chosen: np.random.Generator) -> np.ndarray:
    """Choose 1 % of a tensor's entries: anywhere, or whole rows."""
    numel = ROWS * COLUMNS
    if spread == "random":
        return np.sort(chosen.choice(numel, round(numel * DENSITY), replace=False))
    rows = np.sort(chosen.choice(ROWS, round(ROWS * DENSITY), replace=False))
    return (rows[:, None] * COLUMNS + np.arange(COLUMNS)).reshape(-1)


def build_patch(base: Path, path: Path, spread: str) -> int:
    """Write a patch of every tensor and, beside it, what a bare loop needs; count its entries."""
    reader, chosen = CheckpointReader(base), np.random.default_rng(1)
    records, deltas, bare = {}, {}, {}
    for key in reader.keys():
        indices = choose(spread, chosen).astype(index_dtype(ROWS * COLUMNS))
        values = (chosen.standard_normal(indices.size) * 1e-3).astype(np.float32)
        entries = reader.gather(key, indices)
        deltas[key] = SparseDelta((ROWS, COLUMNS), indices, values)
        records[key] = TensorRecord(
            shape=(ROWS, COLUMNS),
            dtype="bfloat16",
            blocks=(Block.dense(key, (ROWS, COLUMNS)),),
            base_digest=digest(entries),
            merged_digest=digest(add_rounded(entries, values)),
        )
        info = reader.info(key)
        place = f"{info.shard}:{info.offset}"
        bare[f"{place}:indices"] = indices
        bare[f"{place}:new"] = add_rounded(entries, values).view(np.uint16)
    np.savez(path.with_suffix(".npz"), **bare)
    write_adapter(path, Adapter(AdapterMetadata(mode=Mode.SET, tensors=records), deltas))
    return sum(delta.count for delta in deltas.values())


# The process itself tells its peak memory: what the system reports of a child (ru_maxrss) starts at
# the memory of its parent.
RUN = """
import sys
from pathlib import Path
from safeweights_peft.cli import main
try:
    main()
finally:
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""

BARE_LOOP = """
import os, sys
from pathlib import Path
import numpy as np
shards = set()
with np.load(sys.argv[1]) as bare:
    for name in bare.files:
        shard, offset, part = name.split(":")
        if part == "indices":
            path = Path(sys.argv[2], shard)
            shards.add(path)
            raw = np.memmap(path, np.uint8, "r+", int(offset), (int(sys.argv[3]),))
            raw.view(np.ndarray).view(np.uint16)[bare[name]] = bare[f"{shard}:{offset}:new"]
for shard in shards:
    with open(shard, "r+b") as file:
        os.fsync(file.fileno())
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def command(*arguments: object) -> list[str]:
    """Spell a command of the package."""
    return [sys.executable, "-c", RUN, *map(str, arguments)]


def measure(arguments: list[str]) -> tuple[float, float]:
    """Run a process; give its wall time in seconds and, of ours, its peak memory in bytes."""
    start = time.perf_counter()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr}")
    return seconds, 1024 * float(done.stderr.split()[-1]) if done.stderr else np.nan


def copy_with_cp(base: Path, out: Path, sync: bool) -> Callable[[], tuple[float, float]]:
    """Prepare a copy by `cp -r`."""
    script = 'cp -r "$0" "$1"' + (' && sync -f "$1"' if sync else "")
    return lambda: measure(["sh", "-c", script, str(base), str(out)])


def find_ways(folder: Path, base: Path, patches: dict[str, Path]) -> dict[str, Callable]:
    """List what is measured, in the order in which it is run."""
    out, here, loose = folder / "out", folder / "here", folder / "loose"
    ways = {
        "cp -r": copy_with_cp(base, out, sync=False),
        "cp -r, then sync": copy_with_cp(base, out, sync=True),
    }
    for spread, patch in patches.items():
        loop = [sys.executable, "-c", BARE_LOOP, str(patch.with_suffix(".npz")), str(loose)]
        for way, arguments in {
            "merge": command("merge", base, patch, "--out", out),
            "merge --in-place": command("merge", here, patch, "--in-place"),
            "unmerge": command("unmerge", here),
            "bare loop": [*loop, str(TENSOR_BYTES)],
        }.items():
            ways[f"{way}, {SPREADS[spread]}"] = partial(measure, arguments)
    return ways


def compare(folder: Path, base: Path, patches: dict[str, Path], rounds: int) -> None:
    """Measure all ways in turn, and print a table."""
    out = folder / "out"
    for copy in ("here", "loose"):  # merged in place and back; changed by the bare loop
        shutil.copytree(base, folder / copy)
    ways = find_ways(folder, base, patches)
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first round warms the system's cache
        for way, run in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # what others have left to write is not this way's
            measured = run()
            if number:
                results[way].append(measured)
    shutil.rmtree(out, ignore_errors=True)
    plain, synced = (np.array(results[way])[:, 0] for way in ("cp -r", "cp -r, then sync"))
    print("\n| | seconds | against cp -r | against cp -r, sync | peak memory, MB |")
    print("|---|---|---|---|---|")
    for way, measurements in results.items():
        seconds, memory = np.array(measurements).T
        peak = "" if np.isnan(memory).any() else f"{np.median(memory) / 1e6:.0f}"
        ratios = " | ".join(f"{np.median(seconds / other):.2f}" for other in (plain, synced))
        print(f"| {way} | {np.median(seconds):.2f} | {ratios} | {peak} |")


def main() -> None:
    """Build checkpoints and patches, compare, and kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--folder", help="where the temporary directory goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.rounds:
            build_base(folder / "base", options.gigabytes)
            patches = {spread: folder / spread for spread in SPREADS}
            for spread, patch in patches.items():
                count = build_patch(folder / "base", patch, spread)
                print(f"{count:,} entries patched {SPREADS[spread]}")
            size = CheckpointReader(folder / "base").size_bytes
            print(f"{size / 1e9:.2f} GB in {SHARDS} shards")
            compare(folder, folder / "base", patches, options.rounds)
            shutil.rmtree(folder / "base")
        if options.kills:
            build_base(folder / "small", 0)  # one tensor in each shard
            build_patch(folder / "small", folder / "patch", "random")
            kill_at_random(folder / "small", folder / "patch", options.kills)


if __name__ == "__main__":
    main()
