"""Training on `transformers.Trainer`: Safety Enhancement Tuning (SET)."""

from safeweights_peft.training.enhance import EnhanceSettings, StepLoss, enhance

__all__ = ["EnhanceSettings", "StepLoss", "enhance"]
