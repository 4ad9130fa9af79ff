"""A config of ours that names modules, as PEFT's tests do, and the rows that it adds to them."""

import re
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from safeweights_peft.delta import SparseDelta
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord
from safeweights_peft.tuner.adapter import describe_deltas, fill
from safeweights_peft.tuner.config import SafeWeightsConfig
from safeweights_peft.tuner.model import SafeWeightsModel

EVERYTHING = "everything"  # as target_modules: every parameter, vectors too
SHAPE_OF_LORA = {"r", "lora_alpha", "lora_dropout", "bias"}  # of no meaning to us
LORA = {"target_modules", "target_parameters", "init_lora_weights", "task_type"} | SHAPE_OF_LORA


class PeerConfig(SafeWeightsConfig):
    """A config whose records are made for the model into which PEFT injects it.

    Our adapters name parameters and indices; PEFT's tests name modules before there is a model. No
    attribute added here is a field, so none is saved: what is loaded is a SafeWeightsConfig.
    """

    target_parameters = None  # PEFT would inject what stands here

    def __init__(
        self,
        target_modules: list[str] | str | None = None,
        target_parameters: list[str] | None = None,
        init_weights: bool = True,
        density: float = 0.5,
        **options: Any,
    ) -> None:
        """Keep what to select; ``init_weights`` gives zeros, as LoRA's does."""
        self.targets, self.density = target_modules, density
        self.parameters = target_parameters
        self.init_weights = options.pop("init_lora_weights", init_weights)
        super().__init__(
            **{key: value for key, value in options.items() if key not in SHAPE_OF_LORA}
        )

    def select(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Find the parameters that a test means, by name."""
        is_open = self.targets == "all-linear" or (self.targets is None and not self.parameters)
        if is_open and isinstance(model, PreTrainedModel):
            return eligible_parameters(model)
        return {
            name: parameter
            for name, parameter in model.named_parameters()
            if SafeWeightsModel.prefix not in name and self._is_meant(name, parameter)
        }

    def _is_meant(self, name: str, parameter: nn.Parameter) -> bool:
        if self.targets == EVERYTHING:
            return True
        if any(f".{name}".endswith(f".{target}") for target in self.parameters or ()):
            return True
        module = name.rpartition(".")[0]
        if isinstance(self.targets, str):
            is_meant = bool(re.fullmatch(self.targets, module))
        else:
            is_meant = any(f".{module}".endswith(f".{target}") for target in self.targets or ())
        return is_meant and parameter.ndim > 1

    def draw(self, model: nn.Module) -> dict[str, SparseDelta]:
        """Draw entries for a model, and describe them in this config as if they had been found."""
        deltas, records = {}, {}
        for name, parameter in self.select(model).items():
            shape, count = tuple(parameter.shape), parameter.numel()
            # The same entries for the same name, so that models made alike have adapters alike.
            random = np.random.default_rng(crc32(name.encode()))
            chosen = random.choice(count, max(1, round(count * self.density)), replace=False)
            values = 0.5 * torch.randn(len(chosen)) * (not self.init_weights)
            deltas[name] = SparseDelta(shape, np.sort(chosen).astype(np.int32), values.numpy())
            dtype = str(parameter.dtype).removeprefix("torch.")
            block = Block.dense(name, shape)
            records[name] = TensorRecord(shape=shape, dtype=dtype, blocks=(block,))
        metadata = describe_deltas(model, AdapterMetadata(mode=Mode.SET, tensors=records), deltas)
        described = SafeWeightsConfig.from_metadata(metadata)
        self.tensors = described.tensors
        vars(self).pop("parameters_by_module", None)  # of another model
        return deltas


def draw_when_injected() -> None:
    """Have PEFT's injection draw and fill an adapter whose config is a PeerConfig."""
    plain = SafeWeightsModel.inject_adapter

    def inject_adapter(
        self: SafeWeightsModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        # A config with records and in inference mode belongs to files that PEFT loads next.
        is_new = isinstance(config, PeerConfig) and not (config.tensors and config.inference_mode)
        deltas = config.draw(model) if is_new else {}
        plain(self, model, adapter_name, *args, **kwargs)
        if deltas and not kwargs.get("low_cpu_mem_usage"):  # then there is no room yet
            fill(model, adapter_name, deltas)

    SafeWeightsModel.inject_adapter = inject_adapter


def replace_rows(names: list[str], rows: list[Any]) -> list[Any]:
    """Put our rows in place of all methods' rows; other parameters stay."""
    if "config_cls" not in names:
        return rows
    if names == ["config_cls"]:
        return [PeerConfig]
    rows = [row.values if hasattr(row, "values") else tuple(row) for row in rows]
    ours = list(_translate(names, rows))
    if "test_name" in names and "model_id" in names:  # the last of a model's rows has most targets
        ours = list({row[names.index("model_id")]: row for row in ours}.values())
    if "model_id" in names:
        named = [name for name in names if name != "config_kwargs"]
        models = dict.fromkeys(row[names.index("model_id")] for row in ours)
        for model in models:
            cells = {"test_name": "Everything", "model_id": model, "config_cls": PeerConfig}
            kwargs = {"target_modules": EVERYTHING, "density": 0.05}
            ours.append((*(cells[name] for name in named), kwargs))
    elif "config_kwargs" in names:
        kwargs = {"task_type": "CAUSAL_LM", "target_modules": EVERYTHING, "density": 0.05}
        ours.append((PeerConfig, kwargs))
    return [pytest.param(*row) for row in ours]


def _translate(names: list[str], rows: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Take LoRA's rows, but for those with options that only LoRA has."""
    place = names.index("config_cls")
    for row in rows:
        options = [cell for cell in row if isinstance(cell, dict)]
        is_plain = all(
            option.keys() <= LORA and isinstance(option.get("init_lora_weights", True), bool)
            for option in options
        )
        if row[place] is LoraConfig and is_plain:
            yield (*row[:place], PeerConfig, *row[place + 1 :])
