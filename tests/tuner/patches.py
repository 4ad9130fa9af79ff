"""Random patches of the tiny models, and their slow twins: the same change in a dense model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from safeweights_peft import create_adapter, read_adapter, write_adapter
from safeweights_peft.delta import Array
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import in_encoding
from safeweights_peft.patch.groups import Group, count_groups, spread_groups
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Encoding, Mode, TensorRecord
from safeweights_peft.tuner.layer import layers

INPUT_IDS = torch.arange(2 * 12).view(2, 12) * 7 % 250


def load_base(base: Path, **options: object) -> PreTrainedModel:
    """Load a tiny model for inference."""
    return AutoModelForCausalLM.from_pretrained(base, **options).eval()


def random_content(
    model: nn.Module,
    seed: int = 0,
    density: float = 0.05,
    names: list[str] | None = None,
    group: Group | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Choose entries (or rows, or columns) of all parameters (or some), and values for them."""
    random = np.random.default_rng(seed)
    indices, values = {}, {}
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            if group is not None and parameter.dim() < 2:
                continue
            total = parameter.numel() if group is None else count_groups(parameter.shape, group)[0]
            count = max(1, round(total * density))
            chosen = np.sort(random.choice(total, count, replace=False))
            if group is not None:
                chosen = spread_groups(chosen, group, parameter.shape)
            indices[name] = chosen
            values[name] = (0.1 * random.standard_normal(chosen.size)).astype(np.float32)
    return indices, values


def patch_model(
    model: PreTrainedModel | PeftModel,
    base: Path,
    adapter: str = "default",
    seed: int = 0,
    names: list[str] | None = None,
    values_dtype: str = "float32",
    scale: float = 1.0,
    group: Group | None = None,
) -> PeftModel:
    """Give a model an adapter with random content."""
    plain = load_base(base)
    indices, values = random_content(plain, seed, names=names, group=group)
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path=str(base),
        values_dtype=values_dtype,
        scale=scale,
        tensors=describe(plain, indices, base),
    )
    return create_adapter(model, metadata, indices, adapter, values)


def save_patch(base: Path, out: Path, **options: object) -> Path:
    """Save a random patch of a base."""
    patch_model(load_base(base), base, **options).save_pretrained(out)
    return out


def compact(base: Path, patch: Path, out: Path) -> Path:
    """Save a patch once more, in the compact encoding."""
    model, adapter = load_base(base), read_adapter(patch)

    def entries(name: str, record: TensorRecord, indices: Array) -> Array:
        return to_numpy(model.get_parameter(name)).reshape(-1)[indices]

    metadata = in_encoding(adapter.metadata, Encoding.COMPACT)
    write_adapter(out, replace(adapter, metadata=metadata), base=entries)
    return out


def twin(base: Path, *patches: Path, scale: float = 1.0, dtype: torch.dtype | None = None):
    """Load a base and add patches in the slow, obvious way: summed in float32, rounded once."""
    model = load_base(base) if dtype is None else load_base(base).to(dtype)
    sums: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for patch in patches:
        adapter = read_adapter(patch)
        factor = np.float32(scale * adapter.metadata.scale)
        for name, delta in adapter.deltas.items():
            total = sums.setdefault(name, parameters[name].detach().float().flatten())
            change = torch.from_numpy(factor * delta.values.astype(np.float32))
            total[torch.from_numpy(delta.indices.astype(np.int64))] += change
    with torch.no_grad():
        for name, total in sums.items():
            parameters[name].copy_(total.view_as(parameters[name]))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Run a model on fixed input."""
    return model(input_ids=INPUT_IDS).logits


def values_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """List an adapter's live values by parameter name."""
    return {layer.name: layer[adapter] for layer in layers(model, adapter)}


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    """Tell whether two plain models hold the same bits."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def edit_config(patch: Path, **changes: object) -> None:
    """Change keys of a saved patch's config."""
    path = patch / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


def load_by_peft(base: Path, patch: Path) -> nn.Module:
    """Route 1."""
    return PeftModel.from_pretrained(load_base(base), patch)


def load_by_auto_peft(base: Path, patch: Path) -> nn.Module:
    """Route 2: the base is found in the patch's config."""
    edit_config(patch, base_model_name_or_path=str(base))
    return AutoPeftModelForCausalLM.from_pretrained(patch)


def load_by_transformers(base: Path, patch: Path) -> nn.Module:
    """Route 3."""
    model = load_base(base)
    model.load_adapter(patch)
    return model


def load_by_auto_model(base: Path, patch: Path) -> nn.Module:
    """Route 4: the base is found in the patch's config."""
    edit_config(patch, base_model_name_or_path=str(base))
    return AutoModelForCausalLM.from_pretrained(patch).eval()


ROUTES = [load_by_peft, load_by_auto_peft, load_by_transformers, load_by_auto_model]
