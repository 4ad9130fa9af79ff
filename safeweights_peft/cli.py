"""The command line: parse, call one function, print.

Results go to stdout (``--json`` for scripts), progress and messages to stderr. Exit codes: 0 done,
1 failed, 2 wrong usage, 3 a check did not pass. Heavy packages are imported inside the commands, so
that ``--help``, ``inspect``, ``verify`` and ``merge`` start without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from safeweights_peft.errors import SafeWeightsError

if TYPE_CHECKING:
    from safeweights_peft.pipeline import (
        ComputeSettings,
        EvaluateSettings,
        ScoreSettings,
        TrainSettings,
    )

Command = TypeVar("Command", bound=Callable[..., Any])
CHECK_FAILED = 3
_existing = click.Path(exists=True, file_okay=False, path_type=Path)
_new = click.Path(path_type=Path)


class _Group(click.Group):
    """Turns the package's errors into one line and exit code 1; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SafeWeightsError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback when a command fails.")
@click.version_option(package_name="safeweights-peft")
def main(debug: bool) -> None:
    """Safety patches for language models: find, train, check and merge the weights that matter.

    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
    3 a check did not pass.
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_output = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_dry_run = click.option(
    "--dry-run", is_flag=True, help="Print what it would need (memory, time) and stop."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing result.")
_out = click.option("--out", required=True, type=_new, help="Directory to be written.")

_compute_options = _options(
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
_harmful_train = click.option(
    "--harmful",
    default="builtin:harmful_train",
    show_default=True,
    help="Harmful requests to learn from: builtin:NAME, a .json/.jsonl file, or a datasets id.",
)
_seed = click.option("--seed", default=0, show_default=True, help="Random seed.")
_score_options = _options(
    click.option(
        "--density",
        type=click.FloatRange(0, 1, min_open=True),
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
)
_train_options = _options(
    click.option(
        "--benign",
        default="builtin:benign_train",
        show_default=True,
        help="Benign requests on which to stay like the base.",
    ),
    click.option("--steps", type=click.IntRange(1), help="Optimizer steps.  [default: 100]"),
    click.option(
        "--lr",
        type=click.FloatRange(0, min_open=True),
        help="Peak learning rate.  [default: set by density]",
    ),
    click.option(
        "--retain-weight",
        type=click.FloatRange(0),
        help="Weight of staying like the base against refusing.",
    ),
)
_evaluate_options = _options(
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
    click.option("--limit", type=click.IntRange(1), help="At most so many of each.  [default: all]"),
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


@main.command("enhance")
@click.argument("base")
@_out
@_harmful_train
@_score_options
@_train_options
@_evaluate_options
@_seed
@_compute_options
@_dry_run
@_output
def enhance_command(base: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Make BASE safer: evaluate, score, train, evaluate again.

    BASE is a model's directory or Hub id. OUT gets before.json, map/, patch/, after.json,
    result.json and result.png. An interrupted run goes on where it stopped when called again.
    """
    from safeweights_peft.pipeline import enhance_model, estimate

    score, train = _score_settings(options), _train_settings(options)
    evaluate, compute = _evaluate_settings(options), _compute_settings(options)
    if dry_run:
        needs = estimate(
            base, score=score, train=train, evaluate=evaluate, evaluations=3, compute=compute
        )
        return _show_estimate(needs, as_json)
    with _progress() as progress:
        result = enhance_model(base, out, score, train, evaluate, compute, progress)
    _show_run(result, out, as_json)


