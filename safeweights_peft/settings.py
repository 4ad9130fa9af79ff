"""Every setting of every job, declared once: type, default, range and help.

The command line makes its options from these fields, records hold them, and a run leaves them in
``settings.json``, which ``--settings`` reads again. Batch sizes count requests, lengths tokens.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from safeweights_peft.errors import SettingsError
from safeweights_peft.schema import Settings, restore, setting

SOURCES = "builtin:NAME, a file, or a dataset ID[:CONFIG][:SPLIT]; #COLUMN names the column"
"""What requests may be read from, for help texts."""


def _requests(default: str | None, help: str, **option: Any) -> Any:
    return setting(default, f"{help}: {SOURCES}.", group="Data", **option)


def _judge(default: Any, help: str, **option: Any) -> Any:
    return setting(default, help, group="Judge", **option)


def _seed() -> Any:
    # Trainer gives it to numpy.random.seed, which takes no larger one.
    return setting(0, "Random seed.", least=0, most=2**32 - 1)


class Method(StrEnum):
    """What weights are selected by: a score, or a control with the same count."""

    ESI = "esi"
    FISHER = "fisher"
    RANDOM = "random"
    BOTTOM = "bottom"
    MAGNITUDE = "magnitude"
    MOVEMENT = "movement"


class Granularity(StrEnum):
    """What is selected: single weights, or whole rows or columns of matrices."""

    ENTRY = "entry"
    ROW = "row"
    COLUMN = "column"
    AUTO = "auto"


class Aggregation(StrEnum):
    """How the gradients of requests make one score."""

    ABS_OF_MEAN = "abs-of-mean"
    MEAN_OF_ABS = "mean-of-abs"


class PreserveMethod(StrEnum):
    """What `preserve` trains: all weights but the frozen ones, or a LoRA on linear layers."""

    FULL = "full"
    LORA = "lora"


@dataclass(frozen=True)
class ComputeSettings(Settings):
    """Where and in which dtype to compute.

    Example:
        >>> from safeweights_peft import ComputeSettings
        >>> ComputeSettings(dtype="bfloat16").device is None  # an accelerator if there is one
        True
    """

    heading = "Compute"

    device: str | None = setting(None, "torch device.", unset="an accelerator if there is one")
    dtype: str = setting(
        "auto",
        "Dtype to compute in; auto is float32 on a CPU, else the checkpoint's own.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    revision: str | None = setting(None, "Branch, tag or commit of BASE on the Hub.")
    trust_remote_code: bool = setting(False, "Run the code that comes with BASE; read it first.")
    system_prompt: str | None = setting(
        None, "System prompt before every request.", group="Chat", unset="the template's own"
    )
    chat_template: str | None = setting(
        None,
        'Chat template: a Jinja file, or "plain" for a base model.',
        group="Chat",
        unset="the tokenizer's own",
    )
    answer_prefix: str | None = setting(
        None,
        "Text after which answers begin, such as the end of a thought.",
        group="Chat",
        unset="closes a thought where the template has one",
    )


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """How weights are scored and selected.

    Safety is the likelihood of refusals or, with a guard or a classifier, its verdict on the
    model's own answers.

    Example:
        >>> from safeweights_peft import ScoreSettings
        >>> ScoreSettings(density=0.005).benign_examples
        256
    """

    heading = "Scoring"

    harmful: str = _requests("builtin:harmful_train", "Harmful requests to learn from")
    examples: int | None = setting(
        None,
        "Number of harmful requests to score with.",
        group="Data",
        least=1,
        unset="64; all with --method movement",
    )
    contrast: str | None = _requests(None, "Benign requests whose weights to exclude")
    benign: str = _requests(
        "builtin:benign_train",
        "Benign requests to keep answering as before",
        older="builtin:benign_train",
    )
    benign_examples: int = setting(
        256,
        "Number of benign requests to score with (with --method fisher or movement).",
        group="Data",
        least=1,
        older=256,
    )
    density: float = setting(0.0018, "Fraction of all weights to select.", above=0, most=1)
    method: Method = setting(
        Method.MOVEMENT, "Select by what a short training moves, by ESI, or by another score."
    )
    granularity: Granularity = setting(
        Granularity.ENTRY,
        "Select single weights, or whole rows or columns; auto takes the better for each matrix.",
        older=Granularity.ENTRY,
    )
    movement_steps: int = setting(
        100, "Train a rank-1 LoRA for N steps (with --method movement).", least=1, older=100
    )
    aggregation: Aggregation = setting(
        Aggregation.ABS_OF_MEAN, "Absolute value of the mean gradient, or mean of absolute values."
    )
    contrast_density: float = setting(
        0.01, "Fraction of weights to exclude (with --contrast).", above=0, most=1
    )
    refusal_tokens: int = setting(32, "Score the first N tokens of refusals.", least=1)
    batch_size: int = setting(8, "Requests per forward pass.", least=1)
    layers_per_pass: int | None = setting(
        None, "Score N layers at a time: less memory, more time.", least=1, unset="all"
    )
    seed: int = _seed()
    guard: str | None = _judge(
        None, "Guard model that judges the model's answers: directory or Hub id."
    )
    profile: str | None = _judge(
        None,
        "Prompt and labels of the guard: a built-in profile, such as wildguard, or a .json file.",
        flag="--guard-profile",
    )
    classifier: str | None = _judge(
        None, "Sequence classifier that judges instead of a guard: directory or Hub id."
    )
    label: str | None = _judge(
        None,
        "Meaning of a label of the classifier: safe=LABEL or unsafe=LABEL.",
        flag="--classifier-label",
    )
    answer_tokens: int = _judge(64, "Cut the model's answers after N tokens.", least=1)
    temperature: float = _judge(
        0.3, "Gumbel-softmax temperature (with --guard or --classifier).", above=0
    )
    samples: int = _judge(
        4, "Gumbel-softmax samples per answer (with --guard or --classifier).", least=1
    )


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How the selected weights are trained (SET).

    Example:
        >>> from safeweights_peft import TrainSettings
        >>> TrainSettings(learning_rate=5e-4).steps
        150
    """

    heading = "Training"

    harmful: str = _requests("builtin:harmful_train", "Harmful requests to learn from")
    benign: str = _requests("builtin:benign_train", "Benign requests to keep answering as before")
    boundary: str | None = _requests(
        None, "More benign requests, such as builtin:boundary_train, which look harmful"
    )
    boundary_fraction: float | None = setting(
        None,
        'Fraction of those of category "looks-harmful" among the benign requests of a step.',
        group="Data",
        above=0,
        most=1,
        unset="as they come",
    )
    steps: int = setting(150, "Optimizer steps.", least=1)
    learning_rate: float | None = setting(
        None,
        "Peak learning rate of AdamW, or auto: by --step-gain.",
        above=0,
        flag="--lr",
        word="auto",
    )
    step_gain: float = setting(
        0.8,
        "Likelihood of refusals that one step gains, to first order, in nats (with --lr auto).",
        above=0,
        older=0.8,
    )
    shrink: float = setting(
        0.03,
        "Fraction of its value that each weight's change loses per step, at the peak rate.",
        least=0,
        most=1,
        older=0.0,
    )
    warmup_steps: int = setting(5, "Steps of linear warm-up.", least=0)
    harmful_batch_size: int = setting(4, "Harmful requests per step.", least=1)
    benign_batch_size: int = setting(12, "Benign requests per step.", least=1)
    refusal_tokens: int = setting(8, "Train on the first N tokens of refusals.", least=1)
    answer_tokens: int = setting(8, "Compare the first N tokens of benign answers.", least=1)
    token_decay: float = setting(
        0.7, "Weight of each refusal token relative to the one before.", above=0, most=1
    )
    retain_weight: float = setting(
        28.0, "Weight of the retain loss (KL to the base) against the refusal loss.", least=0
    )
    hinge_weight: float = setting(
        0.0,
        "Weight of the hinge loss: how much likelier refusals begin amid benign answers.",
        least=0,
        older=0.0,
    )
    hinge_tokens: int = setting(
        24, "Look for them up to the N-th token (with --hinge-weight).", least=1, older=24
    )
    seed: int = _seed()

    def __post_init__(self) -> None:
        """Check every setting, and that the hinge has tokens of its own."""
        super().__post_init__()
        if self.hinge_weight and self.hinge_tokens <= self.answer_tokens:
            raise SettingsError(
                f"hinge_tokens: expected more than answer_tokens, {self.answer_tokens}, found "
                f"{self.hinge_tokens}; raise it"
            )

    @property
    def benign_tokens(self) -> int:
        """How many tokens of benign answers the losses look at."""
        return self.hinge_tokens if self.hinge_weight else self.answer_tokens


