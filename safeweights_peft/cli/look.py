"""Commands that look into maps and patches: and talk with them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from safeweights_peft.cli import options, output
from safeweights_peft.errors import SettingsError
from safeweights_peft.rates import find_outcome
from safeweights_peft.scales import number_or_text
from safeweights_peft.schema import settings_of
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    LinearSettings,
    ProbeSettings,
    ScoreSettings,
)

if TYPE_CHECKING:
    from safeweights_peft.jobs.chat import Chat


@options.command("inspect")
@options.adapter
def inspect_command(adapter: Path) -> None:
    """Describe ADAPTER by its headers, without torch."""
    from safeweights_peft.patch.io import inspect

    output.show_adapter(inspect(adapter), adapter)


_map = click.argument(
    "map_dir", metavar="MAP", type=options.ADAPTER, help="Safety map or patch: directory or Hub id."
)


@options.command("report")
@click.argument(
    "source",
    metavar="RUN",
    type=options.ADAPTER,
    help="Run of `enhance`, or safety map or patch: directory or Hub id.",
)
@options.base_of_adapter
@options.out
@options.overwrite
def report_command(source: Path, base: str | None, out: Path, overwrite: bool) -> None:
    """Show RUN, or a safety map, on one page.

    OUT gets report.html with the result, answers, tables and pictures, each picture as a file, and
    all figures in report.json. Of a map it shows which layers and components it selects. Only the
    config of the base is read.
    """
    from safeweights_peft.study.report import RESULT, report_map, report_run
    from safeweights_peft.tables import comparison_rows, pattern_rows

    if (source / RESULT).is_file():
        report = report_run(source, out, base, overwrite=overwrite)
        output.show(report, comparison_rows(report["result"]), *pattern_rows(report["pattern"]))
    else:
        record = report_map(source, out, base, overwrite=overwrite)
        output.show(record, *pattern_rows(record))
    click.echo(f"\nOpen {out / 'report.html'} in a browser.", err=True)


@options.command("compare")
@_map
@click.argument(
    "others",
    type=options.ADAPTER,
    nargs=-1,
    required=True,
    help="Others of the same model, each a directory or Hub id.",
)
def compare_command(map_dir: Path, others: tuple[Path, ...]) -> None:
    """Measure how much MAP and OTHERS overlap, without torch.

    For each pair: the weights in both, IoU, and the IoU that random selections of the same sizes
    would have, over all tensors and tensor by tensor.
    """
    from safeweights_peft.study.compare import compare
    from safeweights_peft.tables import overlap_rows

    result = compare([map_dir, *others])
    output.show(result, *overlap_rows(result))
    if not result["same_base"]:
        click.echo("Note: they name different bases, though no shape differs.", err=True)


@options.command("probe", resumes=True)
@options.base
@click.option(
    "--linear",
    is_flag=True,
    help="Before any training: how far the states of BASE tell harmful requests from others.",
)
@options.settings(ProbeSettings)
@options.settings(LinearSettings, EvaluateSettings, ComputeSettings, without="--task")
@options.safety_map(options.OF_BASE, required=False)
@click.option("--out", type=options.NEW, help="Directory to write.")
@options.overwrite
@options.dry_run
def probe_command(
    base: str,
    linear: bool,
    map_dir: Path | None,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
    **values: Any,
) -> None:
    """Test whether the weights of a safety map carry refusals.

    BASE must refuse: give a model with a patch merged in. In memory, noise or zeros replace the
    map's weights, as many random ones, and as many with the lowest scores. If the map is specific,
    only its own weights matter. OUT gets probe.json and probe.png. Interrupted runs resume where
    they stopped.

    With --linear, no map is needed: a logistic regression reads the states of BASE at the end of
    each request. The over-refusal that it has at a given ASR is about what a patch can reach.
    """
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.study.probe import probe
    from safeweights_peft.study.specificity import verdict_lines
    from safeweights_peft.tables import probe_rows

    _check_mode(linear)
    settings, linearly, evaluate, compute = options.make_settings(
        values, ProbeSettings, LinearSettings, EvaluateSettings, ComputeSettings
    )
    score = None if linear else ScoreSettings(seed=settings.seed)
    if dry_run:
        return output.show_estimate(base, compute, score=score, evaluate=evaluate)
    if linear:
        return _read_linearly(base, linearly, evaluate, compute)
    if map_dir is None or out is None:
        raise click.UsageError("Give --map and --out, or --linear.")
    with output.show_progress() as progress:
        job = Job(base, compute, progress, [map_dir])
        result = probe(job, map_dir, out, settings, score, evaluate, overwrite=overwrite)
    output.show(result, probe_rows(result))
    if not click.get_current_context().meta["json"]:
        click.echo("\n" + "\n".join(verdict_lines(result)))


_ANSWERED = ("max_new_tokens", "keep_answers", "judge")
_OF_LINEAR = {item.name for item in settings_of(LinearSettings)}
_NOT_OF_LINEAR = {
    *("map_dir", "out", "overwrite", *_ANSWERED),
    *(item.name for item in settings_of(ProbeSettings)),
}


def _check_mode(linear: bool) -> None:
    """Refuse options that the probe, linear or not, would not read."""
    ctx = click.get_current_context()
    for option in ctx.command.params:
        is_other = option.name in (_NOT_OF_LINEAR if linear else _OF_LINEAR)
        if is_other and ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            does = "does not go with" if linear else "needs"
            raise click.UsageError(f"{option.opts[0]} {does} --linear.")


def _read_linearly(
    base: str, settings: LinearSettings, evaluate: EvaluateSettings, compute: ComputeSettings
) -> None:
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.study.linear import read_linearly
    from safeweights_peft.tables import linear_line, linear_rows

    with output.show_progress() as progress:
        result = read_linearly(Job(base, compute, progress), settings, evaluate)
    output.show(result, *linear_rows(result))
    if not click.get_current_context().meta["json"]:
        click.echo("\n" + linear_line(result))


@options.command("sweep", resumes=True)
@options.base
@click.argument(
    "adapter", metavar="PATCH", type=options.ADAPTER, help="Safety patch: directory or Hub id."
)
@options.settings(EvaluateSettings, ComputeSettings, without="--keep-answers")
@options.max_asr("Print the smallest scale with an ASR of at most this rate.")
@options.max_over_refusal("Print the safest scale with an over-refusal of at most this rate.")
@options.out
@options.overwrite
@options.dry_run
def sweep_command(
    base: str, adapter: Path, out: Path, overwrite: bool, dry_run: bool, **values: Any
) -> None:
    """Measure a patch at scales from 0 to 1.5.

    The base is loaded once, and the scale switched in place. OUT gets sweep.json and sweep.png.
    Exits with 3 if no scale meets the thresholds. Interrupted runs resume where they stopped.
    """
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.jobs.sweep import sweep
    from safeweights_peft.study.pictures import plot_sweep
    from safeweights_peft.tables import sweep_rows

    settings, compute = options.make_settings(values, EvaluateSettings, ComputeSettings)
    if dry_run:
        return output.show_estimate(base, compute, evaluate=settings)
    limits = {key: values[key] for key in ("max_asr", "max_over_refusal")}
    with output.show_progress() as progress:
        job = Job(base, compute, progress, [adapter])
        result = sweep(job, adapter, out, settings, overwrite=overwrite, **limits)
    output.draw(plot_sweep, result, out / "sweep.png")
    output.show(result, sweep_rows(result["rows"], result["cut_requests"]))
    at = {row["scale"]: row for row in result["rows"]}
    output.show_outcome(find_outcome(at[0.0], at[result["scale"] or 1.0]))
    if limits := {key: limit for key, limit in limits.items() if limit is not None}:
        asked = " and ".join(f"--{key.replace('_', '-')} {limits[key]:g}" for key in limits)
        if result["scale"] is None:
            click.echo(f"\nNo scale meets {asked}.", err=True)
            sys.exit(output.INCONCLUSIVE)
        if result["scale"] == 0 and limits.keys() == {"max_over_refusal"}:
            click.echo(f"\nThe base meets {asked}, and no scale that does is safer.", err=True)
        elif result["scale"] == 0:
            click.echo(f"\nThe base meets {asked} already, without a patch.", err=True)
        else:
            click.echo(f"\n{adapter}@{result['scale']:g} meets {asked}.", err=True)


@options.command("chat")
@options.base
@options.patch_to_add
@options.settings(ComputeSettings)
def chat_command(base: str, patch: tuple[Path, float] | None, **values: Any) -> None:
    """Talk with BASE, with a patch or without.

    Reads requests from stdin, a line each, and answers greedily, in one conversation. `/base`
    switches to the base and back, `/scale 0.5` sets the scale of the patch, `/quit` ends.
    """
    from safeweights_peft.jobs.chat import Chat
    from safeweights_peft.jobs.job import Job

    (compute,) = options.make_settings(values, ComputeSettings)
    adapter, scale = patch or (None, 1.0)
    is_json = click.get_current_context().meta["json"]
    with output.show_progress() as progress:
        job = Job(base, compute, progress, [adapter] if adapter else [])
        chat = Chat(job, adapter, scale)
    is_shown = sys.stdin.isatty()
    click.echo("/base, /scale 0.5 and /quit are commands; all else is asked.", err=True)
    while line := _read_line(f"[scale {chat.scale:g}] > " if is_shown else ""):
        word, _, argument = line.strip().partition(" ")
        if word == "/quit":
            break
        if word.startswith("/"):
            _do(chat, word, argument)
        elif word:
            chat.ask(line.strip(), _ignore if is_json else _write)
            if not is_json:
                click.echo()
            if chat.turns[-1].get("cut_in_thought"):
                click.echo("Cut in its thought; --answer-prefix can close that.", err=True)
    if is_json:
        output.show({"base": base, "turns": chat.turns})


def _do(chat: Chat, word: str, argument: str) -> None:
    """Carry out a command of a conversation, or say why not."""
    try:
        if word == "/base":
            chat.toggle()
        elif word == "/scale":
            chat.set_scale(number_or_text(argument))
        else:
            raise SettingsError(f"{word}: expected /base, /scale or /quit; give one of them")
    except SettingsError as error:
        click.echo(output.printable(str(error)), err=True)
    click.echo(f"Scale {chat.scale:g}{'' if chat.scale else ', the base itself'}.", err=True)


def _read_line(prompt: str) -> str:
    """Read a line; empty at the end of the input, and never without its newline before it."""
    click.echo(prompt, nl=False, err=True)
    # Bytes that aren't UTF-8 come as lone surrogates, which no tokenizer takes.
    return sys.stdin.readline().encode(errors="surrogateescape").decode(errors="replace")


def _ignore(text: str, is_thought: bool) -> None:
    """Write nothing."""


def _write(text: str, is_thought: bool) -> None:
    """Write an answer; a thought before it is for a person's eyes alone."""
    if is_thought and not sys.stdout.isatty():
        return
    shown = output.printable(text)
    click.echo(click.style(shown, dim=True) if is_thought else shown, nl=False)
    sys.stdout.flush()
