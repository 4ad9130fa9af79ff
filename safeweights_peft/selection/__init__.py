"""From gradients to indices: safety objectives, ESI, exact top-k, safety maps, patterns."""

from safeweights_peft.selection.esi import accumulate_gradients, esi_scores, random_scores
from safeweights_peft.selection.objective import ReferenceObjective, SafetyObjective
from safeweights_peft.selection.pattern import Part, Place, count_parts, find_place, tabulate
from safeweights_peft.selection.safety_map import build_map
from safeweights_peft.selection.topk import Order, Selected, TopK, select

__all__ = [
    "Order",
    "Part",
    "Place",
    "ReferenceObjective",
    "SafetyObjective",
    "Selected",
    "TopK",
    "accumulate_gradients",
    "build_map",
    "count_parts",
    "esi_scores",
    "find_place",
    "random_scores",
    "select",
    "tabulate",
]
