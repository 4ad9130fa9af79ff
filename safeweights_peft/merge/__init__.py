"""What needs both an adapter and a checkpoint, straight from disk to disk: numpy, no transformers.

``fit`` finds an adapter's entries in a checkpoint, ``entries`` tells what they are once merged,
``merging`` adds a patch, ``protecting`` puts a base's entries back into a tuned model,
``differing`` makes a patch of two checkpoints, ``exporting`` one for other programs, ``verifying``
checks.
Merging inside a loaded model is PEFT's: see ``tuner``.
"""

from safeweights_peft.merge.differing import (
    Change,
    Kept,
    changed_keys,
    check_exact,
    check_patch,
    find_change,
    keep,
)
from safeweights_peft.merge.entries import merged_entries
from safeweights_peft.merge.exporting import export_vllm_patch
from safeweights_peft.merge.fit import base_state, copies, gather_entries
from safeweights_peft.merge.merging import MergeReport, merge, plan
from safeweights_peft.merge.protecting import ProtectReport, protect, put_back
from safeweights_peft.merge.verifying import Check, VerifyReport, verify

__all__ = [
    "Change",
    "Check",
    "Kept",
    "MergeReport",
    "ProtectReport",
    "VerifyReport",
    "base_state",
    "changed_keys",
    "check_exact",
    "check_patch",
    "copies",
    "export_vllm_patch",
    "find_change",
    "gather_entries",
    "keep",
    "merge",
    "merged_entries",
    "plan",
    "protect",
    "put_back",
    "verify",
]
