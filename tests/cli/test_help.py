"""Every command and every option says what it does."""

import click
import pytest

from safeweights_peft.cli import main
from tests.cli.conftest import call

COMMANDS = sorted(main.commands)


def options_of(command: click.Command) -> list[click.Option]:
    return [each for each in command.params if isinstance(each, click.Option)]


def test_the_commands_are_the_steps_of_the_work() -> None:
    jobs = [
        "compare",
        "convert",
        "diff",
        "enhance",
        "eval",
        "export",
        "inspect",
        "list",
        "merge",
        "preserve",
        "probe",
        "protect",
        "pull",
        "push",
        "report",
        "reproduce",
        "score",
        "sign",
        "train",
        "unmerge",
        "verify",
        "verify-signature",
    ]
    assert jobs == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_help_page(command: str) -> None:
    called = call(command, "--help")
    assert called.exit_code == 0
    assert called.stderr == ""
    assert main.commands[command].help.splitlines()[0] in " ".join(called.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    options = options_of(main.commands[command])
    assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_is_named_in_the_help_text(command: str) -> None:
    arguments = [each for each in main.commands[command].params if isinstance(each, click.Argument)]
    assert arguments or command in ("list", "protect")  # which take options alone
    text = main.commands[command].help
    assert [each.name for each in arguments if each.human_readable_name not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_print_json(command: str) -> None:
    assert "--json" in [name for each in options_of(main.commands[command]) for name in each.opts]


@pytest.mark.parametrize(
    "command",
    ["enhance", "eval", "merge", "preserve", "probe", "reproduce", "score", "train"],
)
def test_every_command_that_takes_long_has_a_dry_run(command: str) -> None:
    options = options_of(main.commands[command])
    assert "--dry-run" in [name for each in options for name in each.opts]


def test_the_help_page_tells_the_exit_codes() -> None:
    text = " ".join(call("--help").stdout.split())
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no clear yes: " in text
    text = " ".join(call("verify", "--help").stdout.split())
    assert "Exit codes: 0 verified, 1 failed, 2 unreadable, 3 can't tell" in text
