"""The command line: parse, call one function, print.

Results go to stdout, progress and messages to stderr. Commands import heavy packages inside, so
that ``--help`` and what needs no torch (inspecting, verifying, signing, merging) start without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from safeweights_peft.cli import look, make, share, use
from safeweights_peft.cli.failures import describe_failure
from safeweights_peft.cli.output import printable
from safeweights_peft.errors import SafeWeightsError

SECTIONS = {
    "Make": (make.enhance_command, make.score_command, make.train_command, make.eval_command),
    "Use": (
        *(use.merge_command, use.unmerge_command, use.convert_command, use.export_command),
        use.diff_command,
    ),
    "Fine-tune safely": (make.preserve_command, make.protect_command, make.repair_command),
    "Share": (share.push_command, share.pull_command, share.list_command),
    "Look": (
        *(look.inspect_command, look.report_command, look.compare_command, look.probe_command),
        *(look.sweep_command, look.chat_command),
    ),
    "Trust": (
        *(share.verify_command, share.sign_command, share.verify_signature_command),
        share.reproduce_command,
    ),
}
_EXAMPLES = """
\b
Examples:
  safeweights enhance MODEL --out run
  safeweights merge MODEL run/patch --out safer
  safeweights push run USER/NAME --base MODEL
"""

INTERRUPTED = 130  # as a shell says of a command that Ctrl-C has ended
_GOES_ON = ": the same command goes on from where it stopped."


class _Group(click.Group):
    """Lists commands by section, and turns errors into one line and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [str(command.name) for commands in SECTIONS.values() for command in commands]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.list_commands(ctx)))
        for heading, commands in SECTIONS.items():
            # The limit cuts nothing: a test holds every first line to what fits in 80 columns.
            helps = [command.get_short_help_str(formatter.width) for command in commands]
            names = [str(command.name).ljust(width) for command in commands]
            with formatter.section(heading):
                formatter.write_dl(list(zip(names, helps, strict=True)))

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt:  # click would call it aborted, with exit code 1
            click.echo("Interrupted.", err=True)
            sys.exit(INTERRUPTED)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            running = ctx.meta.get("command", ctx)
            resumes = getattr(running.command, "resumes", False) or running.params.get("in_place")
            resumes = resumes and not running.params.get("linear")  # `probe` of a few minutes
            click.echo(f"Interrupted{_GOES_ON if resumes else '.'}", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            # click ends quietly on a broken pipe, as `| head` leaves it.
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            line = str(error) if isinstance(error, SafeWeightsError) else _describe(ctx, error)
            if line is None:  # a bug, so its traceback is shown
                raise
            raise click.ClickException(printable(line)) from error

    def main(self, args: Sequence[str] | None = None, *others: Any, **extra: Any) -> Any:
        try:
            try:
                return super().main(args, *others, **extra)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # what was printed may not have been written yet
        except OSError as error:  # such as `--help > /dev/full`
            if "--debug" in (sys.argv if args is None else args):
                raise
            click.echo(f"Error: {describe_failure(error, 'stdout', ())}", err=True)
            # What is left in the buffer would fail once more when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def _describe(ctx: click.Context, error: Exception) -> str | None:
    running: click.Context = ctx.meta.get("command", ctx)
    flags = [flag for parameter in running.command.params for flag in parameter.opts]
    return describe_failure(error, running.params.get("out") or "stdout", flags)


@click.group(cls=_Group, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback when a command fails.")
@click.version_option(package_name="safeweights-peft")
def main(debug: bool) -> None:
    """Safety patches for language models: find, train, merge and share the weights that matter.

    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
    3 inconclusive, or a threshold was missed, 130 interrupted.
    """


for commands in SECTIONS.values():
    for command in commands:
        main.add_command(command)
