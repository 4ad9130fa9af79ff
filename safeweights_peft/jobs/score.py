"""The scoring job: from a base and harmful requests to a safety map on disk."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from safeweights_peft.data import Example
from safeweights_peft.delta import Array
from safeweights_peft.errors import FormatError, SelectionError
from safeweights_peft.evaluation.generate import find_end_tokens
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs.job import Job, identify, load_arrays, save_arrays
from safeweights_peft.modeling.layout import eligible_parameters, total_parameters
from safeweights_peft.modeling.loading import (
    build_empty,
    load_classifier,
    load_model,
    load_tokenizer,
)
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.io import write_map
from safeweights_peft.selection.guards import read_profile
from safeweights_peft.selection.objective import (
    Answered,
    JudgedObjective,
    ReferenceObjective,
    SafetyObjective,
)
from safeweights_peft.selection.scores import (
    SCORES,
    GradientSum,
    Score,
    build_map,
    score_entries,
    split_by_layer,
    sum_gradients,
)
from safeweights_peft.selection.soft_judges import ClassifierJudge, GuardJudge, SoftJudge
from safeweights_peft.selection.topk import Order, Selected, TopK, select
from safeweights_peft.settings import Aggregation, Method, ScoreSettings
from safeweights_peft.sources import Row, data_digest, read_refusals, read_rows

SAVE_SECONDS = 60  # between saves of the sum of gradients, which is as large as the scored weights


def score(
    job: Job, out: Path, settings: ScoreSettings | None = None, *, overwrite: bool = False
) -> SafetyMap:
    """Select the entries that carry safety, and write them as a safety map."""
    settings, started = settings or ScoreSettings(), time.perf_counter()
    inputs = read_inputs(settings)
    harmful, benign, judges = inputs
    places = {f"the judge {judge.name}": judge.path for judge in judges}
    job.check(
        *requests_of(settings, inputs),
        out=out,
        inputs=places,
        overwrite=overwrite,
        error=FormatError,
    )
    count, excluded_count = check_base(job, settings)
    kind = SCORES[settings.method]
    selection = asdict(settings) | {
        "objective": _name_objective(settings) if kind.needs_gradient else None,
        "total_parameters": total_parameters(job.empty),
        "data_digest": data_digest(harmful),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    identity = {
        **selection,
        **asdict(job.compute),
        "judges": [identify(judge) for judge in judges],
        "profile": asdict(read_profile(settings.profile)) if settings.profile else None,
        "contrast_digest": data_digest(benign),
    }
    with job.work(out, identity, overwrite) as work_dir:
        if kind.needs_gradient:
            scoring = Scoring(job, settings, work_dir)
            excluded: dict[str, Array] = {}
            if benign:
                usefulness = _build_usefulness(job, benign, settings)
                useful = scoring.select("usefulness", usefulness, excluded_count)
                excluded = {name: entries.indices for name, entries in useful.items()}
            safety = build_safety(job, harmful, settings)
            selected = scoring.select("safety", safety, count, kind, excluded)
            if isinstance(safety, JudgedObjective):
                selection["mean_safety"] = safety.mean_safety
        else:
            parameters = eligible_parameters(job.model)
            scores = score_entries(kind, parameters, {}, settings.seed)
            selected = select(scores, count, kind.order)
        selection["seconds"] = round(time.perf_counter() - started, 1)
        safety_map = build_map(job.model, job.base, selected, selection, job.layout)
        write_map(out, safety_map, overwrite=overwrite)
    return safety_map


class Inputs(NamedTuple):
    """What scoring reads beside the base."""

    harmful: list[Row]
    benign: list[Row]
    judges: list[BaseModel]


def read_inputs(settings: ScoreSettings) -> Inputs:
    """Refuse settings that don't go together; read requests, and find the judges."""
    _check_settings(settings)
    benign = _sample(read_rows(settings.contrast), settings) if settings.contrast else []
    return Inputs(sample_rows(settings), benign, find_judges(settings))


def requests_of(settings: ScoreSettings, inputs: Inputs) -> tuple[list[Row], list[Row]]:
    """List the requests that the base is to answer, and those that it reads with an answer."""
    has_judge = bool(inputs.judges)
    asked = inputs.benign + (inputs.harmful if has_judge else [])
    return asked, [] if has_judge else inputs.harmful


def check_base(job: Job, settings: ScoreSettings) -> tuple[int, int]:
    """Check that a base can be scored so; count the entries to select, and to exclude before."""
    # All from headers: a base that can't be patched on disk, a density of nothing, or a judge
    # without the label are refused before weights are loaded.
    sizes = [record.numel for record in job.layout.values()]
    counts = _count_entries(sum(sizes), total_parameters(job.empty), settings)
    if settings.guard or settings.classifier:
        _load_judge(job, settings, without_weights=True)
    return counts


