"""Options that commands share, and the settings that they amount to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from safeweights_peft.settings import (
        ComputeSettings,
        EvaluateSettings,
        PreserveSettings,
        ProbeSettings,
        ScoreSettings,
        TrainSettings,
    )

Command = TypeVar("Command", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN, which click lets pass any bounds, and infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert as click does, and refuses what is not finite."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class _Adapter(click.ParamType):
    """An adapter's directory; or its Hub id, perhaps @REVISION, and then it is fetched."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Find the directory: what is here comes before what is on the Hub."""
        if Path(value).is_dir():
            return Path(value)
        from safeweights_peft.hub.pull import fetch_adapter, is_hub_id

        return fetch_adapter(value) if is_hub_id(value) else existing.convert(value, param, ctx)


adapter = _Adapter()
existing = click.Path(exists=True, file_okay=False, path_type=Path)
existing_file = click.Path(exists=True, dir_okay=False, path_type=Path)
new = click.Path(path_type=Path)
new_file = click.Path(dir_okay=False, path_type=Path)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


json_output = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
dry_run = click.option(
    "--dry-run", is_flag=True, help="Print what it would need (memory, time) and stop."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing result.")
map_of_base = click.option(
    "--map",
    "map_dir",
    required=True,
    type=adapter,
    help="Safety map of BASE, or safety patch that is merged into it.",
)
out_directory = click.option("--out", required=True, type=new, help="Directory to be written.")

compute_options = _options(
    click.option("--device", help="torch device.  [default: an accelerator if there is one]"),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="What to compute in; auto is float32 on a CPU, else the checkpoint's own.",
    ),
    click.option("--revision", help="Branch, tag or commit of a base on the Hub."),
)
harmful_train = click.option(
    "--harmful",
    default="builtin:harmful_train",
    show_default=True,
    help="Harmful requests to learn from: builtin:NAME, a .json/.jsonl file, or a datasets id.",
)
seed = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Random seed."
)
score_options = _options(
    click.option(
        "--density",
        type=FiniteRange(0, 1, min_open=True),
        default=0.01,
        show_default=True,
        help="Share of all weights to select.",
    ),
    click.option(
        "--method",
        type=click.Choice(["esi", "random", "bottom"]),
        default="esi",
        show_default=True,
        help="ESI, or a control with the same count.",
    ),
    click.option(
        "--examples",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Harmful requests to score with.",
    ),
    click.option("--guard", help="Guard model that judges the model's own answers: path or id."),
    click.option("--guard-profile", help="How to ask it: a built-in profile, or a JSON file."),
    click.option("--classifier", help="Sequence classifier as the judge: path or id."),
    click.option("--classifier-label", help="What a label of it means: safe=LABEL, unsafe=LABEL."),
    click.option(
        "--answer-tokens",
        type=click.IntRange(1),
        help="Answers to be judged are cut after so many tokens.  [default: 64]",
    ),
    click.option(
        "--temperature",
        type=FiniteRange(0, min_open=True),
        help="Of the soft tokens by which a judge's gradient reaches the model.  [default: 0.3]",
    ),
    click.option(
        "--samples", type=click.IntRange(1), help="Draws of noise per answer.  [default: 4]"
    ),
    click.option(
        "--aggregation",
        type=click.Choice(["abs-of-mean", "mean-of-abs"]),
        default="abs-of-mean",
        show_default=True,
        help="Size of the mean gradient over requests, or mean of its sizes.",
    ),
    click.option("--contrast", help="Benign requests; what matters for their answers is left out."),
    click.option(
        "--contrast-density",
        type=FiniteRange(0, 1, min_open=True),
        help="Share of all weights that is left out so.  [default: 0.01]",
    ),
    click.option(
        "--layers-per-pass",
        type=click.IntRange(1),
        help="Score so many layers at once: less memory, more time.  [default: all]",
    ),
)
train_options = _options(
    click.option(
        "--benign",
        default="builtin:benign_train",
        show_default=True,
        help="Benign requests on which to stay like the base.",
    ),
    click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [default: 100]"),
    click.option(
        "--lr",
        type=FiniteRange(0, min_open=True),
        help="Peak learning rate.  [default: 5e-4]",
    ),
    click.option(
        "--retain-weight",
        type=FiniteRange(0),
        help="Weight of staying like the base against refusing.  [default: 14]",
    ),
)
preserve_options = _options(
    click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [default: 1000]"),
    click.option(
        "--lr",
        type=FiniteRange(0, min_open=True),
        help="Peak learning rate.  [default: 2e-5; 2e-4 for LoRA]",
    ),
    click.option(
        "--method",
        type=click.Choice(["full", "lora"]),
        default="full",
        show_default=True,
        help="Train all other weights, or LoRA on all linear layers.",
    ),
    click.option("--rank", type=click.IntRange(1), help="LoRA's rank.  [default: 16]"),
    click.option("--batch-size", type=click.IntRange(1), help="Rows per step.  [default: 8]"),
    click.option(
        "--weight-decay",
        type=FiniteRange(0),
        help="AdamW's weight decay; frozen weights get none.  [default: 0.1]",
    ),
)
request_options = _options(
    click.option(
        "--eval-harmful",
        default="builtin:harmful_eval",
        show_default=True,
        help="Harmful requests to measure on.",
    ),
    click.option(
        "--eval-benign",
        default="builtin:benign_eval",
        show_default=True,
        help="Benign requests to measure on.",
    ),
    click.option("--limit", type=click.IntRange(1), help="At most so many.  [default: all]"),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1),
        default=32,
        show_default=True,
        help="Answers are cut after so many tokens.",
    ),
    click.option(
        "--keep-answers",
        is_flag=True,
        help="Keep the answers' texts, harmful ones included, in the result.",
    ),
)
evaluate_options = _options(
    request_options,
    click.option(
        "--task", help="Requests with answers on which to measure the loss.  [default: none]"
    ),
)
probe_options = _options(
    click.option(
        "--noise",
        type=FiniteRange(0, min_open=True),
        default=0.38,
        show_default=True,
        help="Size of the noise, in standard deviations of the tensor.",
    ),
    click.option(
        "--draws",
        type=click.IntRange(1),
        default=5,
        show_default=True,
        help="How often noise, and random weights, are drawn.",
    ),
)


