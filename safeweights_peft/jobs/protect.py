"""The protecting job: what was tuned without protection gets its base's safety weights back.

A tuned checkpoint is given them on disk; a LoRA is given a correction, or is merged around them.
What that does is measured before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import draft_copy
from safeweights_peft.delta import Array
from safeweights_peft.errors import CheckpointError, ModelError
from safeweights_peft.fetching import BaseModel, download, resolve_base
from safeweights_peft.files import check_apart, check_target, publish, write_json
from safeweights_peft.jobs.correction import correct, write_corrected
from safeweights_peft.jobs.evaluate import Evaluator, evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import write_parameters
from safeweights_peft.jobs.progress import Progress, Quiet, advance_to
from safeweights_peft.jobs.provenance import made_with
from safeweights_peft.merging.protect import protect, put_back
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.loading import load_model, pick_device
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.settings import ComputeSettings, EvaluateSettings

RECORD_FILE = "protecting.json"
LORA_FILES = ["adapter_config.json", "adapter_model.safetensors"]


def protect_tuned(
    tuned: Path,
    base: str,
    map_dir: Path,
    out: Path,
    settings: EvaluateSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a tuned checkpoint with its base's safety weights put back; measures both if asked."""
    compute, progress = compute or ComputeSettings(), progress or Quiet()
    if settings:
        Evaluator(Job(base), settings)  # are the requests there?
    found = resolve_base(base, compute.revision)
    with progress.task("Copying the tuned model", 100) as advance:
        reach = advance_to(advance)
        report = protect(
            tuned,
            found.path,
            map_dir,
            out,
            overwrite=overwrite,
            progress=lambda done, total: reach(100 * done // max(total, 1)),
        )
    record: dict[str, Any] = {
        "kind": "protection",
        "tuned": str(tuned),
        **made_with(found, read_artifact(map_dir)),
        "map": str(map_dir),
        **asdict(report),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    models = (str(tuned), None), (str(out), None)
    return _finish(record, out, models, settings, compute, progress)


def protect_lora(
    lora: str,
    map_dir: Path,
    out: Path,
    base: str | None = None,
    settings: EvaluateSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    merged: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Keep a LoRA that was trained without protection from moving safety weights; no training.

    Written is a copy of the LoRA with a correction (see `pipeline.adapting`), or the base with the
    LoRA merged in, in float32 and rounded once, and its safety weights bit for bit as they were.
    """
    compute, progress = compute or ComputeSettings(), progress or Quiet()
    check_target(out, overwrite, CheckpointError)
    if settings:
        Evaluator(Job(base or lora), settings)  # are the requests there?
    artifact = read_artifact(map_dir)
    folder, base = _find_lora(lora, base)
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    inputs = {"the base": found.path, "the map": map_dir, "the LoRA": folder}
    check_apart(out, inputs, CheckpointError)
    model = load_model(found, torch.float32, device)
    layout = describe(model, [name for name, _ in model.named_parameters()], found.path)
    adapted = _load_lora(model, folder)
    values = correct(adapted, artifact)
    record = _describe(lora, found, map_dir, out, artifact, values)
    if merged:
        reader = CheckpointReader(found.path)
        with draft_copy(reader, out, overwrite=overwrite) as draft:
            write_parameters(draft, adapted.merge_and_unload(), layout)
            put_back(reader, draft, artifact)
    else:
        with publish(out, overwrite, CheckpointError) as draft_dir:
            write_corrected(draft_dir, adapted, found, artifact, values)
    models = (found.name, folder), (str(out), None) if merged else (found.name, out)
    return _finish(record, out, models, settings, compute, progress)


def _finish(
    record: dict[str, Any],
    out: Path,
    models: Sequence[tuple[str, Path | None]],
    settings: EvaluateSettings | None,
    compute: ComputeSettings,
    progress: Progress,
) -> dict[str, Any]:
    """Measure two models, each with its adapter, if asked, and writes the record."""
    if settings:
        for stage, (model, adapter) in zip(("before", "after"), models, strict=True):
            # The revision is the base's; a directory has none.
            where = replace(compute, revision=None) if Path(model).is_dir() else compute
            record[stage] = pick_figures(evaluate(Job(model, where, progress), adapter, settings))
        record["settings"] = asdict(settings) | asdict(compute)
    write_json(out / RECORD_FILE, record)
    return record


def _describe(
    lora: str,
    base: BaseModel,
    map_dir: Path,
    out: Path,
    artifact: Artifact,
    correction: Mapping[str, Array],
) -> dict[str, Any]:
    """Record what a LoRA was protected from doing: which entries it would move, and how far."""
    return {
        "kind": "protection",
        "lora": lora,
        **made_with(base, artifact),
        "map": str(map_dir),
        "out_dir": str(out),
        "tensors": len(correction),
        "entries": sum(each.size for each in artifact.indices.values()),
        "changed": sum(int(np.count_nonzero(each)) for each in correction.values()),
        "largest_change": max(float(np.abs(each).max()) for each in correction.values()),
        "safeweights_peft_version": version("safeweights-peft"),
    }


def _load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{folder}: expected an adapter for {model.name_or_path}, found one that PEFT can't "
            f"load into it ({error}); give --base, the model that it was trained on"
        ) from error


def _find_lora(lora: str, base: str | None) -> tuple[Path, str]:
    """Find a LoRA's directory, downloaded if need be, and its base: the given or the named one."""
    folder = Path(lora)
    if not folder.is_dir():
        folder = download(lora, LORA_FILES, "a LoRA's directory or Hub id")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{lora}: expected a LoRA with adapter_config.json, found {type(error).__name__}: "
            f"{error}; give the directory that save_pretrained wrote, or a Hub id"
        ) from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{lora}: expected adapter_model.safetensors, found none; save the LoRA as safetensors"
        )
    base = base or config.base_model_name_or_path
    if not base:
        raise ModelError(
            f"{lora}: expected the name of its base in its config, found none; give --base"
        )
    return folder, base
