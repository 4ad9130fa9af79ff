"""Every setting of every job: its default, its range and its help, declared once.

The command line makes its options from these fields, results record them, and a run leaves them in
``settings.json``, which ``--settings`` reads again. What a job does with a setting is told where
the job is; sizes of batches and lengths are in requests and tokens, rates are fractions.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from safeweights_peft.errors import SettingsError

Kind = TypeVar("Kind")

_OTHER = "use the version of safeweights-peft that wrote it"


class Option(NamedTuple):
    """How the command line names a setting, what it says of it, and which numbers it takes.

    ``least`` and ``most`` belong to the range, ``above`` doesn't.
    """

    help: str
    flag: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def range(self) -> str:
        """The range in words, such as "above 0 and at most 1"; empty if every number will do."""
        bounds = (("at least", self.least), ("above", self.above), ("at most", self.most))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    def allows(self, number: float) -> bool:
        """Tell whether a number is finite and in the range."""
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
        )


def setting(default: Any, help: str, **option: Any) -> Any:
    """Declare a setting; its flag is the field's name, unless ``flag`` gives another."""
    return field(default=default, metadata={"option": Option(help, **option)})


class SettingKind(NamedTuple):
    """The type of a setting: a plain one or an enum, and whether None is allowed too."""

    kind: type[Any]
    is_optional: bool


def kinds_of(settings: type[Any]) -> dict[str, SettingKind]:
    """Read the types of a dataclass's fields; ``X | None`` is X, optional."""
    found = {}
    for name, hint in get_type_hints(settings).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = [part for part in parts if part is not type(None)]
        found[name] = SettingKind(kinds[0], len(kinds) < len(parts))
    return found


def option_of(declared: Field[Any]) -> Option:
    """Read what a field declares, with the flag that the command line gives it."""
    option: Option = declared.metadata["option"]
    return option._replace(flag=option.flag or f"--{declared.name.replace('_', '-')}")


def check_setting(option: Option, kind: SettingKind, value: Any, name: str) -> None:
    """Refuse a value of another type, out of range, or not finite; NaN passes no range."""
    if value is None and kind.is_optional:
        return
    found = repr(value)[:80]
    if issubclass(kind.kind, StrEnum) or option.choices:
        choices = option.choices or tuple(each.value for each in kind.kind)
        if value not in choices:
            raise SettingsError(f"{name}: expected one of {', '.join(choices)}, found {found}")
        return
    is_number = kind.kind is float and type(value) is int
    if type(value) is not kind.kind and not is_number:
        raise SettingsError(f"{name}: expected {kind.kind.__name__}, found {found}")
    if kind.kind in (int, float) and not option.allows(value):
        wanted = f"a number {option.range}".rstrip() if option.range else "a finite number"
        raise SettingsError(f"{name}: expected {wanted}, found {found}; choose another")


@dataclass(frozen=True)
class Settings:
    """The settings of one job, checked when they are made."""

    def __post_init__(self) -> None:
        """Check every setting."""
        for declared in fields(self):
            if "option" in declared.metadata:
                kind = kinds_of(type(self))[declared.name]
                value = getattr(self, declared.name)
                check_setting(option_of(declared), kind, value, declared.name)

    @classmethod
    def options(cls) -> Iterator[tuple[str, Option, SettingKind, Any]]:
        """List each setting's name, option, type and default."""
        for declared in fields(cls):
            yield declared.name, option_of(declared), kinds_of(cls)[declared.name], declared.default


class Method(StrEnum):
    """How weights are selected: by ESI, or by a control with the same count."""

    ESI = "esi"
    RANDOM = "random"
    BOTTOM = "bottom"


class Aggregation(StrEnum):
    """How the gradients of requests make one score."""

    ABS_OF_MEAN = "abs-of-mean"
    MEAN_OF_ABS = "mean-of-abs"


class PreserveMethod(StrEnum):
    """What `preserve` trains: all weights but the frozen ones, or a LoRA on all linear layers."""

    FULL = "full"
    LORA = "lora"


