"""Merging from shards to shards, against copying the same checkpoint with `cp -r`.

    python benchmarks/merge.py [--gigabytes 2] [--rounds 5] [--kills 100] [--spread random]

A bfloat16 checkpoint of eight shards and a patch of 1 % of its entries are made in a temporary
directory (``--folder`` chooses the disk). Each merge is a process of its own, from its start to its
end, and peak memory is that of the whole process, mapped files included; the ways take turns.
Files are warm in the system's cache. A merge brings its result to the disk before it ends, so that
it survives a power failure; `cp -r` doesn't, so there is a column for `cp -r` followed by `sync`.
Times are medians. ``--spread clustered`` puts the entries into 1 % of the rows instead of anywhere:
then a merge in place touches 1 % of the pages, and not all of them.

Then a merge in place and an unmerge are killed (SIGKILL) at random moments. Each time the next call
must finish the merge or restore the base, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from safeweights_peft import Adapter, SparseDelta, write_adapter
from safeweights_peft.checkpoint import CheckpointReader
from safeweights_peft.delta import DTYPES, add_rounded, digest, index_dtype
from safeweights_peft.format import AdapterMetadata, Block, Mode, TensorRecord

DENSITY = 0.01
SHARDS = 8
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
    """Write a patch of every tensor, and return its number of entries."""
    reader, chosen = CheckpointReader(base), np.random.default_rng(1)
    records, deltas = {}, {}
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


def compare(folder: Path, base: Path, patch: Path, rounds: int) -> None:
    """Measure all ways in turn, and print a table."""
    out, here = folder / "out", folder / "here"
    shutil.copytree(base, here)
    ways = {
        "cp -r": copy_with_cp(base, out, sync=False),
        "cp -r, then sync": copy_with_cp(base, out, sync=True),
        "merge": lambda: measure(command("merge", base, patch, "--out", out)),
        "merge --in-place": lambda: measure(command("merge", here, patch, "--in-place")),
        "unmerge": lambda: measure(command("unmerge", here)),
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first round warms the system's cache
        for way, run in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()  # what others have left to write is not this way's
            measured = run()
            if number:
                found[way].append(measured)
    shutil.rmtree(out, ignore_errors=True)
    medians = {way: np.median(each, axis=0) for way, each in found.items()}
    plain, synced = medians["cp -r"][0], medians["cp -r, then sync"][0]
    print("\n| | seconds | against cp -r | against cp -r, sync | peak memory, MB |")
    print("|---|---|---|---|---|")
    for way, (seconds, memory) in medians.items():
        peak = "" if np.isnan(memory) else f"{memory / 1e6:.0f}"
        ratios = f"{seconds / plain:.2f} | {seconds / synced:.2f}"
        print(f"| {way} | {seconds:.2f} | {ratios} | {peak} |")


def content(directory: Path) -> dict[str, str]:
    """Hash every file of a directory."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def kill(arguments: list[str], seconds: float) -> bool:
    """Start a process and kill it after some time; tell whether it was still running."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def kill_at_random(folder: Path, base: Path, patch: Path, kills: int) -> None:
    """Kill merges and unmerges in place, recover by the next call, and print how often that held.

    Every other time the merge is finished by the same call before it is taken back.
    """
    here, moment = folder / "here", random.Random(0)
    merge, unmerge = command("merge", here, patch, "--in-place"), command("unmerge", here)
    whole = content(base)
    duration, _ = measure(merge)
    merged = {name: each for name, each in content(here).items() if name in whole}
    back, _ = measure(unmerge)
    running = recovered = 0
    for number in range(kills):
        if number % 2:
            running += kill(merge, moment.uniform(0, duration))
        else:
            measure(merge)
            running += kill(unmerge, moment.uniform(0, back))
        good = True
        if number % 4 > 1:
            measure(merge)
            now = content(here)
            good = all(now[name] == each for name, each in merged.items())
        subprocess.run(unmerge, check=False, capture_output=True)  # nothing may be left to undo
        recovered += good and content(here) == whole
    print(f"\nkilled {kills} times ({running} while it ran): recovered {recovered} of {kills}")


def main() -> None:
    """Build a checkpoint and a patch, compare, and kill."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--spread", choices=["random", "clustered"], default="random")
    parser.add_argument("--folder", help="where the temporary directory goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        build_base(folder / "base", options.gigabytes)
        count = build_patch(folder / "base", folder / "patch", options.spread)
        size = CheckpointReader(folder / "base").size_bytes
        print(f"{size / 1e9:.2f} GB in {SHARDS} shards, {count:,} entries patched")
        compare(folder, folder / "base", folder / "patch", options.rounds)
        kill_at_random(folder, folder / "base", folder / "patch", options.kills)


if __name__ == "__main__":
    main()
