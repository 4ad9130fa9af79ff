"""The command line: parse, call one function, print.

Results go to stdout (``--json`` for scripts), progress and messages to stderr. Exit codes: 0 done,
1 failed, 2 wrong usage, 3 no clear yes; ``verify`` answers by them, see ``trust``. Heavy packages
are imported inside the commands, so that ``--help``, ``inspect``, ``compare``, ``verify``,
``sign``, ``merge`` and ``unmerge`` start without torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from safeweights_peft.cli.artifacts import (
    compare_command,
    inspect_command,
    merge_command,
    report_command,
    unmerge_command,
)
from safeweights_peft.cli.exchange import convert_command, diff_command, export_command
from safeweights_peft.cli.options import (
    FiniteRange,
    adapter,
    compute_options,
    compute_settings,
    dry_run,
    evaluate_options,
    evaluate_settings,
    existing,
    harmful_train,
    json_output,
    map_of_base,
    new_file,
    out_directory,
    overwrite,
    preserve_options,
    preserve_settings,
    probe_options,
    probe_settings,
    request_options,
    score_options,
    score_settings,
    seed,
    train_options,
    train_settings,
)
from safeweights_peft.cli.output import (
    NO_CLEAR_YES,
    printable,
    show,
    show_adapter,
    show_estimate,
    show_preserved,
    show_probe,
    show_progress,
    show_protected,
    show_run,
)
from safeweights_peft.cli.reproducing import reproduce_command
from safeweights_peft.cli.sharing import list_command, pull_command, push_command
from safeweights_peft.cli.trust import sign_command, verify_command, verify_signature_command
from safeweights_peft.errors import EvaluationError, SafeWeightsError


class _Group(click.Group):
    """Turns the package's errors and the system's into one line and exit code 1.

    ``--debug`` shows the traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (SafeWeightsError, OSError) as error:  # the system's: a full disk, no permission
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(printable(str(error))) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback when a command fails.")
@click.version_option(package_name="safeweights-peft")
def main(debug: bool) -> None:
    """Safety patches for language models: find, train, check and merge the weights that matter.

    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no
    clear yes: an ASR above --max-asr, a verify that can't tell.
    """


