"""Loads a base model with adapters on it or merged into it: what is evaluated is what is shipped.

A safety patch is merged as the model is loaded: its few merged entries, computed from the base's
files, go into the loaded weights in place. So there is no second copy of any weight, and the bits
are those of a merged checkpoint, whatever the weights are loaded in.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import FormatError, ModelError
from safeweights_peft.fetching import BaseModel, latest_commit, resolve_base
from safeweights_peft.files import read_json
from safeweights_peft.hub.pulling import fetch_adapter
from safeweights_peft.jobs.correction import CORRECTION
from safeweights_peft.merging.sums import merged_entries
from safeweights_peft.modeling.loading import load_model as load_base
from safeweights_peft.modeling.loading import pick_device
from safeweights_peft.modeling.tensors import to_torch
from safeweights_peft.patch.artifacts import AnyPatch
from safeweights_peft.patch.io import CONFIG_FILE, read_patch
from safeweights_peft.patch.metadata import PEFT_TYPE
from safeweights_peft.tuner.fit import find_parameter

PathLike = str | os.PathLike[str]


def load_model(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    merge: bool = True,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = "cpu",
) -> PreTrainedModel | PeftModel:
    """Load a base with safety patches, at the commit that they were made for.

    A warning says so if the base's main branch has moved on from there.

    Several patches add up: where they share an entry, their values are added in the order given,
    in float32, and the sum is rounded once.

    Args:
        base: directory or Hub id; what the first adapter names if None. A base by the name that an
            adapter records is taken at the commit recorded there.
        adapters: directory or Hub id of a safety patch, perhaps ``@REVISION``, or several.
        merge: whether to merge the patches while loading; if not, they are PEFT adapters, all
            active, that can be switched off and unmerged.
        dtype: what to load the weights in; "auto" is the checkpoint's own. Merged entries are
            rounded to the checkpoint's own dtype first, as in a merged checkpoint.
        device: where the model goes; None for an accelerator where there is one.

    Returns:
        The model, in evaluation mode; merged, or wrapped by PEFT.

    Raises:
        BaseMismatchError: a patch was made for another base.
        ModelError: there is no adapter, none names its base, or the base can't be loaded.
    """
    given = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if not given:
        raise ModelError("adapters: expected at least one, found none; give a safety patch")
    folders = [_find_adapter(each) for each in given]
    found, place = find_base(base, folders), pick_device(device)
    _tell_moved(found)
    if merge:
        return load_patched(found, folders, dtype, place)
    model = load_base(found, dtype, place)
    names = ["default", *(f"patch_{number}" for number in range(2, len(folders) + 1))]
    wrapped = PeftModel.from_pretrained(model, str(folders[0]), names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        wrapped.load_adapter(str(folder), name)
    wrapped.base_model.set_adapter(names, inference_mode=True)
    return wrapped.eval()


def load_patched(
    base: BaseModel, adapters: Sequence[Path], dtype: torch.dtype | str, device: torch.device
) -> PreTrainedModel:
    """Load a base and merge adapters into it: safety patches first, then LoRAs by PEFT."""
    loras = [each for each in adapters if not is_patch(each)]
    patches = [each for each in adapters if is_patch(each)]
    patches += [each / CORRECTION for each in loras if (each / CORRECTION).is_dir()]
    read = [read_patch(each) for each in patches]  # a broken one is told before a base is loaded
    # A LoRA is merged in the checkpoint's dtype, as it would be for a checkpoint.
    model = load_base(base, "auto" if loras else dtype, device)
    if read:
        _put_merged(model, base, read)
    for each in loras:
        model = PeftModel.from_pretrained(model, str(each)).merge_and_unload()
    return model if dtype == "auto" else model.to(dtype)


@torch.no_grad()
def _put_merged(model: PreTrainedModel, base: BaseModel, patches: Sequence[AnyPatch]) -> None:
    """Write merged entries over the base's own, in the loaded weights."""
    records = {name: each for patch in patches for name, each in patch.metadata.tensors.items()}
    for name, (indices, entries) in merged_entries(CheckpointReader(base.path), patches).items():
        parameter = find_parameter(model, name, records[name])
        flat = to_torch(indices).long().to(parameter.device)
        places = torch.unravel_index(flat, parameter.shape)  # whatever the strides in memory
        parameter[places] = to_torch(entries).to(parameter.device, parameter.dtype)


def is_patch(adapter: Path) -> bool:
    """Tell whether an adapter is a safety patch or map, and not a LoRA or the like."""
    config = adapter / CONFIG_FILE
    method = read_json(config, FormatError).get("peft_type")
    if not isinstance(method, str):
        raise FormatError(
            f"{config}: peft_type: expected a method of PEFT, such as {PEFT_TYPE}, found "
            f"{str(method)[:80]}; give the directory of an adapter"
        )
    return method == PEFT_TYPE


def _find_adapter(adapter: PathLike) -> Path:
    path = Path(adapter)
    return path if path.is_dir() else fetch_adapter(str(adapter))


def _tell_moved(base: BaseModel) -> None:
    """Warn that a base has moved on, though the commit that is wanted is still there."""
    latest = latest_commit(base.name) if base.revision else None
    if latest not in (None, base.revision):
        warnings.warn(
            f"{base.name}: expected commit {base.revision}, which the patch was made for, at the "
            f"tip of main, found {latest}; the former is loaded",
            stacklevel=3,
        )


def find_base(base: PathLike | None, adapters: Sequence[Path]) -> BaseModel:
    """Find the base of adapters; by the name that one records, at the commit recorded there."""
    configs = [read_json(each / CONFIG_FILE, FormatError) for each in adapters]
    name = configs[0].get("base_model_name_or_path") if base is None else str(base)
    if not isinstance(name, str):
        raise ModelError(
            f"{adapters[0]}: expected the name of its base in {CONFIG_FILE}, found none; give base"
        )
    named = [each for each in configs if each.get("base_model_name_or_path") == name]
    revision = named[0].get("revision") if named else None
    if not isinstance(revision, str | None):
        raise FormatError(
            f"{adapters[0]}: {CONFIG_FILE}: revision: expected a commit or null, found "
            f"{str(revision)[:80]}; do not use this adapter"
        )
    return resolve_base(name, revision)