def _given(**chosen: Any) -> dict[str, Any]:
    """Drop options that were not given: their settings keep their defaults."""
    return {name: value for name, value in chosen.items() if value is not None}


def score_settings(options: dict[str, Any]) -> ScoreSettings:
    """Read the settings of a scoring job out of a command's options."""
    from safeweights_peft.settings import Aggregation, Method, ScoreSettings

    chosen = _given(
        guard=options["guard"],
        profile=options["guard_profile"],
        classifier=options["classifier"],
        label=options["classifier_label"],
        answer_tokens=options["answer_tokens"],
        temperature=options["temperature"],
        samples=options["samples"],
        contrast=options["contrast"],
        contrast_density=options["contrast_density"],
        layers_per_pass=options["layers_per_pass"],
    )
    return ScoreSettings(
        harmful=options["harmful"],
        examples=options["examples"],
        density=options["density"],
        method=Method(options["method"]),
        seed=options["seed"],
        aggregation=Aggregation(options["aggregation"]),
        **chosen,
    )


def train_settings(options: dict[str, Any]) -> TrainSettings:
    """Read the settings of a training job out of a command's options."""
    from safeweights_peft.settings import TrainSettings

    enhance = _given(
        steps=options["steps"],
        learning_rate=options["lr"],
        retain_weight=options["retain_weight"],
        seed=options["seed"],
    )
    return TrainSettings(harmful=options["harmful"], benign=options["benign"], **enhance)


def preserve_settings(options: dict[str, Any]) -> PreserveSettings:
    """Read the settings of a preserving job out of a command's options."""
    from safeweights_peft.settings import PreserveMethod, PreserveSettings

    chosen = _given(
        method=PreserveMethod(options["method"]),
        rank=options["rank"],
        steps=options["steps"],
        learning_rate=options["lr"],
        batch_size=options["batch_size"],
        weight_decay=options["weight_decay"],
        seed=options["seed"],
    )
    return PreserveSettings(**chosen)


def evaluate_settings(options: dict[str, Any]) -> EvaluateSettings:
    """Read the settings of an evaluation job out of a command's options."""
    from safeweights_peft.settings import EvaluateSettings

    return EvaluateSettings(
        harmful=options["eval_harmful"],
        benign=options["eval_benign"],
        limit=options["limit"],
        task=options.get("task"),
        max_new_tokens=options["max_new_tokens"],
        keep_answers=options["keep_answers"],
    )


def probe_settings(options: dict[str, Any]) -> ProbeSettings:
    """Read how entries are perturbed out of a command's options."""
    from safeweights_peft.settings import ProbeSettings

    return ProbeSettings(noise=options["noise"], draws=options["draws"], seed=options["seed"])


def compute_settings(options: dict[str, Any]) -> ComputeSettings:
    """Read where and in what dtype to compute out of a command's options."""
    from safeweights_peft.settings import ComputeSettings

    return ComputeSettings(
        device=options["device"], dtype=options["dtype"], revision=options["revision"]
    )
