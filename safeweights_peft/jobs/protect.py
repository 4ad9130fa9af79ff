"""The protecting job: what was tuned without protection gets its base's safety weights back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.writer import draft_copy
from safeweights_peft.delta import Array
from safeweights_peft.errors import CheckpointError, ModelError
from safeweights_peft.fetching import download, find_base
from safeweights_peft.files import publish, write_json
from safeweights_peft.jobs.correction import correct, write_corrected
from safeweights_peft.jobs.evaluate import Evaluator, evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import load_lora
from safeweights_peft.jobs.preserve import write_parameters
from safeweights_peft.merging.protect import protect, put_back
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import CONFIG_FILE, TENSORS_FILE, read_artifact
from safeweights_peft.progress import Progress, percent
from safeweights_peft.settings import ComputeSettings, EvaluateSettings

RECORD_FILE = "protecting.json"


def protect_tuned(
    job: Job,
    tuned: Path,
    map_dir: Path,
    out: Path,
    settings: EvaluateSettings | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a tuned checkpoint with its base's safety weights; measure both if settings say how."""
    evaluator = Evaluator(job.beside(tuned), settings) if settings else None
    if evaluator:
        evaluator.check()
    with percent(job.progress, "Copy the tuned model") as show:
        report = protect(
            tuned,
            job.base.path,
            map_dir,
            out,
            overwrite=overwrite,
            progress=show,
        )
    content = {"tuned": str(tuned), "map": str(map_dir), **asdict(report)}
    record = job.record("protection", read_artifact(map_dir), settings, **content)
    if evaluator:
        record["before"] = pick_figures(evaluator.evaluate())
        record["after"] = pick_figures(evaluate(job.beside(out), None, settings))
    write_json(out / RECORD_FILE, record)
    return record


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
    """Write a LoRA with a correction, or its base with it merged in around the safety weights."""
    artifact, folder = read_artifact(map_dir), find_lora(lora)
    compute = compute or ComputeSettings()
    job = Job(find_base(base, [folder], compute.revision), compute, progress)
    evaluator = Evaluator(job, settings) if settings else None
    inputs = {"the map": map_dir, "the LoRA": folder}
    check = evaluator.check if evaluator else job.check
    check(out=out, inputs=inputs, overwrite=overwrite, error=CheckpointError)
    values = _write_protected(job, folder, artifact, out, merged, overwrite)
    record = job.record(
        "protection",
        artifact,
        settings,
        lora=lora,
        map=str(map_dir),
        out_dir=str(out),
        tensors=len(values),
        entries=sum(indices.size for indices in artifact.indices.values()),
        changed=sum(int(np.count_nonzero(change)) for change in values.values()),
        largest_change=max(float(np.abs(change).max()) for change in values.values()),
    )
    if evaluator:
        record["before"] = pick_figures(evaluator.evaluate(folder))
        after = evaluate(job.beside(out), None, settings) if merged else evaluator.evaluate(out)
        record["after"] = pick_figures(after)
    write_json(out / RECORD_FILE, record)
    return record


def _write_protected(
    job: Job, lora: Path, artifact: Artifact, out: Path, merged: bool, overwrite: bool
) -> Mapping[str, Array]:
    """Write the result, and return what the correction adds at each parameter's entries."""
    # In float32: merged weights are rounded once, to the base's dtype.
    model = load_model(job.base, torch.float32, job.device)
    layout = describe(model, [name for name, _ in model.named_parameters()], job.base.path)
    adapted = load_lora(model, lora)
    values = correct(adapted, artifact)
    if not values:
        raise ModelError(
            f"model: expected a LoRA on tensors of the {artifact.metadata.mode.artifact}, found "
            "one that changes none of them; it needs no protection"
        )
    if merged:
        with draft_copy(job.reader, out, overwrite=overwrite) as draft:
            plain = adapted.merge_and_unload()
            check_ties(plain, layout)
            write_parameters(draft, plain, layout)
            put_back(job.reader, draft, artifact)
    else:
        with publish(out, overwrite, CheckpointError) as draft_dir:
            write_corrected(draft_dir, adapted, job, artifact, values)
    return values


def check_ties(model: PreTrainedModel, layout: Collection[str]) -> None:
    """Refuse a parameter that the base shares with another, and that was trained apart from it."""
    for name, _ in model.named_parameters():
        if name not in layout:
            raise ModelError(
                f"{name}: expected a parameter that is tied to another, as in the base, found it "
                "trained apart, which a copy of the base's files can't hold; leave out --merged"
            )


def find_lora(lora: str) -> Path:
    """Find a LoRA's directory, downloaded if need be."""
    folder = Path(lora)
    if not folder.is_dir():
        folder = download(lora, [CONFIG_FILE, TENSORS_FILE], "a LoRA's directory or Hub id")
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise ModelError(
                f"{lora}: expected {name}, found none; give the directory that save_pretrained "
                "wrote, with safetensors, or a Hub id"
            )
    return folder
