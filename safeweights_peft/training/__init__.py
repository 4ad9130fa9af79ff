"""Training on `transformers.Trainer`.

Safety Enhancement Tuning (SET) trains the selected entries, and Safety Preserving Adaptation (SPA)
keeps them as they are while the others train.
"""

from safeweights_peft.training.enhance import EnhanceSettings, StepLoss, enhance
from safeweights_peft.training.finetune import (
    PreserveMethod,
    PreserveSettings,
    add_lora,
    fine_tune,
)
from safeweights_peft.training.preserve import (
    SafetyPreservingCallback,
    lora_correction,
    preserve,
)

__all__ = [
    "EnhanceSettings",
    "PreserveMethod",
    "PreserveSettings",
    "SafetyPreservingCallback",
    "StepLoss",
    "add_lora",
    "enhance",
    "fine_tune",
    "lora_correction",
    "preserve",
]
