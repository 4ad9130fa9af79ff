"""Merge a patch into its base on disk, and merge and unmerge it in memory, bit for bit.

    safeweights enhance demo/base --out demo/small --movement-steps 2 --steps 2 --limit 2
    python examples/merge.py demo/base demo/small/patch demo/merged

The first command makes a small patch to try with; `make demo` leaves one in demo/run/patch.
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safeweights_peft.merging.merge import merge, plan
from safeweights_peft.merging.verify import verify


def main(base: str, patch: str, out: str) -> None:
    """Merge on disk and in memory, and check both results."""
    # On disk: shards are copied and patched; neither torch nor transformers is needed.
    needs = plan(base, patch, out)
    print(f"writes {needs['write_bytes']:,} bytes; {needs['free_bytes']:,} are free")
    report = merge(base, patch, out, overwrite=True)
    print(f"changed {report.entries:,} entries of {report.tensors} tensors")
    checked = verify(patch, base, out)
    print(f"it is the base with this patch, and nothing else: {checked.verdict}")

    # In memory: PEFT merges and unmerges.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), patch)
    model.merge_adapter()
    model.unmerge_adapter()
    restored = same_weights(model.unload(), AutoModelForCausalLM.from_pretrained(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), patch)
    merged = same_weights(model.merge_and_unload(), AutoModelForCausalLM.from_pretrained(out))
    print(f"merged in memory as on disk: {merged}; unmerged as the base: {restored}")


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    """Return whether all parameters of two models hold the same bits."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} BASE PATCH OUT")
    main(*sys.argv[1:])
