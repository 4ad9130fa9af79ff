"""From gradients to indices: safety objectives, ESI, exact top-k, controls, safety maps."""

from safeweights_peft.selection.controls import check_left, select_lowest
from safeweights_peft.selection.esi import (
    accumulate_gradients,
    esi_scores,
    random_scores,
    sigma,
)
from safeweights_peft.selection.objective import ReferenceObjective, SafetyObjective
from safeweights_peft.selection.safety_map import build_map
from safeweights_peft.selection.topk import Order, Selected, TopK, select

__all__ = [
    "Order",
    "ReferenceObjective",
    "SafetyObjective",
    "Selected",
    "TopK",
    "accumulate_gradients",
    "build_map",
    "check_left",
    "esi_scores",
    "random_scores",
    "select",
    "select_lowest",
    "sigma",
]
