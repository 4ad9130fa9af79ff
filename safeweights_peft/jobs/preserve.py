"""The preserving job: a base learns from rows of data, and its safety weights stay.

In full it becomes a new model; by LoRA, an adapter with a correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import CheckpointDraft, draft_copy
from safeweights_peft.data import Row, data_digest, encode_example, read_rows
from safeweights_peft.errors import CheckpointError, ModelError
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.files import check_apart, check_target, publish, write_json
from safeweights_peft.jobs.correction import correct, write_corrected
from safeweights_peft.jobs.progress import Progress, Quiet, advance_to
from safeweights_peft.jobs.provenance import made_with
from safeweights_peft.jobs.resume import clear_work, digests, work_dir_beside
from safeweights_peft.merging.gather import find_copies, find_state
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.loading import load_model, load_tokenizer, pick_device, pick_dtype
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import TensorRecord
from safeweights_peft.settings import ComputeSettings, PreserveMethod, PreserveSettings
from safeweights_peft.training.finetune import add_lora, fine_tune

RECORD_FILE = "preserving.json"


def preserve_model(
    base: str,
    map_dir: Path,
    data: str,
    out: Path,
    settings: PreserveSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tunes a base, but for the entries of a safety map or patch; writes model or adapter.

    In full, weights are trained in float32 and written in the dtypes of the base's checkpoint. By
    LoRA, what is written is the adapter and a correction; see `pipeline.adapting`. An
    interrupted job goes on from its last checkpoint, kept beside `out` until the model is complete;
    a changed setting starts it afresh.
    """
    settings, compute = settings or PreserveSettings(), compute or ComputeSettings()
    check_target(out, overwrite, CheckpointError)
    rows, artifact = read_rows(data, needs_output=True), read_artifact(map_dir)
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    check_apart(out, {"the base": found.path, "the map": map_dir}, CheckpointError)
    tokenizer, reader = load_tokenizer(found), CheckpointReader(found.path)
    model = load_model(found, torch.float32, device)
    layout = describe(model, [name for name, _ in model.named_parameters()], found.path)
    dtype = _matrix_dtype(pick_dtype(compute.dtype, device), device, layout)
    examples = [
        encode_example(tokenizer, row.instruction, row.output or "", settings.max_answer_tokens)
        for row in rows
    ]
    record = _describe(found, map_dir, artifact, data, rows) | {
        "settings": asdict(settings) | asdict(compute)
    }
    work_dir = work_dir_beside(out, record | {"digests": digests(model, artifact.indices)})
    by_lora = settings.method is PreserveMethod.LORA
    if by_lora:
        model = add_lora(model, settings)
        correct(model, artifact)  # refused now, not after the training
    with (progress or Quiet()).task("Fine-tuning", settings.steps) as advance:
        reach = advance_to(advance)
        record["losses"] = fine_tune(
            model,
            tokenizer.pad_token_id,
            examples,
            artifact,
            settings,
            work_dir,
            dtype,
            reach,
        )
    if by_lora:
        with publish(out, overwrite, CheckpointError) as draft:
            write_corrected(draft, model, found, artifact, correct(model, artifact))
            write_json(draft / RECORD_FILE, record)
    else:
        _save(model, layout, artifact, reader, out, record, overwrite)
    clear_work(out)
    return record


def _describe(
    base: BaseModel,
    map_dir: Path,
    artifact: Artifact,
    data: str,
    rows: Sequence[Row],
) -> dict[str, Any]:
    """Record what the job works on, and with what versions."""
    return {
        "kind": "preserving",
        **made_with(base, artifact),
        "map": str(map_dir),
        "artifact": artifact.metadata.mode.artifact,
        "frozen_entries": sum(each.size for each in artifact.indices.values()),
        "data": data,
        "data_digest": data_digest(rows),
        "safeweights_peft_version": version("safeweights-peft"),
        "transformers_version": version("transformers"),
        "torch_version": version("torch"),
    }


def _matrix_dtype(
    picked: torch.dtype | str, device: torch.device, layout: Mapping[str, TensorRecord]
) -> torch.dtype:
    """Read "auto" as the dtype of the checkpoint's largest tensor, and refuses what can't run."""
    largest = max(layout.values(), key=lambda each: each.numel)
    dtype = picked if isinstance(picked, torch.dtype) else getattr(torch, largest.dtype)
    if dtype is torch.float16 and device.type == "cpu":
        raise ModelError(
            "--dtype float16: expected an accelerator to train on, found a CPU; choose float32 or "
            "bfloat16"
        )
    return dtype


def _save(
    model: nn.Module,
    layout: Mapping[str, TensorRecord],
    artifact: Artifact,
    reader: CheckpointReader,
    out: Path,
    record: dict[str, Any],
    overwrite: bool,
) -> None:
    """Publish a copy of the base with the trained weights, once the frozen ones are checked."""
    card = render_card(
        "preserved",
        *(record["base"]["name"], record["base"]["revision"]),
        entries=record["frozen_entries"],
        tensors=len(artifact.indices),
        artifact=record["artifact"],
    )
    with draft_copy(reader, out, overwrite=overwrite) as draft:
        write_parameters(draft, model, layout)
        find_state(draft.reader, artifact)
        folder = draft.reader.directory
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        write_json(folder / RECORD_FILE, record)


def write_parameters(
    draft: CheckpointDraft, model: nn.Module, layout: Mapping[str, TensorRecord]
) -> None:
    """Write all weights of a model into a copy of its base, rounded to the base's dtypes."""
    for name, record in layout.items():
        _write_parameter(draft, model.get_parameter(name), record)


def _write_parameter(draft: CheckpointDraft, parameter: nn.Parameter, record: TensorRecord) -> None:
    """Round a parameter once, to nearest even, into the tensors that hold it on disk."""
    flat = parameter.detach().cpu().to(getattr(torch, record.dtype)).flatten()
    for copy in find_copies(draft.reader, record):
        for block in copy.blocks:
            start = flat.storage_offset() + block.offset
            tensor = flat.as_strided(block.shape, block.strides, start)
            draft.write(block.key, to_numpy(tensor))
