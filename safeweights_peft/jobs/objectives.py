"""What a scoring job differentiates, built from its settings, requests and judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from safeweights_peft.data import Example, Row, encode_rows
from safeweights_peft.errors import SelectionError
from safeweights_peft.evaluation.generate import end_token_ids
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs.job import Job
from safeweights_peft.modeling.loading import load_classifier, load_model, load_tokenizer
from safeweights_peft.selection.guards import read_profile
from safeweights_peft.selection.objective import (
    Answered,
    JudgedObjective,
    ReferenceObjective,
    SafetyObjective,
)
from safeweights_peft.selection.scores import SCORES
from safeweights_peft.selection.soft_judges import ClassifierJudge, GuardJudge, SoftJudge
from safeweights_peft.settings import Aggregation, ScoreSettings


def build_safety(job: Job, rows: Sequence[Row], settings: ScoreSettings) -> SafetyObjective:
    """Build the safety of the base's answers to harmful requests."""
    if settings.guard is None and settings.classifier is None:
        return _build_reference(
            job,
            encode_rows(job.tokenizer, rows, settings.refusal_tokens),
            settings,
        )
    build = _load_judge(job, settings)  # refused now, not after the answers
    requests = [row.instruction for row in rows]
    answers = job.ask("harmful", requests, settings.answer_tokens, settings.batch_size)
    ends = end_token_ids(job.model, job.tokenizer)
    return build(
        [
            Answered(request, Example(answer.prompt_ids, _without_end(answer.answer_ids, ends)))
            for request, answer in zip(requests, answers, strict=True)
        ]
    )


def build_usefulness(job: Job, rows: Sequence[Row], settings: ScoreSettings) -> SafetyObjective:
    """Build what safety is contrasted with: the likelihood of the base's own benign answers."""
    requests = [row.instruction for row in rows]
    answers = job.ask("benign", requests, settings.answer_tokens, settings.batch_size)
    return _build_reference(job, answers, settings)


def _build_reference(
    job: Job, examples: Sequence[Example], settings: ScoreSettings
) -> SafetyObjective:
    return ReferenceObjective(examples, job.tokenizer.pad_token_id, _term_size(settings))


def _term_size(settings: ScoreSettings) -> int:
    """Count the requests of one term: absolute values are taken of each term's gradient."""
    return 1 if settings.aggregation is Aggregation.MEAN_OF_ABS else settings.batch_size


def check_judges(settings: ScoreSettings) -> None:
    """Refuse settings of judges that don't go together."""
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
            f"--{'guard' if settings.guard else 'classifier'}: expected --method {methods} with "
            f"it, found {settings.method}, which asks nobody; leave one out"
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
    job: Job, settings: ScoreSettings
) -> Callable[[Sequence[Answered]], SafetyObjective]:
    """Load the guard or the classifier; what it returns makes an objective of answers."""
    (source,) = find_judges(settings)
    load = load_model if settings.guard else load_classifier
    model, tokenizer = load(source, job.dtype, job.device), load_tokenizer(source)
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
    meaning, _, name = label.partition("=")
    if meaning not in {"safe", "unsafe"} or not name:
        raise SelectionError(
            f"--classifier-label: expected safe=LABEL or unsafe=LABEL, found {label!r}; say what a "
            "label of the classifier means"
        )
    return meaning == "safe", name


def _without_end(answer_ids: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    # The token that ends a turn is no part of what a judge reads.
    return answer_ids[:-1] if answer_ids[-1] in ends else answer_ids
