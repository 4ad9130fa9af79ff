"""Bytes per changed weight in the compact encoding, against what is possible and what others take.

    python benchmarks/encoding.py [--patch run/patch --base base] [--rounds 7]

Synthetic: one 4096×4096 bfloat16 matrix with entries of σ 0.02, of which some change by values of
σ 0.001: drawn uniformly, or as whole rows. The bound is the order-0 entropy of the same gaps and
steps, as integers. Decoding gives checked indices and values from what is stored, on one thread;
the second speed includes the digests and the lookup of blocks, as when a file is read. Time is CPU
time, the best of the rounds; memory is the peak of allocations on top of the stored bytes and the
base's entries, to what is decoded. A real patch is converted, and compared with other forms' bytes.
"""

import argparse
import math
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import WEIGHT_DTYPES, Array, add_rounded, bits_differ, digest
from safeweights_peft.merging.convert import convert
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.patch.artifacts import decode_entries, encode_entries
from safeweights_peft.patch.codec import (
    decode_gaps,
    decode_steps,
    decompress,
    encode_steps,
    take_steps,
    value_of,
)
from safeweights_peft.patch.io import file_bytes, read_artifact, read_metadata
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import (
    Encoding,
    Mode,
    TensorRecord,
    check_state,
    indices_key,
    values_key,
)

SIDE = 4096
NAME = "model.up.weight"
CASES = {
    "uniform 1 %": 0.01,
    "uniform 0.1 %": 0.001,
    "uniform 3 %": 0.03,
    "1 % as whole rows": None,
}
LIMITS = {"uniform 1 %": 2.0, "uniform 0.1 %": 2.9, "uniform 3 %": 1.75, "1 % as whole rows": 1.0}
OTHERS = {
    "SHiRA, Super-Tuning (8-byte index, float32)": 12.0,
    "TRL, vLLM (4-byte index, 16-bit number)": 6.0,
}


