"""The scoring job: from a base and harmful requests to a safety map on disk."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from safeweights_peft.data import Example
from safeweights_peft.delta import Array
from safeweights_peft.errors import FormatError, SelectionError
from safeweights_peft.evaluation.generate import find_end_tokens
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs.job import Job, identify
from safeweights_peft.jobs.scoring import Scoring
from safeweights_peft.modeling.layout import eligible_parameters, total_parameters
from safeweights_peft.modeling.loading import (
    build_empty,
    load_classifier,
    load_model,
    load_tokenizer,
)
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.io import write_map
from safeweights_peft.selection.fisher import ANSWER_TOKENS
from safeweights_peft.selection.groups import find_longest, make_ranking
from safeweights_peft.selection.guards import read_profile
from safeweights_peft.selection.objective import (
    Answered,
    JudgedObjective,
    ReferenceObjective,
    SafetyObjective,
)
from safeweights_peft.selection.scores import (
    SCORES,
    Reads,
    build_map,
    score_entries,
)
from safeweights_peft.selection.soft_judges import ClassifierJudge, GuardJudge, SoftJudge
from safeweights_peft.selection.topk import Selected
from safeweights_peft.settings import Aggregation, Granularity, Method, ScoreSettings, TrainSettings
from safeweights_peft.sources import Row, data_digest, read_refusals, read_rows
from safeweights_peft.training.finetune import find_linear
from safeweights_peft.training.movement import measure_movement

EXAMPLES = 64  # harmful requests, where the gradient of each is summed
# Nothing shrinks: of a LoRA's two factors one starts at random values, which would be taken away.
MOVEMENT = TrainSettings(step_gain=0.3, shrink=0.0)


def score(
    job: Job, out: Path, settings: ScoreSettings | None = None, *, overwrite: bool = False
) -> SafetyMap:
    """Select the entries that carry safety, and write them as a safety map."""
    settings, started = settings or ScoreSettings(), time.perf_counter()
    inputs = read_inputs(settings)
    harmful, contrast, benign, judges = inputs
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
    if benign:
        selection["benign_digest"] = data_digest(benign)
    identity = {
        **selection,
        **asdict(job.compute),
        "judges": [identify(judge) for judge in judges],
        "profile": asdict(read_profile(settings.profile)) if settings.profile else None,
        "contrast_digest": data_digest(contrast),
    }
    with job.work(out, identity, overwrite) as work_dir:
        if kind.needs_gradient:
            scoring = Scoring(job, settings, work_dir)
            excluded: dict[str, Array] = {}
            if contrast:
                usefulness = _build_usefulness(job, contrast, settings)
                useful = scoring.select("usefulness", usefulness, excluded_count)
                excluded = {name: entries.indices for name, entries in useful.items()}
            safety = build_safety(job, harmful, settings)
            drawn = _draw_answers(job, benign, settings) if benign else []
            grain = settings.granularity
            selected = scoring.select("safety", safety, count, kind, excluded, grain, drawn)
            if isinstance(safety, JudgedObjective):
                selection["mean_safety"] = safety.mean_safety
        else:
            selected = _select_without_gradient(job, settings, inputs, count, work_dir)
        selection["seconds"] = round(time.perf_counter() - started, 1)
        safety_map = build_map(job.model, job.base, selected, selection, job.layout)
        write_map(out, safety_map, overwrite=overwrite)
    return safety_map


def _select_without_gradient(
    job: Job, settings: ScoreSettings, inputs: Inputs, count: int, work_dir: Path
) -> dict[str, Selected]:
    """Select by a score of the weights alone, or of what training does to them."""
    parameters = eligible_parameters(job.model)
    if SCORES[settings.method].reads is not Reads.CHANGE:
        return _rank(settings, count, parameters)
    moved = {f"{name}.weight" for name in find_linear(job.model)[0]}
    parameters = {name: weight for name, weight in parameters.items() if name in moved}
    if count > (most := sum(map(torch.numel, parameters.values()))):
        raise SelectionError(
            f"--density: expected at most {most} entries, those of layers that LoRA moves, found "
            f"{count}; lower it, or choose --method fisher"
        )
    recipe = replace(MOVEMENT, steps=settings.movement_steps, seed=settings.seed)
    harmful = job.chat.encode_rows(inputs.harmful, recipe.refusal_tokens)
    benign = job.ask("the base benign", inputs.benign, recipe.answer_tokens)
    with (
        job.steps("Train a LoRA", recipe.steps, each=1) as reach,
        measure_movement(
            *(job.model, job.tokenizer, harmful, benign, recipe, work_dir, reach, job.progress)
        ) as changes,
    ):
        return _rank(settings, count, parameters, changes)


def _rank(
    settings: ScoreSettings,
    count: int,
    parameters: Mapping[str, torch.nn.Parameter],
    changes: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, Selected]:
    kind, grain = SCORES[settings.method], settings.granularity
    best = make_ranking(count, sum(map(torch.numel, parameters.values())), grain, kind.order)
    for name, scores in score_entries(kind, parameters, changes, settings.seed, granularity=grain):
        best.add(name, scores)
    return best.result()


class Inputs(NamedTuple):
    """What scoring reads beside the base."""

    harmful: list[Row]
    contrast: list[Row]
    benign: list[Row]
    judges: list[BaseModel]


def read_inputs(settings: ScoreSettings) -> Inputs:
    """Refuse settings that don't go together; read requests, and find the judges."""
    _check_settings(settings)
    contrast, benign = [], []
    if settings.contrast:
        contrast = _sample(read_rows(settings.contrast), _count_examples(settings), settings.seed)
    if uses_benign(settings):
        benign = _sample(read_rows(settings.benign), settings.benign_examples, settings.seed)
    return Inputs(sample_rows(settings), contrast, benign, find_judges(settings))