@main.command("enhance")
@click.argument("base")
@out_directory
@harmful_train
@score_options
@train_options
@evaluate_options
@seed
@compute_options
@dry_run
@json_output
def enhance_command(base: str, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Make BASE safer: evaluate, score, train, evaluate again.

    BASE is a model's directory or Hub id. OUT gets settings.json, before.json, map/, patch/,
    after.json, result.json, result.png and reproduce.json. An interrupted run goes on when called
    again: with the step that it was in, scoring and training from where they stopped.
    """
    from safeweights_peft.jobs.enhance import enhance_model
    from safeweights_peft.jobs.estimate import estimate

    score, train = score_settings(options), train_settings(options)
    evaluate, compute = evaluate_settings(options), compute_settings(options)
    if dry_run:
        needs = estimate(
            base, score=score, train=train, evaluate=evaluate, evaluations=3, compute=compute
        )
        return show_estimate(needs, as_json)
    with show_progress() as progress:
        result = enhance_model(base, out, score, train, evaluate, compute, progress)
    show_run(result, out, as_json)


@main.command("score")
@click.argument("base")
@out_directory
@harmful_train
@score_options
@seed
@compute_options
@overwrite
@dry_run
@json_output
def score_command(
    base: str, out: Path, overwrite: bool, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Find the weights of BASE that carry its safety; write them as a safety map."""
    from safeweights_peft.jobs.estimate import estimate
    from safeweights_peft.jobs.score import score
    from safeweights_peft.patch.io import inspect

    settings, compute = score_settings(options), compute_settings(options)
    if dry_run:
        return show_estimate(estimate(base, score=settings, compute=compute), as_json)
    with show_progress() as progress:
        score(base, out, settings, compute, progress, overwrite=overwrite)
    show_adapter(inspect(out), out, as_json)


@main.command("train")
@click.argument("base")
@click.option("--map", "map_dir", required=True, type=adapter, help="Safety map made by `score`.")
@out_directory
@harmful_train
@train_options
@seed
@compute_options
@overwrite
@dry_run
@json_output
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
    from safeweights_peft.jobs.estimate import estimate
    from safeweights_peft.jobs.train import train
    from safeweights_peft.patch.io import inspect

    settings, compute = train_settings(options), compute_settings(options)
    if dry_run:
        return show_estimate(estimate(base, train=settings, compute=compute), as_json)
    with show_progress() as progress:
        train(base, map_dir, out, settings, compute, progress, overwrite=overwrite)
    show_adapter(inspect(out), out, as_json)


@main.command("preserve")
@click.argument("base")
@map_of_base
@click.option(
    "--data",
    required=True,
    help="Requests with answers to learn: a .json/.jsonl file, a datasets id, or builtin:NAME.",
)
@out_directory
@preserve_options
@seed
@compute_options
@overwrite
@dry_run
@json_output
def preserve_command(
    base: str,
    map_dir: Path,
    data: str,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune BASE, but for the weights of a safety map or patch (SPA); write model or LoRA.

    In full, weights are trained in float32 and written in BASE's own dtypes, those of the map bit
    for bit as they were. By LoRA, OUT gets the adapter and a correction, to be loaded first. An
    interrupted training goes on from its last checkpoint when called again.
    """
    from safeweights_peft.jobs.estimate import estimate
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.jobs.preserve import preserve_model

    settings, compute = preserve_settings(options), compute_settings(options)
    if dry_run:
        needs = estimate(base, preserve=settings, data=data, compute=compute)
        return show_estimate(needs, as_json)
    with show_progress() as progress:
        job = Job(base, compute, progress)
        record = preserve_model(job, map_dir, data, out, settings, overwrite=overwrite)
    show_preserved(record, out, as_json)


@main.command("protect")
@click.option(
    "--tuned", type=existing, help="Fine-tuned checkpoint, all its weights; it is left as it is."
)
@click.option("--lora", help="LoRA that was trained on the base, in place of --tuned: path or id.")
@click.option("--base", help="What was tuned: directory or Hub id.  [default: what --lora names]")
@click.option(
    "--map",
    "map_dir",
    required=True,
    type=adapter,
    help="Safety map of the base, or safety patch that is merged into it.",
)
@out_directory
@click.option(
    "--merged", is_flag=True, help="With --lora: write a merged model, not LoRA and correction."
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Whether to ask the model requests before and after.",
)
@evaluate_options
@compute_options
@overwrite
@json_output
def protect_command(
    tuned: Path | None,
    lora: str | None,
    base: str | None,
    map_dir: Path,
    out: Path,
    merged: bool,
    measure: bool,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Give a fine-tuned model the safety weights of its base back; nothing is trained.

    For what was trained without `preserve`. With --task, the loss on it is measured too.
    """
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.jobs.protect import protect_lora, protect_tuned

    settings, compute = evaluate_settings(options) if measure else None, compute_settings(options)
    with show_progress() as progress:
        if tuned and base and not lora and not merged:
            job = Job(base, compute, progress)
            record = protect_tuned(job, tuned, map_dir, out, settings, overwrite=overwrite)
        elif lora and not tuned:
            record = protect_lora(
                lora,
                map_dir,
                out,
                base,
                settings,
                compute,
                progress,
                merged=merged,
                overwrite=overwrite,
            )
        else:
            raise click.UsageError("Give --tuned and --base, or --lora, to which --merged belongs.")
    show_protected(record, as_json)


@main.command("eval")
@click.argument("base")
@click.option("--adapter", type=adapter, help="Safety patch to be merged before measuring.")
@click.option("--out", type=new_file, help="New JSON file to be written with the whole result.")
@click.option("--max-asr", type=FiniteRange(0, 1), help="Exit with 3 if the ASR is above this.")
@evaluate_options
@compute_options
@dry_run
@json_output
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
    from safeweights_peft.jobs.estimate import estimate
    from safeweights_peft.jobs.evaluate import evaluate
    from safeweights_peft.jobs.job import Job
    from safeweights_peft.tables import evaluation_rows

    settings, compute = evaluate_settings(options), compute_settings(options)
    if out and out.exists():
        raise EvaluationError(f"{out}: expected no file there, found one; give --out another name")
    if dry_run:
        runs = 3 if adapter else 1
        needs = estimate(base, evaluate=settings, evaluations=runs, compute=compute)
        return show_estimate(needs, as_json)
    with show_progress() as progress:
        result = evaluate(Job(base, compute, progress), adapter, settings)
    if out:
        write_json(out, result)
    show(result, evaluation_rows(result), as_json)
    if max_asr is not None and result["harmful"]["attack_success_rate"]["rate"] > max_asr:
        click.echo(f"ASR is above --max-asr {max_asr}", err=True)
        sys.exit(NO_CLEAR_YES)


@main.command("probe")
@click.argument("base")
@map_of_base
@out_directory
@probe_options
@request_options
@seed
@compute_options
@overwrite
@dry_run
@json_output
def probe_command(
    base: str,
    map_dir: Path,
    out: Path,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Perturb the weights of a safety map of BASE: does it stop refusing, and only then?

    BASE should refuse, such as a model with a patch merged in. In memory, noise or zeros are put
    at the map's weights, and at as many random ones and ones of lowest score. OUT gets probe.json
    and probe.png. An interrupted probe goes on where it stopped when called again.
    """
    from safeweights_peft.jobs.estimate import estimate
    from safeweights_peft.settings import ScoreSettings
    from safeweights_peft.study.probe import count_evaluations, probe

    settings, score = probe_settings(options), ScoreSettings(seed=options["seed"])
    evaluate, compute = evaluate_settings(options), compute_settings(options)
    if dry_run:
        runs = count_evaluations(settings)
        needs = estimate(base, score=score, evaluate=evaluate, evaluations=runs, compute=compute)
        return show_estimate(needs, as_json)
    with show_progress() as progress:
        result = probe(
            *(base, map_dir, out, settings, score, evaluate, compute, progress),
            overwrite=overwrite,
        )
    show_probe(result, as_json)


for each in (
    merge_command,
    unmerge_command,
    inspect_command,
    report_command,
    compare_command,
    verify_command,
    sign_command,
    verify_signature_command,
    convert_command,
    diff_command,
    export_command,
    reproduce_command,
    push_command,
    pull_command,
    list_command,
):
    main.add_command(each)