@main.command("score")
@click.argument("base")
@_out
@_harmful_train
@_score_options
@_seed
@_compute_options
@_overwrite
@_dry_run
@_output
def score_command(
    base: str, out: Path, overwrite: bool, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Find the weights of BASE that carry its safety; write them as a safety map."""
    from safeweights_peft.format import inspect
    from safeweights_peft.pipeline import estimate, score

    settings, compute = _score_settings(options), _compute_settings(options)
    if dry_run:
        return _show_estimate(estimate(base, score=settings, compute=compute), as_json)
    with _progress() as progress:
        score(base, out, settings, compute, progress, overwrite=overwrite)
    _show_adapter(inspect(out), out, as_json)


@main.command("train")
@click.argument("base")
@click.option("--map", "map_dir", required=True, type=_existing, help="Safety map made by `score`.")
@_out
@_harmful_train
@_train_options
@_seed
@_compute_options
@_overwrite
@_dry_run
@_output
def train_command(
    base: str,
    map_dir: Path,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train the weights of a safety map of BASE to refuse (SET); write a safety patch.

    An interrupted training goes on from its last checkpoint when called again.
    """
    from safeweights_peft.format import inspect
    from safeweights_peft.pipeline import estimate, train

    settings, compute = _train_settings(options), _compute_settings(options)
    if dry_run:
        return _show_estimate(estimate(base, train=settings, compute=compute), as_json)
    with _progress() as progress:
        train(base, map_dir, out, settings, compute, progress, overwrite=overwrite)
    _show_adapter(inspect(out), out, as_json)


@main.command("eval")
@click.argument("base")
@click.option("--adapter", type=_existing, help="Safety patch to be merged before measuring.")
@click.option("--out", type=_new, help="JSON file to be written with the whole result.")
@click.option(
    "--max-asr", type=click.FloatRange(0, 1), help="Exit with 3 if the ASR is above this."
)
@_evaluate_options
@_compute_options
@_dry_run
@_output
def eval_command(
    base: str,
    adapter: Path | None,
    out: Path | None,
    max_asr: float | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure BASE, with a patch or without: ASR, over-refusal, KL to the base, perplexity."""
    from safeweights_peft.files import write_json
    from safeweights_peft.pipeline import estimate, evaluate
    from safeweights_peft.report import evaluation_rows

    settings, compute = _evaluate_settings(options), _compute_settings(options)
    if dry_run:
        runs = 3 if adapter else 1
        needs = estimate(base, evaluate=settings, evaluations=runs, compute=compute)
        return _show_estimate(needs, as_json)
    with _progress() as progress:
        result = evaluate(base, adapter, settings, compute, progress)
    if out:
        write_json(out, result)
    _show(result, evaluation_rows(result), as_json)
    if max_asr is not None and result["harmful"]["attack_success_rate"]["rate"] > max_asr:
        click.echo(f"ASR is above --max-asr {max_asr}", err=True)
        sys.exit(CHECK_FAILED)


@main.command("merge")
@click.argument("base", type=_existing)
@click.argument("adapter", type=_existing)
@_out
@click.option("--scale", default=1.0, show_default=True, help="Factor on the patch's values.")
@_overwrite
@_dry_run
@_output
def merge_command(
    base: Path,
    adapter: Path,
    out: Path,
    scale: float,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write BASE with the patch ADAPTER merged in, as a new checkpoint; needs no torch."""
    from dataclasses import asdict

    from safeweights_peft import merge as rooms

    if dry_run:
        plan = rooms.plan(base, adapter)
        return _show(plan, _rows(plan), as_json)
    with _progress() as progress, progress.task("Copying the base", 100) as advance:
        report = rooms.merge(
            base, adapter, out, scale=scale, overwrite=overwrite, progress=_percent(advance)
        )
    _show(asdict(report), _rows(asdict(report)), as_json)


@main.command("inspect")
@click.argument("adapter", type=_existing)
@_output
def inspect_command(adapter: Path, as_json: bool) -> None:
    """Describe a safety patch or map from its headers; reads no tensor and needs no torch."""
    from safeweights_peft.format import inspect

    _show_adapter(inspect(adapter), adapter, as_json)


@main.command("verify")
@click.argument("adapter", type=_existing)
@click.option("--base", type=_existing, help="Checkpoint that must be its base, or the merged model.")
@_output
def verify_command(adapter: Path, base: Path | None, as_json: bool) -> None:
    """Check every rule of the format, and with --base that it fits; exits with 3 if it doesn't."""
    from safeweights_peft.merge import verify

    report = verify(adapter, base)
    checks = [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in report.checks]
    rows = [(c["name"], f"{'ok' if c['ok'] else 'FAILED'}: {c['detail']}") for c in checks]
    _show({"ok": report.ok, "checks": checks}, rows, as_json)
    if not report.ok:
        sys.exit(CHECK_FAILED)


def _score_settings(options: dict[str, Any]) -> ScoreSettings:
    from safeweights_peft.pipeline import Method, ScoreSettings

    return ScoreSettings(
        harmful=options["harmful"],
        examples=options["examples"],
        density=options["density"],
        method=Method(options["method"]),
        seed=options["seed"],
    )


def _train_settings(options: dict[str, Any]) -> TrainSettings:
    from safeweights_peft.pipeline import TrainSettings
    from safeweights_peft.training import EnhanceSettings

    chosen = {
        "steps": options["steps"],
        "learning_rate": options["lr"],
        "retain_weight": options["retain_weight"],
        "seed": options["seed"],
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    return TrainSettings(
        harmful=options["harmful"], benign=options["benign"], enhance=EnhanceSettings(**given)
    )


def _evaluate_settings(options: dict[str, Any]) -> EvaluateSettings:
    from safeweights_peft.pipeline import EvaluateSettings

    return EvaluateSettings(
        harmful=options["eval_harmful"],
        benign=options["eval_benign"],
        limit=options["limit"],
        max_new_tokens=options["max_new_tokens"],
        keep_answers=options["keep_answers"],
    )


def _compute_settings(options: dict[str, Any]) -> ComputeSettings:
    from safeweights_peft.pipeline import ComputeSettings

    return ComputeSettings(
        device=options["device"], dtype=options["dtype"], revision=options["revision"]
    )


class _Bars:
    """The pipeline's progress, shown by rich on stderr."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        task = self._bars.add_task(description, total=total)
        yield lambda done: self._bars.advance(task, done)


@contextmanager
def _progress() -> Iterator[_Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
    )
    _quiet_transformers()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)


def _quiet_transformers() -> None:
    """Keeps transformers' own bars out of ours, where it is loaded at all."""
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _percent(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    shown = 0

    def copied(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(total, 1)
        advance(percent - shown)
        shown = percent

    return copied


def _show(result: dict[str, Any], rows: Sequence[tuple[str, ...]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    from safeweights_peft.report import size_text

    return [
        (name.removesuffix("_bytes"), size_text(value) if name.endswith("_bytes") else str(value))
        for name, value in result.items()
    ]


def _show_estimate(needs: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from safeweights_peft.report import size_text

    rows = [
        ("parameters", f"{needs.parameters:,}"),
        ("memory", f"about {size_text(needs.memory_bytes)}"),
        ("patch", f"about {size_text(needs.patch_bytes)}"),
        *((f"time to {step}", f"about {s / 60:.1f} min") for step, s in needs.seconds.items()),
    ]
    _show(asdict(needs), rows, as_json)


def _show_adapter(content: dict[str, Any], path: Path, as_json: bool) -> None:
    from safeweights_peft.report import size_text

    kinds = {"set": "safety patch", "spa": "safety map"}
    rows = [
        ("path", str(path)),
        ("kind", f"{kinds[content['mode']]}, format {content['format_version']}"),
        ("base", str(content["base_model_name_or_path"])),
        ("revision", str(content["revision"])),
        ("parameters", str(content["parameters"])),
        ("entries", f"{content['entries']:,} ({content['density']:.3%} of these parameters)"),
        ("size", size_text(content["size_bytes"])),
    ]
    _show(content, rows, as_json)


def _show_run(result: dict[str, Any], out: Path, as_json: bool) -> None:
    from safeweights_peft.report import comparison_rows, plot_run

    losses = json.loads((out / "patch" / "training.json").read_text(encoding="utf-8"))["losses"]
    plot_run(result, losses, out / "result.png")
    _show(result, [("", "before", "after"), *comparison_rows(result)], as_json)
    click.echo(f"\nPatch in {out / 'patch'}. Next: safeweights merge, or in Python:", err=True)
    click.echo("  import safeweights_peft; from peft import PeftModel", err=True)
    click.echo(f"  model = PeftModel.from_pretrained(base, {str(out / 'patch')!r})", err=True)
