"""Load a base with adapters merged into it or around it: what is evaluated is what is shipped."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from safeweights_peft.chat import list_settings
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import FormatError, ModelError
from safeweights_peft.evaluation.utility import Patched
from safeweights_peft.fetching import BaseModel, find_base, latest_commit
from safeweights_peft.files import PathLike, read_json
from safeweights_peft.freeze import FrozenEntries, make_switch
from safeweights_peft.hub.pull import fetch_adapter
from safeweights_peft.jobs.correction import CORRECTION
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.sums import merged_entries
from safeweights_peft.modeling.loading import load_model as load_base
from safeweights_peft.modeling.loading import pick_device, pick_dtype
from safeweights_peft.modeling.tensors import to_torch
from safeweights_peft.patch.artifacts import AnyPatch, StoredPatch
from safeweights_peft.patch.io import CONFIG_FILE, read_metadata, read_patch
from safeweights_peft.patch.metadata import CHAT_SETTINGS, PEFT_TYPE, read_chat
from safeweights_peft.scales import split_scale
from safeweights_peft.tables import quote_text
from safeweights_peft.tuner.loading import find_parameter
from safeweights_peft.tuner.selfcheck import check_in_place

_SIZES = re.compile(r"mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)")


def load_model(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    merge: bool = True,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | None = "cpu",
) -> PreTrainedModel | PeftModel:
    """Load a base with safety patches, at the commit that they were made for.

    Several patches add up: where they share an entry, their values are added in the order given,
    in float32, and the sum is rounded once. A warning says so if the base's main branch has moved
    on from the recorded commit.

    Args:
        base: directory or Hub id; what the first adapter names if None. A base by the name that an
            adapter records is taken at the commit recorded there.
        adapters: directory or Hub id of a safety patch, perhaps ``@REVISION``, or several; each
            perhaps at a scale: ``PATCH@0.5`` halves its values.
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
        SettingsError: a scale is no number from -10 to 10.

    Example:
        >>> from safeweights_peft import load_model
        >>> model = load_model("demo/base", "demo/run/patch")
        >>> model.dtype, model.training
        (torch.bfloat16, False)
    """
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if not paths:
        raise ModelError("adapters: expected at least one, found none; give a safety patch")
    named, scales = zip(*(split_scale(os.fspath(path)) for path in paths), strict=True)
    folders = [Path(path) if Path(path).is_dir() else fetch_adapter(path) for path in named]
    source, place = find_base(base, folders), pick_device(device)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = pick_dtype(dtype, place)
    _warn_if_moved(source)
    if merge:
        return load_patched(source, folders, dtype, place, scales)
    model = load_base(source, dtype, place)
    names = ["default", *(f"patch_{number}" for number in range(2, len(folders) + 1))]
    wrapped = PeftModel.from_pretrained(model, str(folders[0]), names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        wrapped.load_adapter(str(folder), name)
    wrapped.base_model.set_adapter(names, inference_mode=True)
    for name, scale in zip(names, scales, strict=True):
        if scale != 1.0:
            wrapped.base_model.set_scale(name, scale)
    return wrapped.eval()


def load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load a LoRA into the model that it was trained on; refuse others in one line."""
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]  # torch names every tensor that doesn't fit
        if mismatch := _SIZES.search(str(error)):
            name, found, expected = mismatch.groups()
            reason = f"{name.removeprefix('base_model.model.')} of {found}, not {expected}"
        raise ModelError(
            f"{folder}: expected a LoRA for {model.name_or_path}, found one that PEFT can't load "
            f"into it ({reason}); give --base, the model that it was trained on, resized and saved "
            "if tokens were added for it"
        ) from error


