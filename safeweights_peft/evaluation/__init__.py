"""What a model answers, how answers are judged, and what that amounts to."""

from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.judges import Judge, RefusalJudge, Verdict
from safeweights_peft.evaluation.metrics import (
    Rate,
    attack_success_rate,
    over_refusal_rate,
    wilson,
)
from safeweights_peft.evaluation.utility import Utility, measure_utility

__all__ = [
    "Judge",
    "Rate",
    "RefusalJudge",
    "Utility",
    "Verdict",
    "attack_success_rate",
    "generate_answers",
    "measure_utility",
    "over_refusal_rate",
    "wilson",
]