def sample_rows(settings: ScoreSettings) -> list[Row]:
    """Draw the harmful requests to score with."""
    return _sample(read_refusals(settings.harmful), settings)


def _sample(rows: list[Row], settings: ScoreSettings) -> list[Row]:
    return random.Random(settings.seed).sample(rows, min(settings.examples, len(rows)))


def _name_objective(settings: ScoreSettings) -> str:
    if settings.guard:
        return "guard"
    return "classifier" if settings.classifier else "reference"


def _count_entries(eligible: int, total: int, settings: ScoreSettings) -> tuple[int, int]:
    excluded = round(settings.contrast_density * total) if settings.contrast else 0
    if settings.contrast and (settings.method is not Method.ESI or excluded < 1):
        raise SelectionError(
            f"--contrast: expected --method esi and a --contrast-density of at least one entry, "
            f"found {settings.method} and {excluded} entries; leave --contrast out, or correct them"
        )
    count, most = round(settings.density * total), eligible - excluded
    if not 1 <= count <= most:
        raise SelectionError(
            f"--density: expected 1 to {most} entries of {total} (the eligible ones), "
            f"found {count}; choose a density of at most {most / total:.3f}"
        )
    return count, excluded


class Scoring:
    """Scores of one model's entries, streamed into selections; an interrupted one resumes."""

    def __init__(self, job: Job, settings: ScoreSettings, work_dir: Path) -> None:
        self._job, self._settings, self._work_dir = job, settings, work_dir
        self._parameters = eligible_parameters(job.model)

    def select(
        self,
        what: str,
        objective: SafetyObjective,
        count: int,
        kind: Score = SCORES[Method.ESI],
        excluded: Mapping[str, Array] = MappingProxyType({}),
    ) -> dict[str, Selected]:
        """Score all entries pass by pass, and keep the first `count`."""
        passes = split_by_layer(self._parameters, self._settings.layers_per_pass)
        best, path = TopK(count, kind.order), self._work_dir / f"{what}.safetensors"
        arrays = load_arrays(path) or {"passes": np.zeros(1, np.int64)}
        done = int(arrays.pop("passes")[0])
        if done:
            best.restore(arrays)
        with self._job.steps(f"Score {what}", len(objective) * len(passes)) as reach:
            for number in range(done, len(passes)):
                group = {name: self._parameters[name] for name in passes[number]}
                sum_path = self._work_dir / f"{what}-gradients-{number}.safetensors"
                first = number * len(objective)
                gradients = self._sum_gradients(group, objective, sum_path, reach, first)
                for name, scores in score_entries(kind, group, gradients, self._settings.seed):
                    best.add(name, scores, excluded.get(name))
                # The next pass's sum is as large: two would not fit where one just does.
                del gradients
                save_arrays(path, best.state() | {"passes": np.array([number + 1])})
                sum_path.unlink(missing_ok=True)
        selected = best.result()
        if kind.order is Order.TOP and not any(part.scores.any() for part in selected.values()):
            raise SelectionError(
                f"{what}: expected weights on which it depends, found none: every score is 0; "
                "check the objective and the model"
            )
        return selected

    def _sum_gradients(
        self,
        group: Mapping[str, torch.nn.Parameter],
        objective: SafetyObjective,
        path: Path,
        reach: Callable[[int], None],
        first: int,
    ) -> dict[str, torch.Tensor]:
        """Sum one pass's gradients; save the sum now and then, and resume from what was saved."""
        saved, saved_at = None, time.monotonic()
        if arrays := load_arrays(path):
            gradients = {
                name: torch.from_numpy(arrays[name]).to(parameter.device)
                for name, parameter in group.items()
            }
            saved = GradientSum(gradients, int(arrays["terms"][0]))

        def on_term(total: GradientSum) -> None:
            nonlocal saved_at
            reach(first + total.terms)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                arrays = {name: to_numpy(tensor) for name, tensor in total.gradients.items()}
                save_arrays(path, arrays | {"terms": np.array([total.terms])})
                saved_at = time.monotonic()

        return sum_gradients(
            self._job.model,
            group,
            objective,
            on_term,
            aggregation=self._settings.aggregation,
            resume_from=saved,
        )


