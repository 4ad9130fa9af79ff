"""Writes docs/cli.md out of the --help of every command, so that the two cannot disagree.

python docs/generate_cli.py            writes the page
python docs/generate_cli.py --check    exits with 1 if the page is not what would be written
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
    """Render a command and everything below it.

    Args:
        command: the command or group.
        name: what a user types for it.
        parent: context of the group that holds it.

    Yields:
        One section per command, the command itself first.
    """
    # Both widths, so that the page doesn't depend on the terminal that wrote it.
    context = command.make_context(
        name,
        [],
        parent,
        resilient_parsing=True,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
    )
    heading = "##" if parent is None else "###"
    yield f"{heading} `{context.command_path}`\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            below = command.get_command(context, child)
            if below is not None and not below.hidden:
                yield from walk(below, child, context)


def render() -> str:
    """Render the whole page.

    Returns:
        Markdown that ends in one newline.
    """
    from safeweights_peft.cli import main

    return "\n".join([HEADER, *walk(main, "safeweights")])


def run(check: bool) -> None:
    """Write the page, or compares it with what would be written.

    Args:
        check: compare instead of write.
    """
    wanted = render()
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
        sys.exit(f"{PAGE}: expected the commands' --help, found other text; run `make docs`")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"usage: {sys.argv[0]} [--check]")
    run(check=bool(sys.argv[1:]))
