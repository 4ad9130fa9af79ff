"""The command line: parse, call one function, print.

Results go to stdout, progress and messages to stderr. Commands import heavy packages inside, so
that ``--help`` and what needs no torch (inspecting, verifying, signing, merging) start without it.
"""

from __future__ import annotations

from typing import Any

import click

from safeweights_peft.cli import look, make, share, use
from safeweights_peft.cli.output import printable
from safeweights_peft.errors import SafeWeightsError

SECTIONS = {
    "Make": (make.enhance_command, make.score_command, make.train_command, make.eval_command),
    "Use": (
        *(use.merge_command, use.unmerge_command, use.convert_command, use.export_command),
        use.diff_command,
    ),
    "Fine-tune safely": (make.preserve_command, make.protect_command),
    "Share": (share.push_command, share.pull_command, share.list_command),
    "Look": (look.inspect_command, look.report_command, look.compare_command, look.probe_command),
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

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        # OSError is the system's: a full disk, no permission. Anything else is a bug, so its
        # traceback is shown.
        except (SafeWeightsError, OSError) as error:
            # click ends quietly on a broken pipe, as `| head` leaves it.
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(printable(str(error))) from error


@click.group(cls=_Group, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show a traceback when a command fails.")
@click.version_option(package_name="safeweights-peft")
def main(debug: bool) -> None:
    """Safety patches for language models: find, train, merge and share the weights that matter.

    Results go to stdout, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage,
    3 inconclusive, or a threshold was missed.
    """


for commands in SECTIONS.values():
    for command in commands:
        main.add_command(command)
