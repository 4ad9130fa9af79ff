"""The PEFT config of a safety patch: the content of ``adapter_config.json`` as a dataclass."""

import enum
import os
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType

from safeweights_peft.errors import UnsupportedFeatureError, UnsupportedVersionError
from safeweights_peft.fetching import download
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.io import ADAPTER_FILES, read_map
from safeweights_peft.patch.metadata import FORMAT_VERSION, AdapterMetadata
from safeweights_peft.patch.records import Mode


class SafeWeightsPeftType(str, enum.Enum):  # noqa: UP042 - PEFT prints "<class>.<name>", not StrEnum's
    """The method's name among PEFT's; equal to, and hashed like, the string in a config file."""

    SAFEWEIGHTS = "SAFEWEIGHTS"


@dataclass
class SafeWeightsConfig(PeftConfig):
    """Config of one adapter: the fields of ``patch.metadata.AdapterMetadata``, as PEFT has them.

    With ``map`` it is for ``get_peft_model``, which makes a new patch of the map's entries, all
    zeros, to be trained. Otherwise load it, or make one with :meth:`from_metadata`.

    Attributes:
        target_modules: Always None: ``tensors`` names the parameters.
        format_version: Version of the file format.
        format_minor: Which of the additions to that version the file may use.
        mode: "set" for a safety patch, "spa" for a safety map, which is loaded to train under it.
        scale: Finite factor on the values.
        values_dtype: Storage dtype of the values; in memory they are float32.
        transformers_version: The version whose parameter names are used.
        selection: How the entries were chosen; free JSON.
        tensors: One record per parameter, as plain JSON.
        map: Safety map to take the entries from, a directory or Hub id; given once, never stored.

    Example:
        >>> from peft import PeftConfig
        >>> import safeweights_peft  # tells PEFT of the method
        >>> config = PeftConfig.from_pretrained("demo/run/patch")
        >>> type(config).__name__, config.mode, config.scale
        ('SafeWeightsConfig', 'set', 1.0)
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained("demo/base")
        >>> model = get_peft_model(base, safeweights_peft.SafeWeightsConfig(map="demo/run/map"))
        >>> model.print_trainable_parameters()
        trainable params: 2,381 || all params: 26,189 || trainable%: 9.0916
    """

    target_modules: None = None
    format_version: int = FORMAT_VERSION
    format_minor: int = 0
    mode: str = "set"
    scale: float = 1.0
    values_dtype: str = "float32"
    transformers_version: str | None = None
    selection: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    map: InitVar[str | os.PathLike[str] | None] = None

    def __post_init__(self, map: str | os.PathLike[str] | None) -> None:
        """Set the method's name; refuse other versions and PEFT's usual way to target modules."""
        super().__post_init__()
        self.peft_type = SafeWeightsPeftType.SAFEWEIGHTS
        # False while a training saves states to resume from; no field, so never in a file.
        self.is_patch = True
        self.safety_map: SafetyMap | None = None  # of whose entries a patch is to be made
        if map is not None:
            self._take_map(map)
        if self.format_version != FORMAT_VERSION:
            raise UnsupportedVersionError(
                f"adapter_config.json: format_version: expected {FORMAT_VERSION}, found "
                f"{str(self.format_version)[:80]}; install a newer safeweights_peft"
            )
        if self.target_modules is not None:
            raise UnsupportedFeatureError(
                "target_modules: expected None, found "
                f"{str(self.target_modules)[:80]}; name parameters in create_adapter instead"
            )

    def _take_map(self, source: str | os.PathLike[str]) -> None:
        """Take over the entries of a safety map, and the base that it names."""
        here = Path(source).is_dir()
        folder = Path(source) if here else download(str(source), ADAPTER_FILES, "a safety map")
        self.safety_map = read_map(folder)
        known = {option.name for option in fields(self)}
        for key, value in replace(self.safety_map.metadata, mode=Mode.SET).to_config().items():
            if key in known:
                setattr(self, key, value)
        self.task_type, self.inference_mode = TaskType.CAUSAL_LM, False

    @classmethod
    def from_metadata(
        cls, metadata: AdapterMetadata, inference_mode: bool = False
    ) -> "SafeWeightsConfig":
        """Make the config that describes the same adapter.

        Args:
            metadata: The description.
            inference_mode: Whether the values are frozen.

        Returns:
            The config.
        """
        known = {option.name for option in fields(cls)}
        content = {key: value for key, value in metadata.to_config().items() if key in known}
        return cls(**{**content, "inference_mode": inference_mode})

    def to_metadata(self, source: str) -> AdapterMetadata:
        """Check the whole config as if it stood in a file.

        Args:
            source: What messages call it.

        Returns:
            The typed description.
        """
        content = {option.name: getattr(self, option.name) for option in fields(self)}
        return AdapterMetadata.from_config(content, source)

    @cached_property
    def parameters_by_module(self) -> dict[str, list[str]]:
        """The own names of the selected parameters, by the path of their module."""
        modules: dict[str, list[str]] = {}
        for name in self.tensors:
            module, _, own = name.rpartition(".")
            modules.setdefault(module, []).append(own)
        return modules
