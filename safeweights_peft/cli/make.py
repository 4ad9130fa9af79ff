"""Commands that compute with models: make a patch, evaluate, fine-tune safely."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from safeweights_peft.cli import options, output
from safeweights_peft.errors import EvaluationError
from safeweights_peft.rates import CHAT_ADVICE, SCALE_ADVICE, Outcome, find_garbage
from safeweights_peft.scales import REPAIR_STEPS
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    PreserveSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)

_OLD = "Patch, or map, of the model before tuning: directory or Hub id[@REVISION]."
_DATA = "--harmful --benign --eval-harmful --eval-benign --limit"
_ENHANCE_EXAMPLES = """
\b
Examples:
  safeweights enhance HuggingFaceTB/SmolLM2-135M-Instruct --out run
  safeweights enhance MODEL --out run --harmful mine.jsonl --density 0.005 --lr 1e-3
"""


_NEXT = (
    "eval {base} --adapter {patch} --settings {settings} --keep-answers --out {answers}",
    "merge {base} {patch} --out {merged}",
    "push {run} USER/NAME --base {shared}",
)


@options.command("enhance", resumes=True, epilog=_ENHANCE_EXAMPLES)
@options.base
@options.settings(ScoreSettings, TrainSettings, EvaluateSettings, only=_DATA, group="Data")
@options.settings(
    ScoreSettings,
    TrainSettings,
    only="--density --movement-steps --steps --lr --seed",
    group="Training",
)
@options.settings(EvaluateSettings, only="--judge")
@options.settings(ComputeSettings)
@options.out
@options.max_asr("Name the smallest scale of the patch with an ASR of at most this rate")
@options.settings_file
@options.dry_run
def enhance_command(
    base: str, out: Path, max_asr: float | None, dry_run: bool, **values: Any
) -> None:
    """Make BASE safer: evaluate, score, train, evaluate again.

    OUT gets settings.json, before.json, map/, patch/, after.json, result.json, result.png and
    reproduce.json. Interrupted runs resume where they stopped. All options of `score`, `train` and
    `eval` can be set in --settings.
    """
    from safeweights_peft.jobs.enhance import enhance

    score, train, evaluate, compute = options.make_settings(
        values, ScoreSettings, TrainSettings, EvaluateSettings, ComputeSettings
    )
    if dry_run:
        return output.show_estimate(base, compute, score=score, train=train, evaluate=evaluate)
    with output.show_progress() as progress:
        run = RunSettings(base, score, train, evaluate, compute)
        result = enhance(run, out, progress, max_asr)
    _show_run(result, out, base)
    scale = result["sweep"]["scale"] if max_asr is not None else 1
    if scale == 0:
        click.echo(f"\nThe base meets --max-asr {max_asr:g} already, without a patch.", err=True)
    if scale is None:
        click.echo(f"\nAt no scale is the ASR at most --max-asr {max_asr:g}.", err=True)
        sys.exit(output.INCONCLUSIVE)


def _show_run(result: dict[str, Any], out: Path, base: str) -> None:
    """Draw and print what came of a run, and how to go on."""
    from safeweights_peft.study.pictures import plot_run
    from safeweights_peft.tables import comparison_rows, picked_row

    patch = out / "patch"
    trained = patch / "training.json"
    if trained.is_file():  # not where values were added
        losses = json.loads(trained.read_text(encoding="utf-8"))["losses"]
        output.draw(plot_run, result, losses, out / "result.png")
    output.show(result, comparison_rows(result))
    output.show_answers(result["answers"])
    output.show_outcome(Outcome(**result["outcome"]))
    picked = picked_row(result)
    at = f"@{picked['scale']:g}" if picked and picked["scale"] != 1 else ""
    click.echo(f"\nPatch in {patch}{at and f', to be used as {patch}{at}'}. Next:", err=True)
    # Others find a base by its Hub id, which a directory hasn't.
    shared = "USER/MODEL" if Path(base).is_dir() else base
    quoted = {
        "base": base,
        "patch": f"{patch}{at}",
        "settings": str(out / "settings.json"),
        "answers": f"{out}-answers.json",
        "merged": f"{out}-merged",
        "run": str(out),
        "shared": shared,
    }
    for line in _NEXT:
        words = {name: shlex.quote(text) for name, text in quoted.items()}
        click.echo(f"  safeweights {line.format(**words)}", err=True)


@options.command("score", resumes=True)
@options.base
@options.settings(ScoreSettings, ComputeSettings)
@options.out
@options.settings_file
@options.overwrite
@options.dry_run
def score_command(base: str, out: Path, overwrite: bool, dry_run: bool, **values: Any) -> None:
    """Find the weights of BASE that carry its safety.

    OUT becomes a safety map. Interrupted runs resume where they stopped.
    """
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.jobs.score import score
    from safeweights_peft.patch.io import inspect

    settings, compute = options.make_settings(values, ScoreSettings, ComputeSettings)
    if dry_run:
        return output.show_estimate(base, compute, score=settings)
    with output.show_progress() as progress:
        score(Job(base, compute, progress), out, settings, overwrite=overwrite)
    output.show_adapter(inspect(out), out)


@options.command("train", resumes=True)
@options.base
@options.settings(TrainSettings, ComputeSettings)
@options.safety_map("Safety map of BASE, as `score` writes it: directory or Hub id.")
@options.out
@options.settings_file
@options.overwrite
@options.dry_run
def train_command(
    base: str, map_dir: Path, out: Path, overwrite: bool, dry_run: bool, **values: Any
) -> None:
    """Train the weights of a safety map to refuse (SET).

    OUT becomes a safety patch. Interrupted runs resume from their last checkpoint.
    """
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.jobs.train import train
    from safeweights_peft.patch.io import inspect

    settings, compute = options.make_settings(values, TrainSettings, ComputeSettings)
    if dry_run:
        return output.show_estimate(base, compute, train=settings)
    with output.show_progress() as progress:
        job = Job(base, compute, progress, [map_dir])
        train(job, map_dir, out, settings, overwrite=overwrite)
    output.show_adapter(inspect(out), out)


@options.command("eval")
@options.base
@options.settings(EvaluateSettings, ComputeSettings)
@options.patch_to_add
@click.option("--out", type=options.NEW_FILE, help="New JSON file for the whole result.")
@options.max_asr("Exit with 3 if the ASR is above this rate.")
@options.settings_file
@options.dry_run
def eval_command(
    base: str,
    patch: tuple[Path, float] | None,
    out: Path | None,
    max_asr: float | None,
    dry_run: bool,
    **values: Any,
) -> None:
    """Measure ASR, over-refusal, KL to the base, perplexity.

    ASR, the attack success rate, is the fraction of harmful requests that BASE, or BASE with a
    patch, complies with; over-refusal is the fraction of benign ones that it refuses.
    """
    from safeweights_peft.files import check_new_file, write_json
    from safeweights_peft.jobs.evaluate import evaluate, pick_figures
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.tables import evaluation_rows, judge_rows

    settings, compute = options.make_settings(values, EvaluateSettings, ComputeSettings)
    if out:  # said now, not after the evaluation
        check_new_file(out, EvaluationError)
    adapter, scale = patch or (None, 1.0)
    if dry_run:
        return output.show_estimate(base, compute, evaluate=settings, adapter=adapter)
    with output.show_progress() as progress:
        job = Job(base, compute, progress, [adapter] if adapter else [])
        result = evaluate(job, adapter, settings, scale=scale)
    output.show(result, evaluation_rows(result), judge_rows(result))
    if garbage := find_garbage(pick_figures(result)):
        advice = SCALE_ADVICE if adapter else CHAT_ADVICE
        output.show_outcome(Outcome("garbage", f"{garbage}; {advice}"))
    if out:  # after it is shown: a full disk loses no evaluation
        write_json(out, result)
    if max_asr is not None and result["harmful"]["attack_success_rate"]["rate"] > max_asr:
        click.echo(f"ASR is above --max-asr {max_asr}", err=True)
        sys.exit(output.INCONCLUSIVE)


@options.command("preserve", resumes=True)
@options.base
@options.settings(
    *(PreserveSettings, EvaluateSettings), without="--task --max-new-tokens --keep-answers"
)
@options.settings(ComputeSettings)
@options.safety_map(options.OF_BASE + " Its weights stay, bit for bit.", required=False)
@click.option(
    "--data",
    required=True,
    help="Requests with answers to learn: a file, or a dataset ID[:CONFIG][:SPLIT].",
)
@options.out
@options.overwrite
@options.dry_run
def preserve_command(
    base: str,
    map_dir: Path | None,
    data: str,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    **values: Any,
) -> None:
    """Fine-tune BASE, but keep it as safe as it is.

    BASE answers harmful and benign requests first; while it learns, its own refusals and its
    benign answers are held. With --map, safety weights stay the same bits as well. With --method
    full, weights are trained in float32 and saved in BASE's own dtypes. With --method lora, OUT
    gets the LoRA and, for --map, a correction to load before it. With --judge, ASR and over-refusal
    are measured before and after. Interrupted runs resume from their last checkpoint.
    """
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.jobs.preserve import preserve_model
    from safeweights_peft.tables import judged_rows

    if map_dir is None and values["anchor"] is False:
        raise click.UsageError("Give --map, or leave --no-anchor out.")
    settings, evaluate, compute = options.make_settings(
        values, PreserveSettings, EvaluateSettings, ComputeSettings
    )
    measure, data = evaluate if values["judge"] else None, options.name_column(data, values)
    if dry_run:
        return output.show_estimate(base, compute, preserve=settings, evaluate=measure)
    with output.show_progress() as progress:
        job = Job(base, compute, progress, [map_dir] if map_dir else [])
        record = preserve_model(job, map_dir, data, out, settings, measure, overwrite=overwrite)
    losses = record.pop("losses")
    rows = [
        ("path", str(out)),
        ("base", record["base"]["name"]),
        *output.kept_rows(record),
        ("steps", str(len(losses))),
        ("loss", f"{losses[0]:.3f} at first, {losses[-1]:.3f} at last"),
    ]
    summary = {"path": str(out), **record, "first_loss": losses[0], "last_loss": losses[-1]}
    measured = judged_rows(record["before"], record["after"]) if measure else []
    output.show(summary, rows, [("", "before", "after"), *measured] if measured else [])


@options.command("repair", resumes=True)
@click.argument("tuned", help="Tuned model: directory or Hub id; or a LoRA's directory.")
@click.option("--patch", type=options.ADAPTER, help=_OLD)
@options.added
@options.settings(ScoreSettings, TrainSettings, EvaluateSettings, only=f"{_DATA} --task")
@options.repair_steps
@options.settings(ScoreSettings, TrainSettings, only="--lr --density --seed", group="Training")
@options.settings(EvaluateSettings, only="--judge")
@options.settings(ComputeSettings)
@click.option(
    "--base", help="Base of a LoRA: directory or Hub id.  [default: the one that it names]"
)
@options.out
@options.settings_file
@options.dry_run
def repair_command(
    tuned: str,
    out: Path,
    patch: Path | None,
    add_patch: float | None,
    base: str | None,
    dry_run: bool,
    **values: Any,
) -> None:
    """Make a fine-tuned model safe again by a short training.

    Trained are the weights of the old patch, or those that `score` finds in TUNED; benign answers
    stay TUNED's own. OUT gets a patch for TUNED and the figures before and after, as `enhance`
    leaves them. A LoRA is first merged into its base, as OUT/model, for which the patch then is.
    Interrupted runs resume where they stopped.
    """
    from safeweights_peft.jobs.repair import find_tuned, repair

    if patch and values["density"] is not None:
        raise click.UsageError("--density needs no --patch, whose weights are taken.")
    score, train, evaluate, compute = options.make_settings(
        values, ScoreSettings, TrainSettings, EvaluateSettings, ComputeSettings
    )
    if values["settings"] is None or values["steps"] is not None:
        train = replace(train, steps=values["steps"] or REPAIR_STEPS)
    if dry_run:
        steps = {"score": None if patch else score, "train": None if add_patch else train}
        source = find_tuned(tuned, base)[0]
        return output.show_estimate(source, compute, evaluate=evaluate, **steps)
    with output.show_progress() as progress:
        run = RunSettings(tuned, score, train, evaluate, compute)
        result = repair(run, out, progress, patch, add_patch=add_patch, base=base)
    _show_run(result, out, result["base"]["name"])


@options.command("protect")
@options.settings(EvaluateSettings, ComputeSettings)
@click.option("--tuned", type=options.DIRECTORY, help="Fine-tuned model, left as it is: directory.")
@click.option("--lora", help="LoRA trained on the base, instead of --tuned: directory or Hub id.")
@click.option(
    "--base", help="Base of --tuned: directory or Hub id.  [default: the one that --lora names]"
)
@options.safety_map("Safety map of the base, or safety patch merged into it: directory or Hub id.")
@options.out
@click.option("--merged", is_flag=True, help="Write a merged model, not LoRA and correction.")
@click.option(
    "--measure/--no-measure", default=True, show_default=True, help="Evaluate before and after."
)
@options.overwrite
def protect_command(
    tuned: Path | None,
    lora: str | None,
    base: str | None,
    map_dir: Path,
    out: Path,
    merged: bool,
    measure: bool,
    overwrite: bool,
    **values: Any,
) -> None:
    """Restore the safety weights of a fine-tuned model.

    For models that were fine-tuned without `preserve`; nothing is trained. Give --tuned and --base,
    or --lora.
    """
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.jobs.protect import protect_lora, protect_tuned
    from safeweights_peft.tables import judged_rows

    evaluate, compute = options.make_settings(values, EvaluateSettings, ComputeSettings)
    settings = evaluate if measure else None
    with output.show_progress() as progress:
        if tuned and base and not lora and not merged:
            job = Job(base, compute, progress, [map_dir])
            record = protect_tuned(job, tuned, map_dir, out, settings, overwrite=overwrite)
        elif lora and not tuned:
            record = protect_lora(
                *(lora, map_dir, out, base, settings, compute, progress),
                merged=merged,
                overwrite=overwrite,
            )
        else:
            raise click.UsageError("Give --tuned and --base, or --lora; --merged needs --lora.")
    changed = f"{record['changed']:,} of {record['entries']:,}"
    source = record["lora"] if lora else record["tuned"]
    measured = judged_rows(record["before"], record["after"]) if "before" in record else []
    rows = [
        ("", "before", "after"),
        ("path", source, record["out_dir"]),
        ("weights put back", "0", f"{changed}, by {record['largest_change']:g} at most"),
        *measured,
    ]
    output.show(record, rows)
