"""The PEFT method: nothing but PEFT, and everything that needs PEFT's internals."""

# Whole, and before any module here: the package's hook on this import needs them all.
import peft  # noqa: F401

from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.content import create_adapter, round_values
from safeweights_peft.tuner.layer import SafeWeightsLayer
from safeweights_peft.tuner.model import SafeWeightsModel, set_forward_mode
from safeweights_peft.tuner.parameter import ForwardMode
from safeweights_peft.tuner.registry import register

__all__ = [
    "ForwardMode",
    "SafeWeightsConfig",
    "SafeWeightsLayer",
    "SafeWeightsModel",
    "create_adapter",
    "register",
    "round_values",
    "set_forward_mode",
]
