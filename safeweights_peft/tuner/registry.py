"""Make PEFT know the method: the one file that writes to PEFT's tables.

PEFT has no plug-in interface, and ``register_peft_method`` takes only names of its own enumeration.
So the method's name is a one-member enumeration of its own, put where that function would put it.
PEFT and transformers read files as they come, and transformers puts whatever a file holds into the
model, the base's own weights too; so the method's files are checked where all routes read a config.
``tests/tuner/test_contract.py`` pins every name of PEFT that this room relies on.
"""

import functools
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfigMixin
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from safeweights_peft.errors import FormatError, UnsupportedFeatureError
from safeweights_peft.patch.io import CONFIG_FILE, TENSORS_FILE, inspect
from safeweights_peft.tuner.config import SafeWeightsConfig, SafeWeightsPeftType
from safeweights_peft.tuner.model import SafeWeightsModel


def register() -> None:
    """Register the method with PEFT; once is enough, more does no harm."""
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
    _check_files_with_config()


def _check_files_with_config() -> None:
    """Have PEFT check an adapter's config and header whenever it reads the config from a place."""
    plain = PeftConfigMixin.from_pretrained.__func__
    if getattr(plain, "checks_safeweights", False):
        return

    @functools.wraps(plain)
    def from_pretrained(
        cls: type[PeftConfigMixin],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfigMixin:
        config = plain(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SafeWeightsConfig):
            options = cls._split_kwargs(kwargs)[0]
            inspect(_find_files(pretrained_model_name_or_path, subfolder, options))
        return config

    vars(from_pretrained)["checks_safeweights"] = True
    PeftConfigMixin.from_pretrained = classmethod(from_pretrained)


def _find_files(
    source: str | os.PathLike[str], subfolder: str | None, options: dict[str, Any]
) -> Path:
    """Find an adapter's directory; of a Hub id, with the tensors that will be needed next."""
    folder = Path(source, subfolder or "")
    if (folder / CONFIG_FILE).is_file():
        return folder
    try:
        found = hf_hub_download(str(source), TENSORS_FILE, subfolder=subfolder, **options)
    except EntryNotFoundError as reason:
        raise FormatError(
            f"{source}: expected {TENSORS_FILE}, found none; ask the author for {TENSORS_FILE}"
        ) from reason
    return Path(found).parent
