"""The whole jobs, from names and settings to results on disk; no job prints anything."""

from safeweights_peft.pipeline.diffing import DiffReport, diff
from safeweights_peft.pipeline.enhancing import enhance_model, summarise
from safeweights_peft.pipeline.estimating import Estimate, estimate
from safeweights_peft.pipeline.evaluating import evaluate, figures
from safeweights_peft.pipeline.exporting import export_lora, export_patch, export_supertuning
from safeweights_peft.pipeline.patched import load_model, load_patched
from safeweights_peft.pipeline.preserving import preserve_model
from safeweights_peft.pipeline.probing import count_evaluations, probe
from safeweights_peft.pipeline.progress import Progress, Quiet
from safeweights_peft.pipeline.protecting import protect_lora, protect_tuned
from safeweights_peft.pipeline.reporting import report_map
from safeweights_peft.pipeline.reproducing import Recorded, find_recorded, reproduce
from safeweights_peft.pipeline.scoring import score
from safeweights_peft.pipeline.settings import (
    ComputeSettings,
    EvaluateSettings,
    Method,
    ProbeSettings,
    ScoreSettings,
    TrainSettings,
)
from safeweights_peft.pipeline.training import train

__all__ = [
    "ComputeSettings",
    "DiffReport",
    "Estimate",
    "EvaluateSettings",
    "Method",
    "ProbeSettings",
    "Progress",
    "Quiet",
    "Recorded",
    "ScoreSettings",
    "TrainSettings",
    "count_evaluations",
    "diff",
    "enhance_model",
    "estimate",
    "evaluate",
    "export_lora",
    "export_patch",
    "export_supertuning",
    "figures",
    "find_recorded",
    "load_model",
    "load_patched",
    "preserve_model",
    "probe",
    "protect_lora",
    "protect_tuned",
    "report_map",
    "reproduce",
    "score",
    "summarise",
    "train",
]