def load_patched(
    base: BaseModel,
    adapters: Sequence[Path],
    dtype: torch.dtype | str,
    device: torch.device,
    scales: Sequence[float] = (),
) -> PreTrainedModel:
    """Load a base and merge adapters into it: safety patches first, then LoRAs by PEFT."""
    factors = dict(zip(adapters, scales, strict=False))
    loras = [path for path in adapters if not is_patch(path)]
    folders = [path for path in adapters if path not in loras]
    folders += [path / CORRECTION for path in loras if (path / CORRECTION).is_dir()]
    for path in loras:
        if factors.get(path, 1.0) != 1.0:
            raise ModelError(
                f"{path}: expected a safety patch, which can be scaled, found another adapter at "
                f"scale {factors[path]:g}; leave the scale out"
            )
    patches = [read_patch(path) for path in folders]
    # Checked before a model is loaded, which can take minutes.
    reader, own = CheckpointReader(base.path), [factors.get(path, 1.0) for path in folders]
    merged = MergedEntries(reader, patches, folders, own) if patches else None
    # A LoRA is merged in the checkpoint's dtype, as it would be for a checkpoint.
    model = load_base(base, "auto" if loras else dtype, device)
    if merged:
        merged.write(model)
    for path in loras:
        model = load_lora(model, path).merge_and_unload()
    if loras and isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            # Not model.to(dtype), which would round buffers too, such as rotary frequencies,
            # that loading leaves in float32.
            parameter.data = parameter.data.to(dtype)
    return model


class MergedEntries:
    """What patches make of a base's entries, to be written into the loaded base."""

    # The few merged entries are computed from the base's files, in the checkpoint's dtype. So the
    # bits are those of a merged checkpoint in whatever dtype the base is loaded, and no weight is
    # in memory twice.

    def __init__(
        self,
        reader: CheckpointReader,
        patches: Sequence[AnyPatch],
        names: Sequence[PathLike] = (),
        scales: Sequence[float] = (),
    ) -> None:
        """Merge, and check that the patches fit the base."""
        self._entries = merged_entries(reader, patches, names, scales)
        self._records = {
            name: record for patch in patches for name, record in patch.metadata.tensors.items()
        }

    def write(self, model: PreTrainedModel) -> None:
        """Write the merged entries over the base's."""
        for entries, merged in self._locate(model):
            entries.write(merged)

    def make_switch(self, model: PreTrainedModel) -> Patched:
        """Make a context in which a base holds the merged entries, and check that it sees them."""
        located = list(self._locate(model))
        check_in_place(model, [entries for entries, _ in located])
        return make_switch(model, located)

    def _locate(self, model: PreTrainedModel) -> Iterator[tuple[FrozenEntries, Tensor]]:
        for name, (indices, merged) in self._entries.items():
            parameter = find_parameter(model, name, self._records[name])
            yield FrozenEntries(name, parameter, to_torch(indices)), to_torch(merged).to(parameter)


def note_chat(job: Job, patch: StoredPatch) -> None:
    """Say where a patch was trained with another chat than it is asked by."""
    theirs, ours = read_chat(patch.metadata.selection), list_settings(job.compute)
    differing = [
        f"{key.replace('_', ' ')} {quote_text(theirs.get(key))} there, "
        f"{quote_text(ours.get(key))} here"
        for key in CHAT_SETTINGS
        if theirs.get(key) != ours.get(key)
    ]
    if theirs and differing:
        job.progress.note(f"The patch was trained with another chat: {'; '.join(differing)}")


def is_patch(adapter: Path) -> bool:
    """Tell whether an adapter is a safety patch or map, and not a LoRA or the like."""
    config = adapter / CONFIG_FILE
    if not config.is_file():
        read_metadata(adapter)  # says what is there instead, such as a run
    method = read_json(config, FormatError).get("peft_type")
    if not isinstance(method, str):
        raise FormatError(
            f"{config}: peft_type: expected a method of PEFT, such as {PEFT_TYPE}, found "
            f"{str(method)[:80]}; give the directory of an adapter"
        )
    return method == PEFT_TYPE


def _warn_if_moved(base: BaseModel) -> None:
    latest = latest_commit(base.name) if base.revision else None
    if latest not in (None, base.revision):
        warnings.warn(
            f"{base.name}: expected commit {base.revision}, which the patch was made for, at the "
            f"tip of main, found {latest}; the former is loaded",
            stacklevel=3,
        )