class Stored:
    """One parameter's entries as they are stored, and what is needed to decode them."""

    def __init__(self, record: TensorRecord, indices: Array, values: Array, base: Array) -> None:
        """Encode values at flat indices, of a base whose entries there are given."""
        digests = {"base_digest": digest(base), "merged_digest": digest(add_rounded(base, values))}
        record = replace(record, encoding=Encoding.COMPACT, **digests)
        record, first, second = encode_entries(Mode.SET, record, indices, values, base)
        self.record, self.indices, self.values, self.base = record, indices, values, base
        self.metadata = AdapterMetadata(mode=Mode.SET, tensors={NAME: record})
        self.tensors = {indices_key(NAME): first, values_key(NAME): second}

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of both stored arrays, per entry."""
        return sum(tensor.nbytes for tensor in self.tensors.values()) / self.record.count

    def bound(self) -> float:
        """Order-0 entropy of gaps and steps, in bytes per entry."""
        gaps = np.diff(self.indices.astype(np.int64), prepend=-1)
        coded = min(encode_steps(self.base, self.values), key=lambda coded: coded.stored.nbytes)
        lengths = coded.stream.frames(self.record.count, self.base.itemsize)
        planes = decompress(NAME, coded.stored, coded.stream.sizes, lengths)
        return entropy(gaps) + entropy(decode_steps(NAME, coded.stream, planes, self.base.itemsize))

    def decode(self) -> tuple[Array, Array]:
        """Decode indices and values, with the checks that no reader can leave out."""
        count, numel = self.record.count, self.record.numel
        first, second = self.tensors.values()
        gaps, steps = self.record.stream("indices"), self.record.stream("values")
        planes = decompress(NAME, first, gaps.sizes, gaps.frames(count))
        indices = decode_gaps(NAME, planes, count, numel)
        planes = decompress(NAME, second, steps.sizes, steps.frames(count, self.base.itemsize))
        decoded = decode_steps(NAME, steps, planes, self.base.itemsize)
        return indices, value_of(self.base, take_steps(self.base, decoded))

    def read(self) -> tuple[Array, Array]:
        """Decode them with every check, as when a file is read."""
        entries = decode_entries(self.metadata, NAME, self.tensors, "benchmark")
        check_state(NAME, self.base, entries.record)
        return entries.indices, entries.values_at(self.base)

    def check(self) -> int:
        """Count the merged entries that have other bits than those of the plain values."""
        indices, values = self.read()
        assert np.array_equal(indices, self.indices)
        merged = [add_rounded(self.base, change) for change in (self.values, values)]
        return int(bits_differ(*merged).sum())


def entropy(numbers: Array) -> float:
    """Order-0 entropy in bytes per number."""
    fractions = np.unique(numbers, return_counts=True)[1] / numbers.size
    return float(-(fractions * np.log2(fractions)).sum()) / 8


def draw(density: float | None) -> Stored:
    """Draw a patch of one matrix; as whole rows if there is no density."""
    random = np.random.default_rng(0)
    base = random.normal(scale=0.02, size=SIDE * SIDE).astype(WEIGHT_DTYPES["bfloat16"])
    if density is None:
        rows = np.sort(random.choice(SIDE, round(0.01 * SIDE), replace=False))
        indices = (rows[:, None] * SIDE + np.arange(SIDE)).reshape(-1)
    else:
        indices = np.sort(random.choice(base.size, round(density * base.size), replace=False))
    values = random.normal(scale=0.001, size=indices.size).astype(np.float32)
    block = Block.dense(NAME, (SIDE, SIDE))
    record = TensorRecord(shape=(SIDE, SIDE), dtype="bfloat16", blocks=(block,))
    return Stored(record, indices.astype(np.int32), values, base[indices])


def speed(work: Callable[[], object], count: int, rounds: int) -> float:
    """Measure how many million weights a piece of work does in a second."""
    best = math.inf
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(times := max(1, 3_000_000 // count)):
            work()
        best = min(best, (time.process_time() - start) / times)
    return count / best / 1e6


def peak(work: Callable[[], tuple[Array, Array]]) -> float:
    """Measure the peak of allocations against the size of what is decoded."""
    tracemalloc.start()
    decoded = work()
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top / sum(array.nbytes for array in decoded)


def print_synthetic(rounds: int) -> None:
    """Print the figures of the drawn patches."""
    print(
        "| 4096×4096 bfloat16 | bytes per weight | at most | to the entropy bound | differing "
        "merged bits | decoding (M weights/s) | with all checks | memory to decoded |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, density in CASES.items():
        stored = draw(density)
        cells = [
            name,
            f"{stored.bytes_per_weight:.3f}",
            f"{LIMITS[name]}",
            f"{stored.bytes_per_weight / stored.bound():.3f}",
            f"{stored.check()}",
            f"{speed(stored.decode, stored.record.count, rounds):.0f}",
            f"{speed(stored.read, stored.record.count, rounds):.0f}",
            f"{peak(stored.read):.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def parts(patch: Path, base: Path) -> Iterator[Stored]:
    """Encode each parameter of a real patch."""
    read = partial(gather_entries, CheckpointReader(base))
    artifact = read_artifact(patch)
    for name, record in artifact.metadata.tensors.items():
        indices = artifact.indices[name]
        entries = read(name, record, indices)
        yield Stored(record, indices, artifact.values(name, entries).astype(np.float32), entries)


def print_real(patch: Path, base: Path) -> None:
    """Print what a real patch takes, in each form."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "compact")
        report = convert(patch, "compact", out, base)
        sizes = {"plain": file_bytes(patch), "compact": file_bytes(out)}
        codings = [
            stream.coding.value
            for record in read_metadata(out).tensors.values()
            for stream in record.streams.values()
        ]
    stored = list(parts(patch, base))
    bound = sum(part.bound() * part.record.count for part in stored)
    count = report.entries
    print(
        f"\n{count:,} weights in {len(stored)} tensors; the entropy bound is "
        f"{bound / count:.3f} bytes per weight, tensor by tensor; streams: "
        + ", ".join(f"{codings.count(coding)} {coding}" for coding in sorted(set(codings)))
    )
    print(f"{report.changed_values:,} values are other numbers with the same merged bits\n")
    print("| form | tensors (bytes) | per weight | with the config, per weight |")
    print("|---|---|---|---|")
    for name, (config, tensors) in sizes.items():
        print(
            f"| {name} | {tensors:,} | {tensors / count:.3f} | {(config + tensors) / count:.3f} |"
        )
    for name, size in OTHERS.items():
        print(f"| {name} | {round(size * count):,} | {size:.3f} | |")


def main() -> None:
    """Print the figures, of a real patch too if one is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--patch", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print_synthetic(arguments.rounds)
    if arguments.patch:
        print_real(arguments.patch, arguments.base)


if __name__ == "__main__":
    main()