@dataclass(frozen=True)
class PreserveSettings(Settings):
    """How a model is fine-tuned and stays safe: its answers are held, its safety weights stay."""

    heading = "Training"

    method: PreserveMethod = setting(
        PreserveMethod.FULL,
        "Train all other weights, or a LoRA on linear layers but routers and experts.",
    )
    rank: int = setting(16, "Rank of the LoRA.", least=1)
    steps: int = setting(1000, "Optimizer steps.", least=1)
    learning_rate: float | None = setting(
        None, "Peak learning rate of AdamW.", above=0, flag="--lr", unset="2e-5; 2e-4 for lora"
    )
    warmup: float = setting(0.05, "Fraction of the steps for linear warm-up.", least=0, most=1)
    weight_decay: float = setting(0.1, "Weight decay of AdamW; frozen weights get none.", least=0)
    batch_size: int = setting(8, "Rows per step.", least=1)
    max_answer_tokens: int = setting(256, "Train on the first N tokens of answers.", least=1)
    anchor: bool = setting(
        True, "Hold BASE's own refusals and benign answers while it learns.", group="Anchor"
    )
    harmful: str = _requests("builtin:harmful_train", "Harmful requests whose refusals to hold")
    benign: str = _requests("builtin:benign_train", "Benign requests whose answers to hold")
    boundary: str | None = _requests(
        "builtin:boundary_train", "Benign requests that look harmful, whose answers to hold first"
    )
    anchor_weight: float = setting(
        1.0, "Weight of the KL to BASE against the loss of the data.", group="Anchor", least=0
    )
    anchor_every: int = setting(
        4, "Hold at every N-th step, with N times the weight.", group="Anchor", least=1
    )
    anchor_rows: int | None = setting(
        None,
        "Answers held at such a step, half of them refusals.",
        group="Anchor",
        least=1,
        unset="twice --batch-size, at most 8",
    )
    stop_above: float | None = setting(
        None,
        "Stop when more of the answers begin otherwise than BASE's; counted every 100 steps.",
        group="Anchor",
        least=0,
        most=1,
        unset="go on",
    )
    seed: int = _seed()


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What a model is asked, and where its answers are cut.

    Example:
        >>> from safeweights_peft import EvaluateSettings
        >>> EvaluateSettings(limit=20).max_new_tokens
        32
    """

    heading = "Evaluation"

    harmful: str = _requests(
        "builtin:harmful_eval", "Harmful requests to measure ASR on", flag="--eval-harmful"
    )
    benign: str = _requests(
        "builtin:benign_eval", "Benign requests to measure over-refusal on", flag="--eval-benign"
    )
    limit: int | None = setting(
        None,
        "Measure on at most N requests of each kind; training's requests stay as they are.",
        group="Data",
        least=1,
        unset="all",
    )
    task: str | None = _requests(None, "Requests with answers to measure the loss on")
    max_new_tokens: int = setting(32, "Cut answers after N tokens.", least=1)
    batch_size: int = setting(25, "Requests answered at once.", least=1)
    keep_answers: bool = setting(False, "Keep the answers, harmful ones included, in the result.")
    judge: tuple[str, ...] = setting(
        ("refusals",),
        "Who judges the answers: refusals, guard:MODEL[=PROFILE], "
        "classifier:MODEL[=MEANING=LABEL], openai:MODEL@URL or judgezoo:NAME. Give it again for "
        "another opinion; the first decides the rates.",
    )


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """How weights are perturbed; 0.38 is the noise of the reference code of arXiv 2604.08297."""

    heading = "Perturbation"

    noise: float = setting(0.38, "Noise, in standard deviations of the tensor.", above=0)
    draws: int = setting(5, "Draws of noise and of random weights.", least=1)
    seed: int = _seed()


@dataclass(frozen=True)
class LinearSettings(Settings):
    """What a linear reading of a base learns from, and at which rates it is measured."""

    heading = "Linear reading"

    harmful: str = _requests(
        "builtin:harmful_train", "Harmful requests to learn from (with --linear)"
    )
    benign: str = _requests(
        "builtin:benign_train", "Harmless requests to learn from (with --linear)"
    )
    at_asr: tuple[float, ...] = setting(
        (0.05, 0.1),
        "ASR at which to measure over-refusal (with --linear). Give it again for another.",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class RunSettings:
    """All settings of an `enhance` run, as its ``settings.json`` holds them.

    Example:
        >>> from pathlib import Path
        >>> from safeweights_peft import RunSettings
        >>> RunSettings.read(Path("demo/run/settings.json")).score.density
        0.1
    """

    base: str = ""  # directory or Hub id
    score: ScoreSettings = ScoreSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    compute: ComputeSettings = ComputeSettings()

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Self:
        """Read a TOML or JSON file; what it leaves out keeps its default."""
        try:
            text = path.read_text(encoding="utf-8")
            content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsError(
                f"{path}: expected settings in TOML or JSON, found {error}; give "
                "the settings.json of a run, or the same in TOML"
            ) from error
        content = content | changes if isinstance(content, dict) else content
        return restore(cls, content, str(path), partial=True)