def uses_benign(settings: ScoreSettings) -> bool:
    """Find whether a score reads benign requests."""
    return SCORES[settings.method].reads in (Reads.HARM, Reads.CHANGE)


def requests_of(settings: ScoreSettings, inputs: Inputs) -> tuple[list[Row], list[Row]]:
    """List the requests that the base is to answer, and those that it reads with an answer."""
    has_judge = bool(inputs.judges)
    asked = inputs.contrast + inputs.benign + (inputs.harmful if has_judge else [])
    return asked, [] if has_judge else inputs.harmful


def check_base(job: Job, settings: ScoreSettings) -> tuple[int, int]:
    """Check that a base can be scored so; count the entries to select, and to exclude before."""
    # All from headers: a base that can't be patched on disk, a density of nothing, or a judge
    # without the label are refused before weights are loaded.
    shapes = [record.shape for record in job.layout.values()]
    counts = _count_entries(shapes, total_parameters(job.empty), settings)
    if settings.guard or settings.classifier:
        _load_judge(job, settings, without_weights=True)
    return counts


def sample_rows(settings: ScoreSettings) -> list[Row]:
    """Draw the harmful requests to score with."""
    return _sample(read_refusals(settings.harmful), _count_examples(settings), settings.seed)


def _count_examples(settings: ScoreSettings) -> int | None:
    """Count the harmful requests to draw; None is all, of which a training repeats none so soon."""
    is_trained = SCORES[settings.method].reads is Reads.CHANGE
    return settings.examples or (None if is_trained else EXAMPLES)


def _sample(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    return random.Random(seed).sample(rows, min(count or len(rows), len(rows)))


def _name_objective(settings: ScoreSettings) -> str:
    if settings.guard:
        return "guard"
    return "classifier" if settings.classifier else "reference"


def _count_entries(
    shapes: Sequence[tuple[int, ...]], total: int, settings: ScoreSettings
) -> tuple[int, int]:
    excluded = round(settings.contrast_density * total) if settings.contrast else 0
    is_plain = settings.method is Method.ESI and settings.granularity is Granularity.ENTRY
    if settings.contrast and (not is_plain or excluded < 1):
        raise SelectionError(
            f"--contrast: expected --method esi, --granularity entry and a --contrast-density of "
            f"at least one entry, found {settings.method}, {settings.granularity} and {excluded} "
            "entries; leave --contrast out, or correct them"
        )
    count, most = round(settings.density * total), sum(map(math.prod, shapes)) - excluded
    if not 1 <= count <= most:
        raise SelectionError(
            f"--density: expected 1 to {most} entries of {total} (the eligible ones), "
            f"found {count}; choose a density of at most {most / total:.3f}"
        )
    if count < (longest := find_longest(shapes, settings.granularity)):
        raise SelectionError(
            f"--density: expected room for the longest {settings.granularity}, {longest} entries "
            f"of {total}, found {count}; choose a density of at least "
            f"{math.ceil(1e6 * longest / total) / 1e6:g}, or --granularity entry"
        )
    return count, excluded


def _draw_answers(job: Job, rows: Sequence[Row], settings: ScoreSettings) -> list[Example]:
    """Draw the base's answers to benign requests, at temperature 1."""
    size = settings.batch_size
    return job.ask("benign", rows, ANSWER_TOKENS, size, seed=settings.seed)


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
    reads = SCORES[settings.method].reads
    is_trained = reads is Reads.CHANGE
    for name, fits, methods in (
        ("benign_examples", uses_benign(settings), "fisher or movement"),
        ("movement_steps", is_trained, "movement"),
    ):
        if not fits and getattr(settings, name) != getattr(ScoreSettings, name):
            raise SelectionError(
                f"--{name.replace('_', '-')}: expected --method {methods} with it, found "
                f"{settings.method}; leave it out"
            )
    if is_trained and settings.layers_per_pass:
        raise SelectionError(
            f"--layers-per-pass: expected another method than {settings.method}, which trains "
            "all layers at once; leave it out"
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
            f"{settings.method}, which asks nobody; give --method esi, or leave the judge out"
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
