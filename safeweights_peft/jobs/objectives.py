"""What a scoring job differentiates: built from its settings, its requests and other models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.data import Example, Row, encode_example
from safeweights_peft.errors import SelectionError
from safeweights_peft.evaluation.generate import end_token_ids, generate_answers
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs.progress import Progress
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


def safety_objective(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: ScoreSettings,
    dtype: torch.dtype | str,
    progress: Progress,
) -> SafetyObjective:
    """Build the safety that is differentiated."""
    check_judges(settings)
    if settings.guard is None and settings.classifier is None:
        examples = [
            encode_example(tokenizer, row.instruction, row.output or "", settings.refusal_tokens)
            for row in rows
        ]
        return ReferenceObjective(examples, tokenizer.pad_token_id, _term_size(settings))
    judged = _judge(tokenizer, settings, dtype, model.device)  # refused now, not after the answers
    requests = [row.instruction for row in rows]
    examples = _answers(model, tokenizer, requests, settings, "harmful", progress)
    ends = end_token_ids(model, tokenizer)
    return judged(
        [
            Answered(request, Example(example.prompt_ids, _without_end(example.answer_ids, ends)))
            for request, example in zip(requests, examples, strict=True)
        ]
    )


def utility_objective(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    settings: ScoreSettings,
    progress: Progress,
) -> SafetyObjective:
    """Build what safety is contrasted with: the likelihood of the model's own benign answers."""
    requests = [row.instruction for row in rows]
    examples = _answers(model, tokenizer, requests, settings, "benign", progress)
    return ReferenceObjective(examples, tokenizer.pad_token_id, _term_size(settings))


def _term_size(settings: ScoreSettings) -> int:
    """How many requests make one term, of which the gradient's size may be taken."""
    return 1 if settings.aggregation is Aggregation.MEAN_OF_ABS else settings.batch_size


def check_judges(settings: ScoreSettings) -> None:
    """Find settings of judges that don't go together."""
    if settings.guard and settings.classifier:
        raise SelectionError("--guard: expected one judge, found --classifier too; choose one")
    for judge, name, detail in (
        (settings.guard, "guard-profile", settings.profile),
        (settings.classifier, "classifier-label", settings.label),
    ):
        if bool(judge) != bool(detail):
            given, missing = (name, name.split("-")[0]) if detail else (name.split("-")[0], name)
            raise SelectionError(f"--{given}: expected --{missing} with it, found none; give both")
    judge_given = bool(settings.guard or settings.classifier)
    judge = "--guard" if settings.guard else "--classifier"
    if judge_given and not SCORES[settings.method].needs_gradient:
        methods = " or ".join(method for method, score in SCORES.items() if score.needs_gradient)
        raise SelectionError(
            f"{judge}: expected --method {methods} with it, found {settings.method}, which asks "
            "nobody; leave one out"
        )
    for name in ("temperature", "samples"):
        if not judge_given and getattr(settings, name) != getattr(ScoreSettings, name):
            raise SelectionError(
                f"--{name}: expected --guard or --classifier with it, found neither; name the judge"
            )
    if settings.guard:
        read_profile(settings.profile or "")
    if settings.classifier:
        _meaning(settings.label or "")


def _judge(
    tokenizer: PreTrainedTokenizerBase,
    settings: ScoreSettings,
    dtype: torch.dtype | str,
    device: torch.device,
) -> Callable[[Sequence[Answered]], SafetyObjective]:
    """Load the guard or the classifier; what it returns makes an objective of answers."""
    (found,) = judges_of(settings)
    load = load_model if settings.guard else load_classifier
    judge, own = load(found, dtype, device), load_tokenizer(found)
    scorer: SoftJudge
    if settings.guard:
        profile = read_profile(settings.profile or "")
        scorer = GuardJudge(judge, own, tokenizer, profile)
    else:
        is_safe, label = _meaning(settings.label or "")
        scorer = ClassifierJudge(judge, own, tokenizer, label, is_safe)
    return partial(
        JudgedObjective,
        scorer,
        pad_token_id=tokenizer.pad_token_id,
        batch_size=_term_size(settings),
        temperature=settings.temperature,
        samples=settings.samples,
        seed=settings.seed,
    )


def judges_of(settings: ScoreSettings) -> list[BaseModel]:
    """Find the models beside the base that a scoring job reads."""
    return [resolve_base(name) for name in (settings.guard, settings.classifier) if name]


def _meaning(label: str) -> tuple[bool, str]:
    meaning, _, name = label.partition("=")
    if meaning not in {"safe", "unsafe"} or not name:
        raise SelectionError(
            f"--classifier-label: expected safe=LABEL or unsafe=LABEL, found {label!r}; say what a "
            "label of the classifier means"
        )
    return meaning == "safe", name


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[str],
    settings: ScoreSettings,
    kind: str,
    progress: Progress,
) -> list[Example]:
    with progress.task(f"Asking {kind} requests", len(requests)) as advance:
        return generate_answers(
            model,
            tokenizer,
            requests,
            max_new_tokens=settings.answer_tokens,
            batch_size=settings.batch_size,
            on_batch=advance,
        )


def _without_end(answer_ids: tuple[int, ...], ends: frozenset[int]) -> tuple[int, ...]:
    """Leave out the token that ends the turn, which is no part of what a judge reads."""
    return answer_ids[:-1] if answer_ids[-1] in ends else answer_ids
