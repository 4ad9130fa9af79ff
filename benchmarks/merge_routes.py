"""Merging one patch of a real kind of model by every route: time, memory, and whether bits agree.

    python benchmarks/merge_routes.py [--model DIR --patch DIR] [--rounds 5]

Against each other: PEFT (load the base, load the patch, `merge_and_unload`, `save_pretrained`) and
the merges from shards to shards. Against `cat` of both checkpoints: `diff` of the base and the
merged one. Each run is a process of its own, from its start to its end; the ways take turns, files
are warm in the system's cache, one thread each for torch. Times are medians, and ratios the medians
of each round's. `diff` asks transformers for the model's parameters, so there are rows for it
without the start of Python and the import of transformers, and for these alone.

Then the merged tensors of all routes are compared bit by bit, also with those of a plain loop over
the entries and of a model that is merged while it is loaded; and every file after an unmerge with
the base's. Without ``--model``, a bfloat16 Llama of 0.5 GB and a patch of 1 % are built.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from load_time import build_patch
from merge import command, measure
from merge_kills import content
from transformers import LlamaConfig, LlamaForCausalLM

from safeweights_peft import load_model, read_adapter
from safeweights_peft.checkpoint.reader import CheckpointReader

PEFT = """
import sys
from pathlib import Path
import safeweights_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
base, patch, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), patch)
model.merge_and_unload().save_pretrained(out)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""
IMPORTS = """
import sys
from pathlib import Path
import safeweights_peft.jobs.diff
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""

Ways = dict[str, Callable[[], tuple[float, float]]]


def build_base(path: Path) -> None:
    """Save a random Llama of 0.52 GB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def diff_inside(arguments: list[str]) -> tuple[float, float]:
    """Run a diff; give the time of the job itself, after all imports."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["seconds"], np.nan


def find_ways(folder: Path, base: Path, patch: Path) -> Ways:
    """List what is measured, in the order in which it is run."""
    tuned, here, out = folder / "merge", folder / "here", folder / "diff"
    diff = command("diff", base, tuned, "--out", out, "--overwrite", "--json")
    cat = 'cat "$0"/*.safetensors "$1"/*.safetensors > /dev/null'
    peft = [sys.executable, "-c", PEFT, str(base), str(patch), str(folder / "peft")]
    return {
        "cp -r": partial(measure, ["cp", "-r", str(base), str(folder / "cp")]),
        "PEFT": partial(measure, peft),
        "merge": partial(measure, command("merge", base, patch, "--out", tuned)),
        "merge --in-place": partial(measure, command("merge", here, patch, "--in-place")),
        "unmerge": partial(measure, command("unmerge", here)),
        "cat of base and merged": partial(measure, ["sh", "-c", cat, str(base), str(tuned)]),
        "diff of them": partial(measure, diff),
        "diff, without imports": partial(diff_inside, diff),
        "these imports": partial(measure, [sys.executable, "-c", IMPORTS]),
    }


def compare_times(folder: Path, ways: Ways, rounds: int) -> None:
    """Measure all ways in turn, and print a table."""
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first round warms the system's cache
        for name in ("cp", "peft", "merge", "diff"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for way, run in ways.items():
            measured = run()
            if number:
                results[way].append(measured)
    others = [np.array(results[way])[:, 0] for way in ("cp -r", "PEFT", "cat of base and merged")]
    print("\n| | seconds | against cp -r | against PEFT | against cat | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for way, measurements in results.items():
        seconds, memory = np.array(measurements).T
        ratios = " | ".join(f"{np.median(seconds / other):.3g}" for other in others)
        peak = "" if np.isnan(memory).any() else f"{np.median(memory) / 1e6:.0f}"
        print(f"| {way} | {np.median(seconds):.2f} | {ratios} | {peak} |")


def plain_loop(base: Path, patch: Path) -> dict[str, np.ndarray]:
    """Merge entry by entry, as the format's rule reads."""
    reader, adapter = CheckpointReader(base), read_adapter(patch)
    tensors = {key: reader.read(key) for key in reader.keys()}
    scale = np.float32(adapter.metadata.scale)
    for name, delta in adapter.deltas.items():
        (block,) = adapter.metadata.tensors[name].blocks
        flat = tensors[block.key].reshape(-1)
        for index, value in zip(delta.indices.tolist(), delta.values, strict=True):
            flat[index] = np.float32(flat[index]) + scale * np.float32(value)
    return tensors


def differing(tensors: dict[str, np.ndarray], checkpoint: Path) -> int:
    """Count the tensors of a checkpoint that are not these, bit by bit."""
    reader = CheckpointReader(checkpoint)
    assert set(reader.keys()) == tensors.keys()
    return sum(reader.read(key).tobytes() != tensor.tobytes() for key, tensor in tensors.items())


def compare_bits(folder: Path, base: Path, patch: Path, ways: Ways) -> None:
    """Compare what all routes give with what the plain loop gives."""
    load_model(base, patch).save_pretrained(folder / "loaded")
    measure(command("merge", base, folder / "diff", "--out", folder / "again"))
    ways["merge --in-place"]()
    tensors = plain_loop(base, patch)
    routes = {
        "PEFT": "peft",
        "merge": "merge",
        "merge --in-place": "here",
        "merged while loaded": "loaded",
        "diff, merged": "again",
    }
    print(f"\n| route | of {len(tensors)} tensors, other than by a plain loop |\n|---|---|")
    for route, name in routes.items():
        print(f"| {route} | {differing(tensors, folder / name)} |")
    ways["unmerge"]()
    same = content(folder / "here") == content(base)
    print(f"\nAfter an unmerge, every file is the base's: {'yes' if same else 'NO'}")


def main() -> None:
    """Build what is missing, measure and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model's directory")
    parser.add_argument("--patch", type=Path, help="a safety patch for it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary directory goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        base, patch = options.model or folder / "base", options.patch or folder / "patch"
        if options.model is None:
            build_base(base)
            build_patch(base, patch)
        shutil.copytree(base, folder / "here")
        entries = sum(delta.count for delta in read_adapter(patch).deltas.values())
        print(f"{CheckpointReader(base).size_bytes / 1e9:.2f} GB, {entries:,} entries patched")
        ways = find_ways(folder, base, patch)
        compare_times(folder, ways, options.rounds)
        compare_bits(folder, base, patch, ways)


if __name__ == "__main__":
    main()
