"""The jobs as functions, named as the commands are; a base is a path, a Hub id, or in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.evaluation.judge_kinds import AnyJudge
from safeweights_peft.files import PathLike
from safeweights_peft.jobs import enhance as enhancing
from safeweights_peft.jobs import evaluate as evaluating
from safeweights_peft.jobs import repair as repairing
from safeweights_peft.jobs import score as scoring
from safeweights_peft.jobs import sweep as sweeping
from safeweights_peft.jobs import train as training
from safeweights_peft.jobs.job import Job
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.progress import Progress
from safeweights_peft.scales import REPAIR_STEPS
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)

Base: TypeAlias = str | os.PathLike[str] | PreTrainedModel
"""A model: directory, Hub id, or one that was loaded from either; then with its tokenizer."""


def score(
    base: Base,
    out: PathLike,
    settings: ScoreSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> SafetyMap:
    """Find the weights of a model that carry its safety, and write them as a safety map.

    By default those that a short training moves most, after arXiv 2110.07560; with
    ``ScoreSettings(method="esi")`` by Expected Safety Impact: arXiv 2604.08297, equation 3. An
    interrupted call resumes.

    Args:
        base: Directory, Hub id, or a causal language model that was loaded from either, whose
            weights are left as they are.
        out: Directory to write.
        settings: How weights are scored and selected.
        tokenizer: The tokenizer of a model in memory.
        compute: Device, dtype and revision of a base that is loaded.
        progress: What shows progress, such as `RichProgress`.
        overwrite: Whether an existing result is replaced.

    Returns:
        The map.

    Raises:
        SafeWeightsError: Something is wrong with the base, the settings or the target.

    Example:
        >>> from safeweights_peft import ScoreSettings, score
        >>> settings = ScoreSettings(examples=4, density=0.1)
        >>> safety_map = score("demo/base", "map", settings)
        >>> sum(indices.size for indices in safety_map.indices.values())
        2381
    """
    with _borrow(base):
        job = Job(base, compute, progress, tokenizer=tokenizer)
        return scoring.score(job, Path(out), settings, overwrite=overwrite)


def train(
    base: Base,
    map: PathLike,
    out: PathLike,
    settings: TrainSettings | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the weights of a safety map to refuse, and write them as a safety patch.

    Safety Enhancement Tuning: arXiv 2604.08297, section 3.2, with a retain loss on benign answers.
    An interrupted call resumes.

    Args:
        base: The model that the map was made for.
        map: Directory of the map.
        out: Directory to write.
        settings: How the weights are trained.
        tokenizer: The tokenizer of a model in memory.
        compute: Device, dtype and revision of a base that is loaded.
        progress: What shows progress, such as `RichProgress`.
        overwrite: Whether an existing result is replaced.

    Returns:
        The record of the training, with the losses of each step.

    Raises:
        SafeWeightsError: Something is wrong with the base, the map, the settings or the target.

    Example:
        >>> from safeweights_peft import TrainSettings, train
        >>> settings = TrainSettings(steps=2, harmful_batch_size=1, benign_batch_size=1)
        >>> record = train("demo/base", "demo/run/map", "patch", settings)
        >>> [loss["step"] for loss in record["losses"]]
        [1, 2]
    """
    with _borrow(base):
        job = Job(base, compute, progress, [Path(map)], tokenizer)
        return training.train(job, Path(map), Path(out), settings, overwrite=overwrite)