@dataclass(frozen=True)
class ComputeSettings(Settings):
    """Where and in what precision to compute."""

    device: str | None = setting(None, "torch device.  [default: an accelerator if there is one]")
    dtype: str = setting(
        "auto",
        "Dtype to compute in; auto is float32 on a CPU, else the checkpoint's own.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    revision: str | None = setting(None, "Branch, tag or commit of BASE on the Hub.")


@dataclass(frozen=True)
class ScoreSettings(Settings):
    """How weights are scored and selected.

    Safety is the likelihood of refusals, or with a guard or a classifier what that judge says of
    the model's own answers.
    """

    harmful: str = setting(
        "builtin:harmful_train",
        "Harmful requests to learn from: builtin:NAME, a .json/.jsonl file, or a datasets id.",
    )
    examples: int = setting(64, "Number of harmful requests to score with.", least=1)
    density: float = setting(0.01, "Fraction of all weights to select.", above=0, most=1)
    method: Method = setting(Method.ESI, "Select by ESI, or as many weights by a control.")
    batch_size: int = setting(8, "Requests per forward pass.", least=1, flag="--score-batch-size")
    refusal_tokens: int = setting(32, "Cut refusals after N tokens.", least=1)
    seed: int = setting(0, "Random seed.", least=0)
    guard: str | None = setting(None, "Guard model that judges the model's answers: path or id.")
    profile: str | None = setting(
        None, "How to ask the guard: a built-in profile, or a JSON file.", flag="--guard-profile"
    )
    classifier: str | None = setting(None, "Sequence classifier that judges instead: path or id.")
    label: str | None = setting(
        None,
        "What the classifier's label means: safe=LABEL or unsafe=LABEL.",
        flag="--classifier-label",
    )
    answer_tokens: int = setting(64, "Cut the answers to be judged after N tokens.", least=1)
    temperature: float = setting(
        0.3, "Gumbel-softmax temperature (with --guard or --classifier).", above=0
    )
    samples: int = setting(
        4, "Gumbel-softmax samples per answer (with --guard or --classifier).", least=1
    )
    aggregation: Aggregation = setting(
        Aggregation.ABS_OF_MEAN, "Absolute value of the mean gradient, or mean of absolute values."
    )
    contrast: str | None = setting(
        None, "Benign requests; exclude the weights that matter most for answering them."
    )
    contrast_density: float = setting(
        0.01, "Fraction of weights to exclude (with --contrast).", above=0, most=1
    )
    layers_per_pass: int | None = setting(
        None, "Score N layers at a time: less memory, more time.  [default: all]", least=1
    )


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How the selected weights are trained (SET)."""

    harmful: str = setting(
        "builtin:harmful_train",
        "Harmful requests to learn from: builtin:NAME, a .json/.jsonl file, or a datasets id.",
    )
    benign: str = setting("builtin:benign_train", "Benign requests to keep answering as before.")
    steps: int = setting(100, "Optimizer steps.", least=1)
    learning_rate: float = setting(5e-4, "Peak learning rate of AdamW.", above=0, flag="--lr")
    retain_weight: float = setting(
        14.0, "Weight of staying close to the base, against refusing.", least=0
    )
    harmful_batch_size: int = setting(12, "Harmful requests per step.", least=1)
    benign_batch_size: int = setting(36, "Benign requests per step.", least=1)
    refusal_tokens: int = setting(8, "Train on the first N tokens of refusals.", least=1)
    answer_tokens: int = setting(4, "Compare the first N tokens of benign answers.", least=1)
    token_decay: float = setting(
        0.7, "Weight of each answer token relative to the one before.", above=0, most=1
    )
    warmup_steps: int = setting(5, "Steps of linear warm-up.", least=0)
    checkpoint_steps: int = setting(25, "Steps between checkpoints.", least=1)
    seed: int = setting(0, "Random seed.", least=0)


@dataclass(frozen=True)
class PreserveSettings(Settings):
    """How a model is fine-tuned while its safety weights stay (SPA)."""

    method: PreserveMethod = setting(
        PreserveMethod.FULL, "Train all other weights, or a LoRA on all linear layers."
    )
    rank: int = setting(16, "Rank of the LoRA.", least=1)
    steps: int = setting(1000, "Optimizer steps.", least=1)
    learning_rate: float | None = setting(
        None, "Peak learning rate of AdamW.  [default: 2e-5; 2e-4 for lora]", above=0, flag="--lr"
    )
    batch_size: int = setting(8, "Rows per step.", least=1)
    max_answer_tokens: int = setting(256, "Cut answers after N tokens.", least=1)
    weight_decay: float = setting(0.1, "Weight decay of AdamW; frozen weights get none.", least=0)
    warmup: float = setting(0.05, "Fraction of the steps for warm-up.", least=0, most=1)
    checkpoint_steps: int = setting(200, "Steps between checkpoints.", least=1)
    seed: int = setting(0, "Random seed.", least=0)


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What a model is asked, and how its answers are cut."""

    harmful: str = setting(
        "builtin:harmful_eval", "Harmful requests to measure ASR on.", flag="--eval-harmful"
    )
    benign: str = setting(
        "builtin:benign_eval", "Benign requests to measure over-refusal on.", flag="--eval-benign"
    )
    limit: int | None = setting(None, "Use at most N requests of each kind.", least=1)
    task: str | None = setting(None, "Requests with answers to measure the loss on.")
    max_new_tokens: int = setting(32, "Cut answers after N tokens.", least=1)
    batch_size: int = setting(25, "Requests answered at once.", least=1, flag="--eval-batch-size")
    keep_answers: bool = setting(False, "Keep the answers, harmful ones included, in the result.")


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """How weights are perturbed; 0.38 is the noise of the reference code of arXiv 2604.08297."""

    noise: float = setting(0.38, "Noise, in standard deviations of the tensor.", above=0)
    draws: int = setting(5, "Draws of noise, and of random weights.", least=1)
    seed: int = setting(0, "Random seed.", least=0)


@dataclass(frozen=True)
class RunSettings:
    """All settings of an `enhance` run; the content of its ``settings.json``.

    ``base`` is a directory or a Hub id.
    """

    base: str
    score: ScoreSettings = ScoreSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    compute: ComputeSettings = ComputeSettings()

    @classmethod
    def read(cls, path: Path, **given: Any) -> Self:
        """Read a TOML or JSON file; what it leaves out keeps its default, ``given`` comes first."""
        try:
            text = path.read_text(encoding="utf-8")
            content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{path}: expected settings in TOML or JSON, found {error}; give "
                "the settings.json of a run, or the same in TOML"
            ) from error
        if not isinstance(content, dict):
            raise SettingsError(f"{path}: expected a table of settings, found {content!r:.80}")
        return restore(cls, content | given, str(path), partial=True)


