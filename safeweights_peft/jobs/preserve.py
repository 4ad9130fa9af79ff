"""The preserving job: a base learns from rows of data while its safety weights stay (SPA)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.checkpoint.writer import CheckpointDraft, draft_copy
from safeweights_peft.errors import CheckpointError, ModelError, SettingsError
from safeweights_peft.files import publish, write_json
from safeweights_peft.jobs.correction import correct, write_corrected
from safeweights_peft.jobs.evaluate import Evaluator, evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.gather import check_safety, find_copies
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import TensorRecord
from safeweights_peft.settings import EvaluateSettings, PreserveMethod, PreserveSettings
from safeweights_peft.sources import Row, data_digest, read_rows
from safeweights_peft.training.finetune import add_lora, find_linear, fine_tune

RECORD_FILE = "preserving.json"


def preserve_model(
    job: Job,
    map_dir: Path,
    data: str,
    out: Path,
    settings: PreserveSettings | None = None,
    measure: EvaluateSettings | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tune a base, except the entries of a safety map or patch; write a model or a LoRA.

    Both are measured, the base and the result, if settings say how.
    """
    settings = settings or PreserveSettings()
    _check_settings(settings)
    evaluator = Evaluator(job, measure) if measure else None
    rows, artifact = read_rows(data, needs_output=True), read_artifact(map_dir)
    if evaluator:
        evaluator.check()
        evaluator.note_shared(rows)
    job.check(
        *((), rows),
        out=out,
        inputs={"the map": map_dir},
        overwrite=overwrite,
        error=CheckpointError,
    )
    check_safety(job.reader, artifact)  # another base is refused before it is loaded
    layout = describe(job.empty, [name for name, _ in job.empty.named_parameters()], job.base.path)
    dtype = _pick_matrix_dtype(job, layout)
    record = job.record(
        "preserving",
        artifact,
        settings,
        map=str(map_dir),
        artifact=artifact.metadata.mode.artifact,
        frozen_entries=sum(indices.size for indices in artifact.indices.values()),
        data=data,
        data_digest=data_digest(rows),
    )
    if settings.method is PreserveMethod.LORA:
        record["lora_left_out"] = find_linear(job.empty)[1]
    with job.work(out, record, overwrite) as work_dir:
        before = evaluator.evaluate() if evaluator else None
        if evaluator:
            job.take_model()  # gives its memory to the model that is trained
        _fine_tune(
            *(job, rows, artifact, layout, dtype, settings),
            *(work_dir, out, record, overwrite),
        )
    if evaluator and before:
        after = (
            evaluator.evaluate(out)
            if settings.method is PreserveMethod.LORA
            else evaluate(job.beside(out), None, measure)
        )
        record |= {"before": pick_figures(before), "after": pick_figures(after)}
        write_json(out / RECORD_FILE, record)
    return record


def _fine_tune(
    job: Job,
    rows: list[Row],
    artifact: Artifact,
    layout: Mapping[str, TensorRecord],
    dtype: torch.dtype,
    settings: PreserveSettings,
    work_dir: Path,
    out: Path,
    record: dict[str, Any],
    overwrite: bool,
) -> None:
    """Train and publish; what is held for that is free when this returns."""
    examples = job.chat.encode_rows(rows, settings.max_answer_tokens)
    # Trained in float32, whatever the products are computed in: steps are smaller than what
    # bfloat16 resolves. Written in the dtypes of the base's checkpoint.
    model: nn.Module = load_model(job.base, torch.float32, job.device)
    by_lora = settings.method is PreserveMethod.LORA
    if by_lora:
        model = add_lora(model, settings)
        correct(model, artifact)  # refused now, not after the training
    with job.steps("Fine-tune", settings.steps, each=1) as reach:
        record["losses"] = fine_tune(
            model,
            job.tokenizer.pad_token_id,
            examples,
            artifact,
            settings,
            work_dir,
            dtype,
            reach,
        )
    if by_lora:
        with publish(out, overwrite, CheckpointError) as draft:
            write_corrected(draft, model, job, artifact, correct(model, artifact))
            write_json(draft / RECORD_FILE, record)
    else:
        _write_model(out, model, job, layout, artifact, record, overwrite)


def _check_settings(settings: PreserveSettings) -> None:
    """Refuse settings that don't go together."""
    if settings.method is PreserveMethod.FULL and settings.rank != PreserveSettings.rank:
        raise SettingsError(
            f"--rank: expected --method {PreserveMethod.LORA} with it, found {settings.method}; "
            "leave one out"
        )


def _pick_matrix_dtype(job: Job, layout: Mapping[str, TensorRecord]) -> torch.dtype:
    """Read "auto" as the dtype of the checkpoint's largest tensor, and refuse what can't run."""
    largest = max(layout.values(), key=lambda record: record.numel)
    dtype = getattr(torch, largest.dtype) if isinstance(job.dtype, str) else job.dtype
    if dtype is torch.float16 and job.device.type == "cpu":
        raise ModelError(
            "--dtype float16: expected an accelerator to train on, found a CPU; choose float32 or "
            "bfloat16"
        )
    return dtype


def _write_model(
    out: Path,
    model: nn.Module,
    job: Job,
    layout: Mapping[str, TensorRecord],
    artifact: Artifact,
    record: dict[str, Any],
    overwrite: bool,
) -> None:
    """Publish a copy of the base with the trained weights, once the frozen ones are checked."""
    card = render_card(
        "preserved",
        *(job.base.name, job.base.revision),
        entries=record["frozen_entries"],
        tensors=len(artifact.indices),
        artifact=record["artifact"],
    )
    with draft_copy(job.reader, out, overwrite=overwrite) as draft:
        write_parameters(draft, model, layout)
        check_safety(draft.reader, artifact)
        folder = draft.reader.directory
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        write_json(folder / RECORD_FILE, record)


def write_parameters(
    draft: CheckpointDraft, model: nn.Module, layout: Mapping[str, TensorRecord]
) -> None:
    """Write a model's weights into a copy of its base, rounded once to the base's dtypes."""
    for name, record in layout.items():
        parameter = model.get_parameter(name).detach().cpu()
        flat = parameter.to(getattr(torch, record.dtype)).flatten()
        for copy in find_copies(draft.reader, record):
            for block in copy.blocks:
                start = flat.storage_offset() + block.offset
                tensor = flat.as_strided(block.shape, block.strides, start)
                draft.write(block.key, to_numpy(tensor))
