"""What training a rank-1 LoRA by SET's loss does to weights, by which they are scored.

Source: arXiv 2110.07560 (LT-SFT) keeps the entries that moved most, and trains them again; there
all weights are trained, which takes their memory four times and tells less of few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.data import Example
from safeweights_peft.progress import Progress
from safeweights_peft.settings import PreserveSettings, TrainSettings
from safeweights_peft.training.finetune import add_lora
from safeweights_peft.training.refuse import train_steps

ADAPTER = "default"  # PEFT's own name for the only one


@contextmanager
def measure_movement(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    settings: TrainSettings,
    work_dir: Path,
    on_step: Callable[..., None] = lambda step, **losses: None,
    progress: Progress | None = None,
) -> Iterator[Mapping[str, Tensor]]:
    """Train a LoRA, yield how far it moves weights, and leave the model as it was.

    Weights beside which no LoRA stands are not there. An interrupted training resumes.
    """
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    mode, caches = model.training, getattr(model.config, "use_cache", None)  # which Trainer changes
    wrapped = add_lora(model, PreserveSettings(rank=1, seed=settings.seed))
    try:
        train_steps(
            *(wrapped, tokenizer, harmful, benign, settings, work_dir, on_step), progress=progress
        )
        yield _Changes(model)
    finally:
        wrapped.unload()
        model.train(mode)
        model.config.use_cache = caches
        for parameter, is_required in required.items():
            parameter.requires_grad_(is_required)


class _Changes(Mapping[str, Tensor]):
    """The change of each weight, computed when it is read: all together are as large as a model."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            f"{name}.weight": layer
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name].get_delta_weight(ADAPTER).detach().float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)
