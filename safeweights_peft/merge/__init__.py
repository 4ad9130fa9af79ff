"""What needs both an adapter and a checkpoint, straight from disk to disk: numpy, no transformers.

``fit`` finds an adapter's entries in a checkpoint, ``patches`` and ``edits`` are what is merged,
``entries`` tells what they are once merged, ``merging`` writes them as a new checkpoint (``card``
is its card), ``in_place`` into the same one (``undo`` is its journal), ``planning`` foretells both,
``protecting`` puts a base's entries back into a tuned model, ``differing`` makes a patch of two
checkpoints, ``exporting`` one for other programs, ``converting`` writes one in another encoding,
``verifying`` checks adapters, bases and merged models (``comparing`` these). Merging inside a
loaded model is PEFT's: see ``tuner``.
"""

from safeweights_peft.merge.converting import ConvertReport, convert
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
from safeweights_peft.merge.fit import base_entries, base_state, copies, gather_entries
from safeweights_peft.merge.in_place import UnmergeReport, merge_in_place, unmerge
from safeweights_peft.merge.merging import MergeReport, merge
from safeweights_peft.merge.patches import MergedPatch, Overlap
from safeweights_peft.merge.planning import plan
from safeweights_peft.merge.protecting import ProtectReport, protect, put_back
from safeweights_peft.merge.verifying import Check, Verdict, VerifyReport, verify

__all__ = [
    "Change",
    "Check",
    "ConvertReport",
    "Kept",
    "MergeReport",
    "MergedPatch",
    "Overlap",
    "ProtectReport",
    "UnmergeReport",
    "Verdict",
    "VerifyReport",
    "base_entries",
    "base_state",
    "changed_keys",
    "check_exact",
    "check_patch",
    "convert",
    "copies",
    "export_vllm_patch",
    "find_change",
    "gather_entries",
    "keep",
    "merge",
    "merge_in_place",
    "merged_entries",
    "plan",
    "protect",
    "put_back",
    "unmerge",
    "verify",
]