def restore(kind: type[Kind], values: Any, where: str, *, partial: bool = False) -> Kind:
    """Make a dataclass of JSON; refuse unknown and missing fields, and values of another type.

    Fields that are dataclasses, and dicts of them, are made too; ``partial`` allows missing ones.
    """
    known = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise SettingsError(
            f"{where}: expected {', '.join(known)}, found {repr(values)[:80]}; {_OTHER}"
        )
    unknown, missing = values.keys() - known, known.keys() - values
    if unknown or (missing and not partial):
        raise SettingsError(
            f"{where}: expected {', '.join(known)}, found "
            f"{', '.join(map(str, values))[:200] or 'nothing'}; {_OTHER}"
        )
    made = {
        name: _restore_value(known[name], value, f"{where}.{name}", partial)
        for name, value in values.items()
    }
    try:
        return kind(**made)
    except TypeError as error:
        raise SettingsError(f"{where}: expected all settings, found {error}") from error
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def _restore_value(hint: Any, value: Any, where: str, partial: bool) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return restore(hint, value, where, partial=partial)
    if get_origin(hint) is dict and isinstance(value, Mapping):
        inner = get_args(hint)[1]
        return {
            key: _restore_value(inner, each, f"{where}.{key}", partial)
            for key, each in value.items()
        }
    for option in get_args(hint) or (hint,):
        if type(value) is option or (option is float and type(value) is int):
            return value
        if isinstance(option, type) and issubclass(option, StrEnum) and value in list(option):
            return option(value)
    raise SettingsError(
        f"{where}: expected {getattr(hint, '__name__', hint)}, found {repr(value)[:80]}; {_OTHER}"
    )


def flatten(
    settings: Mapping[str, Any] | Settings | RunSettings, prefix: str = ""
) -> dict[str, Any]:
    """Name nested settings by their path, such as ``score.density``."""
    flat: dict[str, Any] = {}
    content = settings if isinstance(settings, Mapping) else asdict(settings)
    for key, value in content.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
