"""Write docs/cli.md from the --help of every command, so that the two can't disagree.

python docs/generate_cli.py            write the page
python docs/generate_cli.py --check    exit with 1 if the page is out of date
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 90
HEADER = """\
# The command line

Written by `make docs` from the commands' own `--help`: change the text there, in
`safeweights_peft/cli/`.
"""


def walk(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """Render a section for a command, and one for each below it."""
    # Both widths, so that the page doesn't depend on the terminal that wrote it.
    widths = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    context = command.make_context(name, [], parent, resilient_parsing=True, **widths)
    heading = "##" if parent is None else "###"
    yield f"{heading} `{context.command_path}`\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from walk(command.commands[child], child, context)


def render() -> str:
    """Render the page as Markdown."""
    from safeweights_peft.cli import main

    return "\n".join([HEADER, *walk(main, "safeweights")])


def run(check: bool) -> None:
    """Write the page, or compare it with what would be written."""
    page = render()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE}: expected the commands' --help, found other text; run `make docs`")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"usage: {sys.argv[0]} [--check]")
    run(check=bool(sys.argv[1:]))
