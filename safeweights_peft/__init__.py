"""Safety patches for language models: find, train, protect and share the weights that matter.

Importing this package is enough for PEFT and transformers to load safety patches, whether it comes
before them or after. It is light: each public name is imported when it is first used (PEP 562), and
PEFT is told of the method when PEFT itself is imported.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from safeweights_peft.delta import SparseDelta as SparseDelta
    from safeweights_peft.errors import AlreadyMergedError as AlreadyMergedError
    from safeweights_peft.errors import BaseMismatchError as BaseMismatchError
    from safeweights_peft.errors import CheckpointError as CheckpointError
    from safeweights_peft.errors import CorruptAdapterError as CorruptAdapterError
    from safeweights_peft.errors import DataError as DataError
    from safeweights_peft.errors import EvaluationError as EvaluationError
    from safeweights_peft.errors import FormatError as FormatError
    from safeweights_peft.errors import HubError as HubError
    from safeweights_peft.errors import MergeError as MergeError
    from safeweights_peft.errors import ModelError as ModelError
    from safeweights_peft.errors import ReportError as ReportError
    from safeweights_peft.errors import SafeWeightsError as SafeWeightsError
    from safeweights_peft.errors import SafeWeightsWarning as SafeWeightsWarning
    from safeweights_peft.errors import SelectionError as SelectionError
    from safeweights_peft.errors import SignatureError as SignatureError
    from safeweights_peft.errors import TrainingError as TrainingError
    from safeweights_peft.errors import UnsupportedFeatureError as UnsupportedFeatureError
    from safeweights_peft.errors import UnsupportedVersionError as UnsupportedVersionError
    from safeweights_peft.format import Adapter as Adapter
    from safeweights_peft.format import SafetyMap as SafetyMap
    from safeweights_peft.format import inspect as inspect
    from safeweights_peft.format import read_adapter as read_adapter
    from safeweights_peft.format import read_map as read_map
    from safeweights_peft.format import validate as validate
    from safeweights_peft.format import write_adapter as write_adapter
    from safeweights_peft.format import write_map as write_map
    from safeweights_peft.hub import find_on_hub as find_on_hub
    from safeweights_peft.hub import pull_from_hub as pull_from_hub
    from safeweights_peft.hub import push_to_hub as push_to_hub
    from safeweights_peft.merge import convert as convert
    from safeweights_peft.merge import merge as merge
    from safeweights_peft.merge import merge_in_place as merge_in_place
    from safeweights_peft.merge import protect as protect
    from safeweights_peft.merge import unmerge as unmerge
    from safeweights_peft.merge import verify as verify
    from safeweights_peft.pipeline import load_model as load_model
    from safeweights_peft.signing import sign as sign
    from safeweights_peft.signing import verify_signature as verify_signature
    from safeweights_peft.training import SafetyPreservingCallback as SafetyPreservingCallback
    from safeweights_peft.training import preserve as preserve
    from safeweights_peft.tuner import SafeWeightsConfig as SafeWeightsConfig
    from safeweights_peft.tuner import create_adapter as create_adapter
    from safeweights_peft.tuner import round_values as round_values
    from safeweights_peft.tuner import set_forward_mode as set_forward_mode

_ROOMS = {
    "delta": ["SparseDelta"],
    "errors": [
        "AlreadyMergedError",
        "BaseMismatchError",
        "CheckpointError",
        "CorruptAdapterError",
        "DataError",
        "EvaluationError",
        "FormatError",
        "HubError",
        "MergeError",
        "ModelError",
        "ReportError",
        "SafeWeightsError",
        "SafeWeightsWarning",
        "SelectionError",
        "SignatureError",
        "TrainingError",
        "UnsupportedFeatureError",
        "UnsupportedVersionError",
    ],
    "format": [
        "Adapter",
        "SafetyMap",
        "inspect",
        "read_adapter",
        "read_map",
        "validate",
        "write_adapter",
        "write_map",
    ],
    "hub": ["find_on_hub", "pull_from_hub", "push_to_hub"],
    "merge": ["convert", "merge", "merge_in_place", "protect", "unmerge", "verify"],
    "pipeline": ["load_model"],
    "signing": ["sign", "verify_signature"],
    "training": ["SafetyPreservingCallback", "preserve"],
    "tuner": ["SafeWeightsConfig", "create_adapter", "round_values", "set_forward_mode"],
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom asked for

        return version("safeweights-peft")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """Keeps ``safeweights_peft.merge`` the function, though there is a module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


@when_imported("peft")
def _register(_: ModuleType) -> None:
    from safeweights_peft.tuner.registry import register

    register()
