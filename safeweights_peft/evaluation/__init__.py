"""What a model answers, how answers are judged, and what that amounts to."""

from safeweights_peft.evaluation.draws import Mean, mean_over_draws, rate_over_draws
from safeweights_peft.evaluation.generate import end_token_ids, generate_answers
from safeweights_peft.evaluation.judges import Judge, RefusalJudge, Verdict
from safeweights_peft.evaluation.metrics import attack_success_rate, over_refusal_rate
from safeweights_peft.evaluation.perturb import Change, noise, perturbed, zeros
from safeweights_peft.evaluation.specificity import Harm, Specificity, judge_specificity
from safeweights_peft.evaluation.utility import Utility, measure_utility

__all__ = [
    "Change",
    "Harm",
    "Judge",
    "Mean",
    "RefusalJudge",
    "Specificity",
    "Utility",
    "Verdict",
    "attack_success_rate",
    "end_token_ids",
    "generate_answers",
    "judge_specificity",
    "mean_over_draws",
    "measure_utility",
    "noise",
    "over_refusal_rate",
    "perturbed",
    "rate_over_draws",
    "zeros",
]