def build_safety(job: Job, rows: Sequence[Row], settings: ScoreSettings) -> SafetyObjective:
    """Build the safety that is differentiated: the likelihood of refusals, or a judge's opinion."""
    if settings.guard is None and settings.classifier is None:
        examples = job.chat.encode_rows(rows, settings.refusal_tokens)
        return ReferenceObjective(examples, job.tokenizer.pad_token_id, _term_size(settings))
    # Loaded first: a judge that can't be used is refused before the base is asked.
    build = _load_judge(job, settings)
    answers = job.ask("harmful", rows, settings.answer_tokens, settings.batch_size)
    ends = find_end_tokens(job.model, job.tokenizer)
    answered = []
    for row, answer in zip(rows, answers, strict=True):
        # The token that ends a turn is no part of what a judge reads.
        has_end = answer.answer_ids[-1] in ends
        ids = answer.answer_ids[:-1] if has_end else answer.answer_ids
        answered.append(Answered(row.instruction, Example(answer.prompt_ids, ids)))
    return build(answered)


def _build_usefulness(job: Job, rows: Sequence[Row], settings: ScoreSettings) -> SafetyObjective:
    """Build what safety is contrasted with: the likelihood of the base's own benign answers."""
    answers = job.ask("benign", rows, settings.answer_tokens, settings.batch_size)
    return ReferenceObjective(answers, job.tokenizer.pad_token_id, _term_size(settings))


def _term_size(settings: ScoreSettings) -> int:
    # Absolute values are taken of each term's gradient, so then a request is a term.
    return 1 if settings.aggregation is Aggregation.MEAN_OF_ABS else settings.batch_size


def _check_settings(settings: ScoreSettings) -> None:
    """Refuse settings that don't go together."""
    if not settings.contrast and settings.contrast_density != ScoreSettings.contrast_density:
        raise SelectionError(
            "--contrast-density: expected --contrast with it, found none; give benign requests"
        )
    if settings.guard and settings.classifier:
        raise SelectionError("--guard: expected one judge, found --classifier too; choose one")
    for judge, name, detail in (
        (settings.guard, "guard-profile", settings.profile),
        (settings.classifier, "classifier-label", settings.label),
    ):
        if bool(judge) != bool(detail):
            given, missing = (name, name.split("-")[0]) if detail else (name.split("-")[0], name)
            raise SelectionError(f"--{given}: expected --{missing} with it, found none; give both")
    has_judge = bool(settings.guard or settings.classifier)
    if has_judge and not SCORES[settings.method].needs_gradient:
        methods = " or ".join(method for method, score in SCORES.items() if score.needs_gradient)
        raise SelectionError(
            f"--{_name_objective(settings)}: expected --method {methods} with it, found "
            f"{settings.method}, which asks nobody; leave one out"
        )
    for name in ("temperature", "samples"):
        if not has_judge and getattr(settings, name) != getattr(ScoreSettings, name):
            raise SelectionError(
                f"--{name}: expected --guard or --classifier with it, found neither; name the judge"
            )
    if settings.guard:
        read_profile(settings.profile or "")
    if settings.classifier:
        _parse_label(settings.label or "")


def find_judges(settings: ScoreSettings) -> list[BaseModel]:
    """Find the models beside the base that a scoring job reads."""
    return [resolve_base(name) for name in (settings.guard, settings.classifier) if name]


def _load_judge(
    job: Job, settings: ScoreSettings, *, without_weights: bool = False
) -> Callable[[Sequence[Answered]], SafetyObjective]:
    """Load the guard or the classifier; what it returns makes an objective of answers."""
    (source,) = find_judges(settings)
    tokenizer = load_tokenizer(source)
    if without_weights:
        model = build_empty(source, is_classifier=not settings.guard)
    else:
        load = load_model if settings.guard else load_classifier
        model = load(source, job.dtype, job.device)
    judge: SoftJudge
    if settings.guard:
        judge = GuardJudge(model, tokenizer, job.tokenizer, read_profile(settings.profile or ""))
    else:
        is_safe, label = _parse_label(settings.label or "")
        judge = ClassifierJudge(model, tokenizer, job.tokenizer, label, is_safe)
    return partial(
        JudgedObjective,
        judge,
        pad_token_id=job.tokenizer.pad_token_id,
        batch_size=_term_size(settings),
        temperature=settings.temperature,
        samples=settings.samples,
        seed=settings.seed,
    )


def _parse_label(label: str) -> tuple[bool, str]:
    """Read "safe=LABEL" or "unsafe=LABEL"; return whether the label means safe, and its name."""
    meaning, _, name = label.partition("=")
    if meaning not in {"safe", "unsafe"} or not name:
        raise SelectionError(
            f"--classifier-label: expected safe=LABEL or unsafe=LABEL, found {label!r}; say what a "
            "label of the classifier means"
        )
    return meaning == "safe", name
