"""Options are made of settings: they refuse what the settings refuse, and a file gives the rest."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import click
import pytest

from safeweights_peft.cli import main
from safeweights_peft.errors import SettingsError
from safeweights_peft.schema import Setting, Settings, settings_of
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    PreserveSettings,
    ProbeSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)
from tests.cli.conftest import Run, call

JOBS: dict[str, list[type[Settings]]] = {
    "enhance": [ScoreSettings, TrainSettings, EvaluateSettings, ComputeSettings],
    "score": [ScoreSettings, ComputeSettings],
    "train": [TrainSettings, ComputeSettings],
    "eval": [EvaluateSettings, ComputeSettings],
    "preserve": [PreserveSettings, EvaluateSettings, ComputeSettings],
    "protect": [EvaluateSettings, ComputeSettings],
    "repair": [EvaluateSettings, ComputeSettings],
    "probe": [ProbeSettings, EvaluateSettings, ComputeSettings],
}
WRONG = {int: (0, -1, 10**400), float: (math.nan, math.inf, -math.inf, -1.0)}


def flags_of(command: str) -> set[str]:
    return {flag for parameter in main.commands[command].params for flag in parameter.opts}


def numbers() -> list[tuple[str, type[Settings], Setting]]:
    return [
        (command, job, setting)
        for command, jobs in JOBS.items()
        for job in jobs
        for setting in settings_of(job)
        if setting.kind in WRONG and setting.flag in flags_of(command)
    ]


def refusal(job: type[Settings], name: str, value: float) -> str | None:
    try:
        job(**{name: value})
    except SettingsError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("command", "job", "setting"), numbers())
def test_a_number_is_refused_on_the_command_line_as_in_python(
    command: str, job: type[Settings], setting: Setting
) -> None:
    refusals = {value: refusal(job, setting.name, value) for value in WRONG[setting.kind]}
    assert any(refusals.values())
    for value, message in refusals.items():
        if message is not None:
            called = call(command, setting.flag, value)
            assert called.exit_code == 2
            text = message.removeprefix(f"{setting.name}: ")
            assert f"Invalid value for '{setting.flag}': {text}" in called.stderr


@pytest.mark.parametrize("command", ["enhance", "train"])
def test_a_rate_is_a_number_or_auto(command: str) -> None:
    called = call(command, "--lr", "fast")
    assert called.exit_code == 2
    assert "Invalid value for '--lr': 'fast' is not a valid float" in called.stderr
    called = call(command, "--lr", "auto")
    assert called.exit_code == 2
    assert "Missing argument 'BASE'" in called.stderr


def test_auto_comes_before_the_rate_of_a_file(run: Run) -> None:
    arguments = ["--settings", run.out / "settings.json", "--out", run.out, "--lr", "auto"]
    called = call("enhance", run.base, *arguments)
    assert called.exit_code == 1
    assert " there, None here);" in called.stderr


def test_every_number_that_a_command_takes_has_a_range() -> None:
    free = [
        (name, option.opts[0])
        for name, command in main.commands.items()
        for option in command.params
        if option.type in (click.INT, click.FLOAT)
        if call(name, option.opts[0], "nan").exit_code != 2
        or call(name, option.opts[0], "-1").exit_code != 2
    ]
    assert free == []


@pytest.mark.parametrize("command", JOBS)
def test_a_choice_that_is_none_is_wrong_usage(command: str) -> None:
    called = call(command, "--dtype", "int8")
    assert called.exit_code == 2
    assert "Invalid value for '--dtype': 'int8' is not one of 'auto', 'float32'" in called.stderr


def test_options_come_before_the_file_and_the_file_before_defaults(run: Run) -> None:
    settings = RunSettings.read(run.out / "settings.json")
    assert settings.score.examples == 4  # of the file
    assert settings.score.density == 0.1  # of an option
    assert settings.score.batch_size == ScoreSettings().batch_size
    assert settings.score.harmful == settings.train.harmful  # one option for both


def test_an_option_changes_what_the_file_says(run: Run) -> None:
    arguments = ["--settings", run.out / "settings.json", "--out", run.out, "--density", "0.2"]
    called = call("enhance", run.base, *arguments)
    assert called.exit_code == 1
    assert "other score.density (0.1 there, 0.2 here);" in called.stderr


@pytest.mark.parametrize("form", ["json", "toml"])
def test_the_settings_that_a_run_leaves_give_the_same_run(
    form: str, run: Run, tmp_path: Path
) -> None:
    path = run.out / "settings.json"
    if form == "toml":
        path = tmp_path / "settings.toml"
        path.write_text(as_toml(RunSettings.read(run.out / "settings.json")))
    called = call("enhance", run.base, "--settings", path, "--out", run.out, "--json")
    assert called.exit_code == 0, called.output  # other settings would be refused
    assert called.stdout == run.called.stdout


def as_toml(settings: RunSettings) -> str:
    parts = [part for part in asdict(settings).items() if part[0] != "base"]
    return "\n".join(
        f"{part}.{name} = {json.dumps(value)}"
        for part, values in parts
        for name, value in values.items()
        if value is not None
    )


def test_a_step_takes_its_part_of_the_settings_of_a_run(run: Run, tmp_path: Path) -> None:
    called = call(
        *("score", run.base, "--settings", run.out / "settings.json", "--out", tmp_path / "map")
    )
    assert called.exit_code == 0, called.output
    tensors = [
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path / "map", run.out / "map")
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.steps = 0", "train.steps: expected a number at least 1, found 0"),
        ("train.step = 1", "train: expected harmful, benign, boundary"),
        ("steps = 1", "expected base, score, train, evaluate, compute, found steps beside them"),
        ("steps", "expected settings in TOML or JSON"),
    ],
)
def test_a_settings_file_that_is_wrong_is_wrong_usage(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    called = call("enhance", "base", "--out", tmp_path / "run", "--settings", path)
    assert called.exit_code == 2
    assert f"Invalid value for '--settings': {path}" in called.stderr
    assert message in called.stderr