def evaluate(
    base: Base,
    adapter: PathLike | None = None,
    settings: EvaluateSettings | None = None,
    *,
    judges: Sequence[AnyJudge] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure how often a model refuses, with an adapter or without, and what the adapter costs.



    Args:
        base: The model.
        adapter: Directory of a safety patch or a LoRA; the base alone if None.
        settings: What the model is asked, and where its answers are cut.
        judges: Functions (request, answer) -> `Verdict`, `Judge` objects, or names as the command
            line takes them; the first decides the rates. The judges of ``settings`` if empty.
        tokenizer: The tokenizer of a model in memory.
        compute: Device, dtype and revision of a base that is loaded.
        progress: What shows progress, such as `RichProgress`.

    Returns:
        Rates with 95 % intervals, KL to the base (nats per token), perplexity, verdicts.

    Raises:
        SafeWeightsError: Something is wrong with the base, the adapter or the settings.

    Example:
        >>> from safeweights_peft import EvaluateSettings, Verdict, evaluate
        >>> def says_no(request, answer):
        ...     return Verdict.REFUSED if "no" in answer else Verdict.COMPLIED
        >>> settings = EvaluateSettings(limit=2, max_new_tokens=4)
        >>> result = evaluate("demo/base", settings=settings, judges=[says_no, "refusals"])
        >>> result["harmful"]["n"], result["utility"]["kl"]
        (2, 0.0)
    """
    folder = None if adapter is None else Path(adapter)
    with _borrow(base):
        job = Job(base, compute, progress, [folder] if folder else [], tokenizer)
        return evaluating.evaluate(job, folder, settings, judges)


def sweep(
    base: Base,
    patch: PathLike,
    out: PathLike,
    settings: EvaluateSettings | None = None,
    *,
    max_asr: float | None = None,
    max_over_refusal: float | None = None,
    judges: Sequence[AnyJudge] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure a patch at scales from 0 to 1.5, and pick the one that meets a threshold.

    Args:
        base: The model.
        patch: Directory of a safety patch.
        out: Directory to write.
        settings: What the model is asked, and where its answers are cut.
        max_asr: Pick the smallest scale at which the attack success rate is at most that.
        max_over_refusal: Pick among scales at which over-refusal is at most that.
        judges: As `evaluate` takes them.
        tokenizer: The tokenizer of a model in memory.
        compute: Device, dtype and revision of a base that is loaded.
        progress: What shows progress, such as `RichProgress`.
        overwrite: Whether an existing result is replaced.

    Returns:
        The figures at each scale, and the scale that was picked.

    Raises:
        SafeWeightsError: Something is wrong with the base, the patch or the settings.

    Example:
        >>> from safeweights_peft import EvaluateSettings, sweep
        >>> settings = EvaluateSettings(limit=1, max_new_tokens=2)
        >>> result = sweep("demo/base", "demo/run/patch", "sweep", settings)
        >>> result["rows"][0]["scale"]
        0.0
    """
    with _borrow(base):
        job = Job(base, compute, progress, [Path(patch)], tokenizer)
        return sweeping.sweep(
            *(job, Path(patch), Path(out), settings),
            max_asr=max_asr,
            max_over_refusal=max_over_refusal,
            judges=judges,
            overwrite=overwrite,
        )


def enhance(
    base: Base,
    out: PathLike,
    settings: RunSettings | None = None,
    *,
    max_asr: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a model safer: evaluate, score, train, evaluate again, each step left in ``out``.

    An interrupted call with the same settings resumes.

    Args:
        base: The model.
        out: Directory of the run.
        settings: The settings of all steps; its own ``base`` is not read.
        max_asr: Name the smallest scale of the patch at which the ASR is at most that.
        tokenizer: The tokenizer of a model in memory.
        progress: What shows progress, such as `RichProgress`.

    Returns:
        Figures before and after, the outcome in words, and where the patch is.

    Raises:
        SafeWeightsError: Something is wrong with the base, the settings or the target.

    Example:
        >>> from safeweights_peft import EvaluateSettings, RunSettings, TrainSettings, enhance
        >>> from safeweights_peft import ScoreSettings
        >>> settings = RunSettings(
        ...     score=ScoreSettings(examples=4, density=0.1),
        ...     train=TrainSettings(steps=2, harmful_batch_size=1, benign_batch_size=1),
        ...     evaluate=EvaluateSettings(limit=2, max_new_tokens=4),
        ... )
        >>> result = enhance("demo/base", "run", settings)
        >>> result["patch"]["path"]
        'run/patch'
    """
    settings = settings or RunSettings()
    with _borrow(base):
        job = Job(base, settings.compute, progress, tokenizer=tokenizer)
        settings = replace(settings, base=job.base.name)
        return enhancing.enhance(settings, Path(out), max_asr=max_asr, job=job)


def repair(
    tuned: Base,
    out: PathLike,
    settings: RunSettings | None = None,
    *,
    patch: PathLike | None = None,
    add_patch: float | None = None,
    base: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a fine-tuned model safe again by a short training, and measure what that does.

    Safety Enhancement Tuning on the tuned model, whose own benign answers are kept; the result is
    a patch for it. An interrupted call with the same settings resumes.

    Args:
        tuned: The model, or the directory of a LoRA, which is first merged into its base, as
            ``model`` in ``out``.
        out: Directory of the run.
        settings: The settings of all steps; its own ``base`` is not read. 30 steps if None.
        patch: Directory of the patch, or the map, of the model before tuning, whose entries are
            trained; those that `score` finds in the tuned model if None.
        add_patch: Add the patch's values at this scale, and train nothing (RESTA, arXiv
            2402.11746).
        base: The base of a LoRA; the one that it names if None.
        tokenizer: The tokenizer of a model in memory.
        progress: What shows progress, such as `RichProgress`.

    Returns:
        Figures before and after, the outcome in words, and where the patch is.

    Raises:
        SafeWeightsError: Something is wrong with the model, the patch, the settings or the target.

    Example:
        >>> from safeweights_peft import EvaluateSettings, RunSettings, TrainSettings, repair
        >>> settings = RunSettings(
        ...     train=TrainSettings(steps=2, harmful_batch_size=1, benign_batch_size=1),
        ...     evaluate=EvaluateSettings(limit=2, max_new_tokens=4),
        ... )
        >>> result = repair("demo/base", "repaired", settings, patch="demo/run/patch")
        >>> result["patch"]["path"]
        'repaired/patch'
    """
    settings = settings or RunSettings(train=TrainSettings(steps=REPAIR_STEPS))
    old, job, name = None if patch is None else Path(patch), None, str(tuned)
    with _borrow(tuned):
        if isinstance(tuned, PreTrainedModel):
            job = Job(tuned, settings.compute, progress, tokenizer=tokenizer)
            name = job.base.name
        settings = replace(settings, base=name)
        return repairing.repair(
            *(settings, Path(out), progress, old), add_patch=add_patch, base=base, job=job
        )


@contextmanager
def _borrow(base: Base) -> Iterator[None]:
    """Give a model in memory back as it was: which modules train, and which weights."""
    if not isinstance(base, PreTrainedModel):
        yield
        return
    training = [module for module in base.modules() if module.training]
    trained = [weight for weight in base.parameters() if weight.requires_grad]
    caches = getattr(base.config, "use_cache", None)  # which a Trainer switches off for good
    base.eval().requires_grad_(False)
    try:
        yield
    finally:
        base.eval()  # a training that broke off leaves it training
        base.config.use_cache = caches
        for module in training:
            module.training = True
        for weight in trained:
            weight.requires_grad_(True)
