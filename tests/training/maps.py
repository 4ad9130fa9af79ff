"""Random safety maps of the tiny models, and whether a training has kept their entries."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from safeweights_peft import Adapter, SafetyMap
from safeweights_peft.fetching import BaseModel
from safeweights_peft.selection.scores import build_map
from safeweights_peft.selection.topk import Selected

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
BATCHES = torch.randint(250, (20, 2, 12), generator=torch.Generator().manual_seed(1))


def load(base: Path, **options: Any) -> PreTrainedModel:
    """Load a tiny model as training does."""
    return AutoModelForCausalLM.from_pretrained(base, **options)


def make_map(base: Path, names: list[str] | None = None, seed: int = 0) -> SafetyMap:
    """Select a tenth of all parameters, or of some, at random."""
    random, model = np.random.default_rng(seed), load(base)
    selected = {}
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            indices = random.choice(parameter.numel(), -(-parameter.numel() // 10), replace=False)
            scores = np.ones(len(indices), np.float32)
            selected[name] = Selected(np.sort(indices).astype(np.int32), scores)
    return build_map(model, BaseModel(str(base), base, None), selected, {"method": "random"})


def entries(model: nn.Module, artifact: SafetyMap | Adapter) -> dict[str, Tensor]:
    """Copy a model's entries at the indices of a map or a patch."""
    return {
        name: model.get_parameter(name).detach().flatten()[torch.from_numpy(indices)]
        for name, indices in artifact.indices.items()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return whether tensors hold the same bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))
        for name in left
    )


def kept(model: nn.Module, base: Path, safety_map: SafetyMap) -> bool:
    """Return whether a map's entries are still the base's."""
    return same(entries(model, safety_map), entries(load(base), safety_map))


def moved(model: nn.Module, base: Path) -> bool:
    """Return whether every parameter has moved somewhere."""
    before = load(base)
    return not any(torch.equal(e, before.get_parameter(n)) for n, e in model.named_parameters())


def train(model: nn.Module, steps: int = 5) -> None:
    """Train all parameters in a plain loop."""
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for rows in BATCHES[:steps]:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_sft_trainer(
    model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **options: Any
) -> Any:
    """Make TRL's trainer for three steps."""
    from trl import SFTConfig, SFTTrainer  # slow to import

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=None,  # a deprecated name, which TRL sets
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"text": ["Clean up the barn", "Water the plants"] * 8})
    return SFTTrainer(
        model=model, args=arguments, train_dataset=rows, callbacks=callbacks, **options
    )


def hooks(model: nn.Module) -> int:
    """Count the hooks on optimizers, gradients and modules."""
    on_gradients = [parameter._post_accumulate_grad_hooks or {} for parameter in model.parameters()]
    on_modules = [e for m in model.modules() for e in (m._forward_hooks, m._forward_pre_hooks)]
    counts = [len(group) for group in (*on_gradients, *on_modules)]
    return len(_global_optimizer_post_hooks) + len(_global_optimizer_pre_hooks) + sum(counts)
