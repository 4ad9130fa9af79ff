"""From gradients to indices: objectives, ESI, exact top-k, controls, safety maps, patterns."""

from safeweights_peft.selection.controls import check_left, leave_out, select_lowest
from safeweights_peft.selection.esi import (
    Accumulated,
    Aggregation,
    accumulate_gradients,
    esi_scores,
    layer_groups,
    layer_of,
    random_scores,
    sigma,
)
from safeweights_peft.selection.guards import PROFILES, GuardProfile, read_profile
from safeweights_peft.selection.judged import Answered, JudgedObjective
from safeweights_peft.selection.objective import ReferenceObjective, SafetyObjective
from safeweights_peft.selection.pattern import Part, Place, count_parts, find_place, tabulate
from safeweights_peft.selection.published import PublishedObjective
from safeweights_peft.selection.safety_map import build_map
from safeweights_peft.selection.scorers import AnswerScorer, ClassifierScorer, GuardScorer
from safeweights_peft.selection.topk import Order, Selected, TopK, select

__all__ = [
    "PROFILES",
    "Accumulated",
    "Aggregation",
    "AnswerScorer",
    "Answered",
    "ClassifierScorer",
    "GuardProfile",
    "GuardScorer",
    "JudgedObjective",
    "Order",
    "Part",
    "Place",
    "PublishedObjective",
    "ReferenceObjective",
    "SafetyObjective",
    "Selected",
    "TopK",
    "accumulate_gradients",
    "build_map",
    "check_left",
    "count_parts",
    "esi_scores",
    "find_place",
    "layer_groups",
    "layer_of",
    "leave_out",
    "random_scores",
    "read_profile",
    "select",
    "select_lowest",
    "sigma",
    "tabulate",
]
