"""The preserving job: a base learns from rows of data, and stays safe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.checkpoint.writer import CheckpointDraft, draft_copy
from safeweights_peft.data import Example
from safeweights_peft.errors import CheckpointError, ModelError, SettingsError
from safeweights_peft.evaluation.judges import RefusalJudge
from safeweights_peft.files import publish, write_json
from safeweights_peft.jobs.anchor import JUDGED_TOKENS, find_rows, read_sources
from safeweights_peft.jobs.correction import correct, describe_kept, write_corrected
from safeweights_peft.jobs.evaluate import Evaluator, evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.work import once
from safeweights_peft.merging.gather import check_safety, find_copies
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import TensorRecord
from safeweights_peft.settings import EvaluateSettings, PreserveMethod, PreserveSettings
from safeweights_peft.sources import Row, data_digest, read_rows
from safeweights_peft.training.anchor import Anchor, check_refusals, make_anchor, to_records
from safeweights_peft.training.finetune import add_lora, find_linear, fine_tune

RECORD_FILE = "preserving.json"


def preserve_model(
    job: Job,
    map_dir: Path | None,
    data: str,
    out: Path,
    settings: PreserveSettings | None = None,
    measure: EvaluateSettings | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tune a base, hold its answers, freeze a map's or patch's entries; write the result.

    Both are measured, the base and the result, if settings say how.
    """
    settings = settings or PreserveSettings()
    _check_settings(settings, map_dir)
    evaluator = Evaluator(job, measure) if measure else None
    rows, held = read_rows(data, needs_output=True), HeldRows.read(settings)
    artifact = read_artifact(map_dir) if map_dir else None
    if evaluator:
        evaluator.check()
        evaluator.note_shared([*rows, *held.all])
    job.check(
        *(held.all, rows),
        answer_tokens=JUDGED_TOKENS,
        out=out,
        inputs={"the map": map_dir} if map_dir else {},
        overwrite=overwrite,
        error=CheckpointError,
    )
    if artifact:
        check_safety(job.reader, artifact)  # another base is refused before it is loaded
    layout = describe(job.empty, [name for name, _ in job.empty.named_parameters()], job.base.path)
    dtype = _pick_matrix_dtype(job, layout)
    record = job.record(
        "preserving",
        artifact,
        settings,
        map=str(map_dir) if map_dir else None,
        artifact=artifact.metadata.mode.artifact if artifact else None,
        frozen_entries=describe_kept(artifact, 0)["entries"],
        data=data,
        data_digest=data_digest(rows),
        harmful_digest=data_digest(held.harmful) if held.harmful else None,
        benign_digest=data_digest(held.benign) if held.benign else None,
    )
    if settings.method is PreserveMethod.LORA:
        record["lora_left_out"] = find_linear(job.empty)[1]
    with job.work(out, record, overwrite) as work_dir:
        answers = held.ask(job, work_dir / "anchor.json")
        before = evaluator.evaluate() if evaluator else None
        job.drop_model()  # gives its memory to the model that is trained
        _fine_tune(
            *(job, rows, artifact, answers, layout, dtype, settings),
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


class HeldRows(NamedTuple):
    """The requests whose answers are held; none where there is no anchor."""

    harmful: list[Row]
    benign: list[Row]  # those that look harmful first

    @classmethod
    def read(cls, settings: PreserveSettings) -> HeldRows:
        """Read the requests."""
        if not settings.anchor:
            return cls([], [])
        sources = [settings.boundary, settings.benign] if settings.boundary else settings.benign
        harmful, benign = read_sources(settings.harmful), read_sources(sources)
        # Who answers doesn't see an answer that is there.
        return cls(*([replace(row, output=None) for row in rows] for rows in (harmful, benign)))

    @property
    def all(self) -> list[Row]:
        """All requests."""
        return [*self.harmful, *self.benign]

    def ask(self, job: Job, path: Path) -> dict[str, list[Example]]:
        """Let the base answer, unless that is done; refuse one that refuses nothing."""
        if not self.harmful:
            return {}

        def answer() -> dict[str, Any]:
            names = iter(("the base harmful", "the base benign"))
            found = find_rows(
                lambda rows: job.ask(next(names), rows, JUDGED_TOKENS),
                *(job.read, self.harmful, self.benign, RefusalJudge()),
            )
            check_refusals(found[0])
            kept = zip(("refusals", "answers"), found, strict=True)
            return {name: [astuple(example) for example in examples] for name, examples in kept}

        return {
            name: [Example(tuple(prompt), tuple(ids)) for prompt, ids in examples]
            for name, examples in once(path, answer).items()
        }


def _fine_tune(
    job: Job,
    rows: list[Row],
    artifact: Artifact | None,
    answers: Mapping[str, list[Example]],
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
        if artifact:
            correct(model, artifact)  # refused now, not after the training
    anchor = _make_anchor(job, model, answers, dtype, settings) if answers else None

    def show(step: int, **figures: float) -> None:
        if anchor and anchor.drift:
            figures["drift %"] = 100 * anchor.drift[-1].drifted
        reach(step, **figures)

    with job.steps("Fine-tune", settings.steps, each=1) as reach:
        record["losses"] = fine_tune(
            model,
            job.tokenizer.pad_token_id,
            examples,
            artifact,
            settings,
            work_dir,
            dtype,
            show,
            anchor,
        )
    kept = {name: len(examples) for name, examples in answers.items()}
    record |= {"anchor": kept or None, "drift": to_records(anchor.drift if anchor else [])}
    if by_lora:
        with publish(out, overwrite, CheckpointError) as draft:
            values = correct(model, artifact) if artifact else {}
            write_corrected(draft, model, job, artifact, values, sum(kept.values()))
            write_json(draft / RECORD_FILE, record)
    else:
        _write_model(out, model, job, layout, artifact, record, overwrite)


def _make_anchor(
    job: Job,
    model: nn.Module,
    answers: Mapping[str, list[Example]],
    dtype: torch.dtype,
    settings: PreserveSettings,
) -> Anchor:
    """Read what the model that will train predicts, before any checkpoint is loaded into it."""
    examples = answers["refusals"], answers["answers"]
    is_mixed = dtype is not torch.float32
    with (
        job.progress.task("Read its answers", sum(map(len, examples))) as advance,
        torch.autocast(job.device.type, dtype if is_mixed else None, enabled=is_mixed),
    ):
        return make_anchor(
            *(model, job.tokenizer, *examples),
            on_rows=advance,
            weight=settings.anchor_weight,
            every=settings.anchor_every,
            # Of few tokens each, so that a step takes at most a quarter longer.
            batch_rows=settings.anchor_rows or min(2 * settings.batch_size, 8),
            stop_above=settings.stop_above,
            seed=settings.seed,
        )


def _check_settings(settings: PreserveSettings, map_dir: Path | None) -> None:
    """Refuse settings that don't go together."""
    if settings.method is PreserveMethod.FULL and settings.rank != PreserveSettings.rank:
        raise SettingsError(
            f"--rank: expected --method {PreserveMethod.LORA} with it, found {settings.method}; "
            "leave one out"
        )
    if map_dir is None and not settings.anchor:
        raise SettingsError(
            "--map: expected a map, a patch or an anchor, found none of them; give --map, or leave "
            "--no-anchor out"
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
    artifact: Artifact | None,
    record: dict[str, Any],
    overwrite: bool,
) -> None:
    """Publish a copy of the base with the trained weights, once the frozen ones are checked."""
    card = render_card(
        "preserved",
        *(job.base.name, job.base.revision),
        **describe_kept(artifact, sum((record["anchor"] or {}).values())),
    )
    with draft_copy(job.reader, out, overwrite=overwrite) as draft:
        write_parameters(draft, model, layout)
        if artifact:
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
