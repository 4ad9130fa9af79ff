"""Make PEFT know the method: the one file that writes to PEFT's tables.

PEFT has no plug-in interface, and ``register_peft_method`` takes only names of its own enumeration.
So the method's name is a one-member enumeration of its own, put where that function would put it.
``tests/tuner/test_contract.py`` pins every name of PEFT that this room relies on.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from safeweights_peft.errors import UnsupportedFeatureError
from safeweights_peft.tuner.config import SafeWeightsConfig, SafeWeightsPeftType
from safeweights_peft.tuner.model import SafeWeightsModel


def register() -> None:
    """Register the method with PEFT; once is enough, more does no harm.

    Raises:
        UnsupportedFeatureError: Another package, or PEFT itself, has taken the name.
    """
    name = SafeWeightsPeftType.SAFEWEIGHTS
    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(name, SafeWeightsConfig)
    if holder is not SafeWeightsConfig:
        raise UnsupportedFeatureError(
            f"{name.value}: expected a free name among PEFT's methods, found "
            f"{holder.__module__}.{holder.__qualname__}; remove that package or use another peft"
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = SafeWeightsConfig
    PEFT_TYPE_TO_TUNER_MAPPING[name] = SafeWeightsModel
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = SafeWeightsModel.prefix
