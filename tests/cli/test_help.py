"""Every command, argument and option says what it does, and the list of commands fits a screen."""

import click
import pytest
from click.testing import CliRunner

from safeweights_peft.cli import SECTIONS, main

COMMANDS = sorted(main.commands)
ENHANCE = [
    *("--harmful", "--benign", "--eval-harmful", "--eval-benign", "--limit", "--column"),
    *(
        "--density",
        "--movement-steps",
        "--steps",
        "--lr",
        "--seed",
        "--judge",
        "--device",
        "--dtype",
        "--revision",
    ),
    *("--trust-remote-code", "--system-prompt", "--chat-template", "--answer-prefix"),
    *("--out", "--max-asr", "--settings", "--dry-run", "--json"),
]


def options_of(command: str) -> list[click.Option]:
    return [option for option in main.commands[command].params if isinstance(option, click.Option)]


def flags_of(command: str) -> list[str]:
    return [flag for option in options_of(command) for flag in option.opts]


def lines_of(*arguments: str) -> list[str]:
    """The help page of a command on a terminal of 80 columns."""
    called = CliRunner(env={"COLUMNS": "80"}).invoke(main, [*arguments, "--help"])
    assert called.exit_code == 0
    assert called.stderr == ""
    return called.stdout.splitlines()


def test_the_commands_are_listed_by_what_they_are_for() -> None:
    names = {
        heading: [command.name for command in commands] for heading, commands in SECTIONS.items()
    }
    assert names == {
        "Make": ["enhance", "score", "train", "eval"],
        "Use": ["merge", "unmerge", "convert", "export", "diff"],
        "Fine-tune safely": ["preserve", "protect", "repair"],
        "Share": ["push", "pull", "list"],
        "Look": ["inspect", "report", "compare", "probe", "sweep", "chat"],
        "Trust": ["verify", "sign", "verify-signature", "reproduce"],
    }
    headings = [line.rstrip(":") for line in lines_of() if line.endswith(":") and line[0] != " "]
    assert headings == ["Options", *names]
    assert sorted(main.commands) == sorted(name for some in names.values() for name in some)


def test_no_command_s_line_is_cut_or_wrapped_at_80_columns() -> None:
    lines = lines_of()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        first = (main.commands[name].help or "").splitlines()[0]
        assert line.split(maxsplit=1)[1] == first
        assert len(line) <= 79


def test_the_list_of_commands_ends_in_three_examples() -> None:
    assert [line.split()[1] for line in lines_of()[-3:]] == ["enhance", "merge", "push"]


def test_enhance_shows_few_options_by_group_and_ends_in_two_examples() -> None:
    assert flags_of("enhance") == ENHANCE
    lines = lines_of("enhance")
    headings = [line.rstrip(":") for line in lines if line.endswith(":") and line[0] != " "]
    assert headings == [
        "Positional arguments",
        "Data",
        "Training",
        "Evaluation",
        "Compute",
        "Chat",
        "Options",
    ]
    assert [line.split()[:2] for line in lines[-2:]] == [["safeweights", "enhance"]] * 2


def test_every_setting_of_a_run_is_an_option_of_the_command_for_its_step() -> None:
    assert {"--guard", "--classifier", "--contrast", "--layers-per-pass"} < set(flags_of("score"))
    assert {"--retain-weight", "--token-decay", "--benign-batch-size"} < set(flags_of("train"))
    assert {"--task", "--max-new-tokens", "--batch-size"} < set(flags_of("eval"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_help_page(command: str) -> None:
    text = " ".join(" ".join(lines_of(command)).split())
    assert (main.commands[command].help or "").splitlines()[0] in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_and_option_is_explained(command: str) -> None:
    parameters = main.commands[command].params
    assert [parameter.name for parameter in parameters if not parameter.help] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_reads_a_file_or_a_model_says_what_it_may_be(command: str) -> None:
    reads = ("harmful", "benign", "contrast", "task", "data", "guard", "classifier", "base")
    reads += ("guard_profile", "map_dir", "adapter", "lora", "tuned", "merged", "key", "settings")
    kinds = ("file", "directory", ".json", "Hub id", "LABEL")
    options = [option for option in options_of(command) if option.name in reads]
    assert [o.name for o in options if o.type.name != "boolean" and not says(o, kinds)] == []


def says(option: click.Option, kinds: tuple[str, ...]) -> bool:
    return any(kind in (option.help or "") for kind in kinds)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_print_json(command: str) -> None:
    assert "--json" in flags_of(command)


@pytest.mark.parametrize(
    "command",
    ["enhance", "eval", "merge", "preserve", "probe", "repair", "reproduce", "score", "train"],
)
def test_every_command_that_takes_long_has_a_dry_run(command: str) -> None:
    assert "--dry-run" in flags_of(command)


def test_the_help_page_tells_the_exit_codes() -> None:
    text = " ".join(" ".join(lines_of()).split())
    assert "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 inconclusive, or a threshold" in text
    text = " ".join(" ".join(lines_of("verify")).split())
    assert "Exit codes: 0 verified, 1 failed, 2 unreadable, 3 can't tell" in text
