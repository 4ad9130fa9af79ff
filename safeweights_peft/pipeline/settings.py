"""What each job can be told; plain data, saved beside its results."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from safeweights_peft.selection import Aggregation
from safeweights_peft.training import EnhanceSettings


class Method(StrEnum):
    """How entries are selected: by ESI, or by a control with the same count."""

    ESI = "esi"
    RANDOM = "random"
    BOTTOM = "bottom"


@dataclass(frozen=True)
class ComputeSettings:
    """Where and in what precision to compute.

    Attributes:
        device: a torch device, or None for the accelerator where there is one.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        revision: branch, tag or commit of a base on the Hub.
    """

    device: str | None = None
    dtype: str = "auto"
    revision: str | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """How entries are scored and selected.

    The safety is that of refusals (neither `guard` nor `classifier` given), or of the model's own
    answers as a guard or a classifier sees it.

    Attributes:
        harmful: source of harmful requests.
        examples: at most so many of them.
        density: selected share of all parameters, in (0, 1].
        method: ESI or a control.
        batch_size: examples per forward pass.
        refusal_tokens: refusals are cut after so many tokens.
        seed: fixes which examples are taken, the noise of soft tokens, and the random control.
        guard: directory or Hub id of a guard model.
        profile: the guard's profile; see `selection.read_profile`.
        classifier: directory or Hub id of a sequence classifier.
        label: ``safe=LABEL`` or ``unsafe=LABEL``: what a label of the classifier means.
        answer_tokens: the model's own answers are cut after so many tokens.
        temperature: of the soft tokens.
        samples: draws of noise per answer.
        paper_exact: whether the guard's gradient is that of the published code, for comparison.
        aggregation: how the gradients of requests make one score.
        contrast: source of benign requests; entries that matter for the answers to them are left
            out. None leaves out nothing.
        contrast_density: share of all parameters that is left out so.
        layers_per_pass: layers scored together; fewer need less memory and more time. None is all.
    """

    harmful: str = "builtin:harmful_train"
    examples: int = 64
    density: float = 0.01
    method: Method = Method.ESI
    batch_size: int = 8
    refusal_tokens: int = 32
    seed: int = 0
    guard: str | None = None
    profile: str | None = None
    classifier: str | None = None
    label: str | None = None
    answer_tokens: int = 64
    temperature: float = 0.3
    samples: int = 4
    paper_exact: bool = False
    aggregation: Aggregation = Aggregation.ABS_OF_MEAN
    contrast: str | None = None
    contrast_density: float = 0.01
    layers_per_pass: int | None = None


@dataclass(frozen=True)
class TrainSettings:
    """How the selected entries are trained.

    Attributes:
        harmful: source of harmful requests, with refusals where the set has them.
        benign: source of benign requests.
        refusal_tokens: refusals are cut after so many tokens.
        answer_tokens: the base's answers to benign requests are cut after so many tokens.
        enhance: steps, rates, weights and seed of SET.
    """

    harmful: str = "builtin:harmful_train"
    benign: str = "builtin:benign_train"
    refusal_tokens: int = 8
    answer_tokens: int = 4
    enhance: EnhanceSettings = field(default_factory=EnhanceSettings)


@dataclass(frozen=True)
class ProbeSettings:
    """How entries are perturbed.

    Attributes:
        noise: size of the noise in standard deviations of the tensor, as in the reference settings
            of arXiv 2604.08297.
        draws: how many times noise, and random entries, are drawn.
        seed: fixes every draw; at least 0.
    """

    noise: float = 0.38
    draws: int = 5
    seed: int = 0


@dataclass(frozen=True)
class EvaluateSettings:
    """What a model is asked.

    Attributes:
        harmful: source of harmful requests.
        benign: source of benign requests.
        limit: at most so many of each, from the start; all if None.
        task: source of requests with answers, on which the loss is measured; none if None.
        max_new_tokens: answers are cut after so many tokens.
        batch_size: requests answered together.
        keep_answers: whether the result holds the answers' texts.
    """

    harmful: str = "builtin:harmful_eval"
    benign: str = "builtin:benign_eval"
    limit: int | None = None
    task: str | None = None
    max_new_tokens: int = 32
    batch_size: int = 25
    keep_answers: bool = False
