"""The repairing job: a model that lost its safety by fine-tuning gets a safety patch of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.checkpoint.writer import draft_copy
from safeweights_peft.delta import SparseDelta, add_rounded, digest
from safeweights_peft.errors import DataError, FormatError, ModelError, SettingsError
from safeweights_peft.fetching import find_base, name_base
from safeweights_peft.files import lock, publish
from safeweights_peft.jobs.enhance import (
    MODEL,
    SAMPLES,
    Steps,
    check_run,
    claim,
    compare,
    load_first,
    make_patch,
    number_stages,
    write_result,
)
from safeweights_peft.jobs.evaluate import Evaluator
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import is_patch, load_patched
from safeweights_peft.jobs.preserve import write_parameters
from safeweights_peft.jobs.protect import check_ties, find_lora
from safeweights_peft.jobs.record import hash_file
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.train import train, write_card
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.modeling.layout import check_shape, describe, total_parameters
from safeweights_peft.patch.artifacts import Artifact, StoredPatch
from safeweights_peft.patch.io import (
    CONFIG_FILE,
    TENSORS_FILE,
    read_artifact,
    write_adapter,
    write_map,
)
from safeweights_peft.patch.metadata import CHAT, CORRECTION_OF
from safeweights_peft.patch.records import TensorRecord
from safeweights_peft.progress import Progress
from safeweights_peft.scales import ADDED
from safeweights_peft.selection.scores import build_map
from safeweights_peft.selection.topk import Selected
from safeweights_peft.settings import RunSettings

_HINT = "give the patch of the model from which this one was tuned"


def repair(
    settings: RunSettings,  # whose base is the tuned model
    out: Path,
    progress: Progress | None = None,
    patch: Path | None = None,
    *,
    add_patch: float | None = None,
    base: str | None = None,  # of a LoRA
    job: Job | None = None,
) -> dict[str, Any]:
    """Make a tuned model safe again, or a LoRA's base with it merged in; resume a run.

    Trained are the entries of an old patch or map, or else those that `score` finds. With
    `add_patch` nothing is trained: the old patch's values are added at that scale.
    """
    old = read_artifact(patch) if patch else None
    _check_settings(old, add_patch)
    model, lora = find_tuned(settings.base, base)
    job = job or Job(model, settings.compute, progress, [lora] if lora else [])
    content_id = old.metadata.content_id if old else None
    origin: dict[str, dict[str, Any]] = {
        "repair": {"patch": content_id, "add_patch": add_patch},
        "lora": {"digest": hash_file(lora / TENSORS_FILE) if lora else None},
    }
    evaluator = Evaluator(job, settings.evaluate, samples=SAMPLES)
    compare(out, settings, origin)
    learned = []
    if not (out / "result.json").exists():
        places = {"the patch": patch, "the LoRA": lora}
        learned = check_run(
            *(job, evaluator, settings, out, {role: path for role, path in places.items() if path}),
            scores=old is None,
            trains=add_patch is None,
        )
        if old:
            _describe(job, old)
    with lock(out, DataError):
        note = number_stages(job, 3 + bool(lora) + (add_patch is None))
        if lora:
            job = _merge_lora(job, lora, out, settings, origin, note)
            evaluator = Evaluator(job, settings.evaluate, samples=SAMPLES)
        else:
            claim(out, settings, partial(load_first, job, out), origin)
        evaluator.note_shared(learned)
        steps = _list_steps(job, settings, out, old, patch, add_patch)
        before, after, _ = make_patch(evaluator, out, steps, note, "tuned model")
        return write_result(
            *(out, "repair", settings, before, after),
            sweep=None,
            old_patch=None if patch is None else {"path": str(patch), "content_id": content_id},
            add_patch=add_patch,
            lora={"path": str(lora), **origin["lora"]} if lora else None,
        )


def _check_settings(old: Artifact | None, add_patch: float | None) -> None:
    """Refuse a scale that has nothing to scale."""
    ADDED.check(add_patch)
    if add_patch is not None and not isinstance(old, StoredPatch):
        found = "a safety map, which has no values" if old else "none"
        raise SettingsError(
            f"--add-patch: expected a patch as --patch with it, found {found}; "
            "give the patch whose values to add"
        )


def find_tuned(tuned: str, base: str | None = None) -> tuple[str, Path | None]:
    """Name the model that was tuned, or a LoRA's base and the LoRA; refuse a patch."""
    folder = Path(tuned)
    if not (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        if base is not None:
            raise ModelError(
                f"--base {base}: expected a LoRA with it, found another model in {tuned}; leave "
                "--base out"
            )
        return tuned, None
    if is_patch(folder):
        raise ModelError(
            f"{tuned}: expected a tuned model or a LoRA, found a safety patch or map; give the "
            "model that `safeweights merge` made of it and its base"
        )
    return base or name_base(None, [folder])[0], find_lora(tuned)


def _merge_lora(
    job: Job,
    lora: Path,
    out: Path,
    settings: RunSettings,
    origin: Mapping[str, Any],
    note: Any,
) -> Job:
    """Write the base with a LoRA merged in, unless it is there; return a job on it."""
    note("Merge the LoRA into its base")
    merged: list[PreTrainedModel] = []

    def load() -> None:
        if not (out / MODEL).exists():
            merged.append(load_patched(job.base, [lora], "auto", job.device))

    claim(out, settings, load, origin)
    for model in merged:
        names = [name for name, _ in job.empty.named_parameters()]
        layout = describe(job.empty, names, job.base.path)
        check_ties(model, layout)
        with draft_copy(job.reader, out / MODEL) as draft:
            write_parameters(draft, model, layout)
    return job.beside(out / MODEL)


def _list_steps(
    job: Job,
    settings: RunSettings,
    out: Path,
    old: Artifact | None,
    patch: Path | None,
    add_patch: float | None,
) -> Steps:
    """List what makes the patch: from which entries, by training or without."""
    if isinstance(old, StoredPatch) and patch and add_patch is not None:
        add = partial(_add, job, old, patch, add_patch)
        return {"patch": (f"Add the old patch at scale {add_patch:g}", add)}
    select = partial(_renew, job, old) if old else partial(score, job, settings=settings.score)
    title = "Find the old patch's weights" if old else "Score its weights"
    return {
        "map": (title, select),
        "patch": (
            "Train the selected weights",
            lambda path: train(job, out / "map", path, settings.train),
        ),
    }


def _describe(job: Job, old: Artifact) -> dict[str, TensorRecord]:
    """Describe an old patch's parameters as a tuned model holds them; refuse another model."""
    parameters = dict(job.empty.named_parameters())
    for name, record in old.metadata.tensors.items():
        check_shape(name, parameters.get(name), record, _HINT)
    return describe(job.empty, old.indices, job.base.path)


def _select(job: Job, old: Artifact) -> dict[str, Any]:
    """Say how entries were chosen: as the old patch's, for another base."""
    selection = old.metadata.selection | {
        "total_parameters": total_parameters(job.empty),
        "repair_of": old.metadata.content_id,
        "safeweights_peft_version": version("safeweights-peft"),
    }
    # Said of the old patch alone: by which chat it was trained, and what it corrected.
    return {key: value for key, value in selection.items() if key not in (CHAT, CORRECTION_OF)}


def _renew(job: Job, old: Artifact, out: Path) -> None:
    """Write an old patch's entries as a map of a tuned model."""
    # Of patches no scores are known; nothing that trains reads them.
    selected = {
        name: Selected(indices, np.zeros(indices.shape, np.float32))
        for name, indices in old.indices.items()
    }
    records = _describe(job, old)
    write_map(out, build_map(job.empty, job.base, selected, _select(job, old), records))


def _add(job: Job, old: StoredPatch, folder: Path, scale: float, out: Path) -> None:
    """Write an old patch's values as a patch of a tuned model (RESTA, arXiv 2402.11746)."""
    read = None
    if old.metadata.needs_base:
        read = partial(gather_entries, CheckpointReader(find_base(None, [folder]).path))
    adapter, total = old.decode(read), scale * old.metadata.scale
    records = {}
    for name, record in _describe(job, old).items():
        delta: SparseDelta = adapter.deltas[name]
        entries = gather_entries(job.reader, name, record, delta.indices)
        merged = digest(add_rounded(entries, delta.values, total))
        records[name] = replace(
            record, count=delta.count, base_digest=digest(entries), merged_digest=merged
        )
    metadata = replace(
        adapter.metadata,
        base_model_name_or_path=job.base.name,
        revision=job.base.revision,
        scale=total,  # the values stay the same bits
        selection=_select(job, old),
        tensors=records,
    )
    with publish(out, False, FormatError) as draft:
        write_adapter(draft, replace(adapter, metadata=metadata), overwrite=True)
        write_card(draft, metadata)
