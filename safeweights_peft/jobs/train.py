"""The training job: from a base and a safety map to a safety patch on disk."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

from peft import PeftModel

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.chat import list_settings
from safeweights_peft.errors import DataError, FormatError
from safeweights_peft.files import publish, write_json
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.gather import find_state
from safeweights_peft.patch.io import read_map
from safeweights_peft.patch.metadata import CHAT, AdapterMetadata, read_chat
from safeweights_peft.settings import TrainSettings
from safeweights_peft.sources import LOOKS_HARMFUL, Row, data_digest, read_refusals, read_rows
from safeweights_peft.tables import chat_rows
from safeweights_peft.training.refuse import find_learning_rate, train_to_refuse
from safeweights_peft.tuner.adapter import create_adapter, round_values

LOSSES_FILE = "training.json"


def train(
    job: Job,
    map_dir: Path,
    out: Path,
    settings: TrainSettings | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the entries of a safety map, and write them as a safety patch."""
    settings = settings or TrainSettings()
    harmful_rows, benign_rows = read_requests(settings)
    safety_map = read_map(map_dir)
    job.check(
        *(benign_rows, harmful_rows),
        out=out,
        inputs={"the map": map_dir},
        overwrite=overwrite,
        error=FormatError,
    )
    find_state(job.reader, safety_map)  # another base is refused before it is loaded
    job.check_exact(safety_map.metadata.tensors.values())
    harmful = job.chat.encode_rows(harmful_rows, settings.refusal_tokens)
    # Drawn apart, or with the others as they come.
    drawn = [bool(settings.boundary_fraction) and _looks_harmful(row) for row in benign_rows]
    record = job.record(
        "training",
        safety_map,
        settings,
        map=str(map_dir),
        harmful_digest=data_digest(harmful_rows),
        benign_digest=data_digest(benign_rows),
        boundary_digest=data_digest([*compress(benign_rows, drawn)]) if any(drawn) else None,
    )
    chat = list_settings(job.compute)
    metadata = replace(
        safety_map.metadata,
        base_model_name_or_path=job.base.name,
        revision=job.base.revision,
        selection=safety_map.metadata.selection | ({CHAT: chat} if chat else {}),
    )
    with job.work(out, record, overwrite) as work_dir:
        answers = job.ask("the base benign", benign_rows, settings.benign_tokens)
        boundary = [*compress(answers, drawn)]
        benign = [*compress(answers, map(not_, drawn))]
        model = create_adapter(job.take_model(), metadata, safety_map.indices)
        try:
            if settings.learning_rate is None:
                rate = find_learning_rate(model, job.tokenizer, harmful, settings)
                job.progress.note(f"--lr {rate:g} gains {settings.step_gain:g} nats per step")
                settings = replace(settings, learning_rate=rate)
            record["learning_rate"] = settings.learning_rate
            with job.steps("Train", settings.steps, each=1) as reach:
                losses = train_to_refuse(
                    *(model, job.tokenizer, harmful, benign, settings, work_dir, reach),
                    boundary=boundary,
                    progress=job.progress,
                )
            record["losses"] = [asdict(loss) for loss in losses]
            _save(model, metadata, out, record, overwrite)
        finally:
            job.give_back(model)
    return record


def read_requests(settings: TrainSettings) -> tuple[list[Row], list[Row]]:
    """Read the harmful requests, with refusals, and the benign ones."""
    benign = read_rows(settings.benign)
    if settings.boundary:
        benign += [replace(row, category=LOOKS_HARMFUL) for row in read_rows(settings.boundary)]
    looks_harmful = sum(map(_looks_harmful, benign))
    if settings.boundary_fraction and not 0 < looks_harmful < len(benign):
        raise DataError(
            f'boundary_fraction: expected benign requests of category "{LOOKS_HARMFUL}" and '
            f"others, found {looks_harmful} of {len(benign)} of it; give --boundary "
            "builtin:boundary_train, or leave --boundary-fraction out"
        )
    return read_refusals(settings.harmful), benign


def _looks_harmful(row: Row) -> bool:
    return row.category == LOOKS_HARMFUL


def _save(
    model: PeftModel,
    metadata: AdapterMetadata,
    out: Path,
    record: dict[str, Any],
    overwrite: bool,
) -> None:
    """Round the values to their storage dtype, and publish the patch whole."""
    # Where the base itself has only 16 bits, float32 values would double the size for nothing.
    dtypes = {tensor.dtype for tensor in metadata.tensors.values()}
    model.peft_config["default"].values_dtype = "float32" if "float32" in dtypes else "bfloat16"
    round_values(model)
    with publish(out, overwrite, FormatError) as draft:
        model.save_pretrained(str(draft))
        write_card(draft, metadata)
        write_json(draft / LOSSES_FILE, record)


def write_card(folder: Path, metadata: AdapterMetadata) -> None:
    """Write the card of a patch beside it."""
    card = render_card(
        "patch",
        metadata.base_model_name_or_path,
        metadata.revision,
        entries=sum(tensor.count for tensor in metadata.tensors.values()),
        tensors=len(metadata.tensors),
        chat=chat_rows(read_chat(metadata.selection)),
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
