"""The training job: from a base model and a safety map to a safety patch on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.data import Example, data_digest, encode_example, read_rows, with_refusals
from safeweights_peft.errors import FormatError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.fetching import resolve_base
from safeweights_peft.files import check_target, publish, write_json
from safeweights_peft.jobs.progress import Progress, Quiet, advance_to
from safeweights_peft.jobs.resume import clear_work, work_dir_beside
from safeweights_peft.merging.gather import find_state
from safeweights_peft.modeling.loading import load_model, load_tokenizer, pick_device, pick_dtype
from safeweights_peft.patch.io import read_map
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.settings import ComputeSettings, TrainSettings
from safeweights_peft.training.refuse import StepLoss, train_to_refuse
from safeweights_peft.tuner.content import create_adapter, round_values

LOSSES_FILE = "training.json"


def train(
    base: str,
    map_dir: Path,
    out: Path,
    settings: TrainSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the entries of a safety map and writes them as a safety patch.

    An interrupted job goes on from its last checkpoint, kept beside `out` until the patch is
    complete; a changed setting starts it afresh.
    """
    settings, compute = settings or TrainSettings(), compute or ComputeSettings()
    progress = progress or Quiet()
    check_target(out, overwrite, FormatError)
    harmful_rows = with_refusals(read_rows(settings.harmful))
    benign_rows = read_rows(settings.benign)
    safety_map = read_map(map_dir)
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    find_state(CheckpointReader(found.path), safety_map)
    tokenizer = load_tokenizer(found)
    base_model = load_model(found, pick_dtype(compute.dtype, device), device)
    harmful = [
        encode_example(tokenizer, row.instruction, row.output or "", settings.refusal_tokens)
        for row in harmful_rows
    ]
    requests = [row.instruction for row in benign_rows]
    benign = _base_answers(base_model, tokenizer, requests, settings, progress)
    metadata = replace(
        safety_map.metadata, base_model_name_or_path=found.name, revision=found.revision
    )
    model = create_adapter(base_model, metadata, safety_map.indices)
    record: dict[str, Any] = {
        "kind": "training",
        "map": str(map_dir),
        "settings": asdict(settings) | asdict(compute),
        "harmful_digest": data_digest(harmful_rows),
        "benign_digest": data_digest(benign_rows),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    digests = {name: str(each.digest) for name, each in metadata.tensors.items()}
    work_dir = work_dir_beside(out, record | {"map_digests": digests})
    losses = _run(model, tokenizer, harmful, benign, settings, work_dir, progress)
    record["losses"] = [asdict(loss) for loss in losses]
    _save(model, metadata, out, record, overwrite)
    clear_work(out)
    return record


def _base_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    settings: TrainSettings,
    progress: Progress,
) -> list[Example]:
    with progress.task("Asking the base benign requests", len(requests)) as advance:
        return generate_answers(
            model,
            tokenizer,
            requests,
            max_new_tokens=settings.answer_tokens,
            on_batch=advance,
        )


def _run(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    settings: TrainSettings,
    work_dir: Path,
    progress: Progress,
) -> list[StepLoss]:
    with progress.task("Training", settings.steps) as advance:
        reach = advance_to(advance)
        return train_to_refuse(
            model,
            tokenizer,
            harmful,
            benign,
            settings,
            work_dir,
            reach,
        )


def _save(
    model: PeftModel, metadata: AdapterMetadata, out: Path, record: dict[str, Any], overwrite: bool
) -> None:
    """Round the values to their storage dtype and publishes the patch whole."""
    config = model.peft_config["default"]
    config.values_dtype = _storage_dtype(metadata)
    round_values(model)
    card = render_card(
        "patch",
        metadata.base_model_name_or_path,
        metadata.revision,
        entries=sum(record.count for record in metadata.tensors.values()),
        tensors=len(metadata.tensors),
    )
    with publish(out, overwrite, FormatError) as draft:
        model.save_pretrained(str(draft))
        (draft / CARD_FILE).write_text(card, encoding="utf-8")
        write_json(draft / LOSSES_FILE, record)


def _storage_dtype(metadata: AdapterMetadata) -> str:
    """Store values in bfloat16 where the base itself has only 16 bits: half of float32's size."""
    dtypes = {record.dtype for record in metadata.tensors.values()}
    return "float32" if "float32" in dtypes else "bfloat16"
