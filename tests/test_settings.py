"""Every setting keeps its range, in Python as on the command line, and comes back from a file."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from safeweights_peft.errors import SettingsError
from safeweights_peft.schema import Settings, flatten, restore, settings_of, to_json
from safeweights_peft.settings import (
    ComputeSettings,
    EvaluateSettings,
    Method,
    PreserveSettings,
    ProbeSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)

KINDS = [
    ComputeSettings,
    EvaluateSettings,
    PreserveSettings,
    ProbeSettings,
    ScoreSettings,
    TrainSettings,
]
RUN = RunSettings("base", ScoreSettings(density=0.5, method=Method.RANDOM), TrainSettings(steps=3))


def numbers() -> list[tuple[type[Settings], str]]:
    return [
        (settings, name)
        for settings in KINDS
        for name, kind in ((setting.name, setting.kind) for setting in settings_of(settings))
        if kind in (int, float)
    ]


@pytest.mark.parametrize(("settings", "name"), numbers())
@pytest.mark.parametrize("value", [math.nan, math.inf, -1, True, "1"])
def test_a_number_out_of_range_or_of_another_type_is_refused_by_name(
    settings: type[Settings], name: str, value: Any
) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: expected "):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (ScoreSettings, {"density": 0}, "a number above 0 and at most 1, found 0; choose"),
        (ScoreSettings, {"density": 1.5}, "a number above 0 and at most 1, found 1.5"),
        (ScoreSettings, {"method": "best"}, "one of esi, fisher, .*, found 'best'"),
        (ScoreSettings, {"harmful": None}, "expected str, found None"),
        (TrainSettings, {"steps": 0}, "a number at least 1, found 0"),
        (TrainSettings, {"steps": 1.5}, "expected int, found 1.5"),
        (TrainSettings, {"learning_rate": math.nan}, "a number above 0 or 'auto', found nan"),
        (TrainSettings, {"learning_rate": "best"}, "expected float or 'auto', found 'best'"),
        (TrainSettings, {"boundary_fraction": 1.1}, "a number above 0 and at most 1, found 1.1"),
        (
            TrainSettings,
            {"hinge_weight": 1, "hinge_tokens": 4},
            "expected more than answer_tokens, 8",
        ),
        (ComputeSettings, {"dtype": "int8"}, "one of auto, float32, bfloat16, float16, found"),
        (EvaluateSettings, {"keep_answers": 1}, "expected bool, found 1"),
        (EvaluateSettings, {"judge": "refusals"}, "at least one, and none twice, found 'refusals'"),
        (EvaluateSettings, {"judge": ()}, r"at least one, and none twice, found \(\)"),
        (EvaluateSettings, {"judge": ["a", "a"]}, "at least one, and none twice, found"),
        (EvaluateSettings, {"judge": [1]}, "expected str, found 1"),
    ],
)
def test_a_refusal_says_what_is_allowed(
    settings: type[Settings], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(**change)


def test_several_texts_come_back_from_json_as_they_were() -> None:
    settings = EvaluateSettings(judge=("refusals", "guard:g"))
    assert EvaluateSettings(**to_json(settings)) == settings
    assert flatten(settings)["judge"] == ["refusals", "guard:g"]


def test_an_enum_may_be_given_by_its_value() -> None:
    assert ScoreSettings(method="random").method is Method.RANDOM  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [ScoreSettings, TrainSettings, PreserveSettings])
def test_a_seed_is_one_that_numpy_takes(settings: type[Settings]) -> None:
    settings(seed=2**32 - 1)
    with pytest.raises(SettingsError, match=r"seed: expected a number .* at most 4294967295"):
        settings(seed=2**32)


def test_a_whole_number_is_a_float() -> None:
    assert ScoreSettings(density=1).density == 1


@pytest.mark.parametrize("settings", KINDS)
def test_every_setting_has_help_and_a_flag_of_its_own(settings: type[Settings]) -> None:
    options = settings_of(settings)
    assert all(option.help.strip() for option in options)
    assert len({option.flag for option in options}) == len(options)


def test_settings_come_back_from_json_as_they_were() -> None:
    assert restore(RunSettings, json.loads(json.dumps(asdict(RUN))), "here") == RUN


def test_a_settings_file_may_be_toml_and_leave_defaults_out(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[score]\ndensity = 0.5\nmethod = "random"\n\n[train]\nsteps = 3\n')
    assert RunSettings.read(path, base="base") == RUN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsteps = 0\n", "train.steps: expected a number at least 1, found 0"),
        ("[train]\nstep = 1\n", "train: expected harmful, benign, .* found step beside them;"),
        ("[train]\nsteps = 1.5\n", "train.steps: expected int, found 1.5"),
        ("train = 1\n", "train: expected harmful, benign"),
        ("nothing", "expected settings in TOML or JSON"),
    ],
)
def test_a_settings_file_is_refused_by_the_name_of_what_is_wrong(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        RunSettings.read(path, base="base")


def test_a_record_of_another_version_is_refused_by_what_differs() -> None:
    record = asdict(RUN)
    record["train"] = {"enhance": record["train"].pop("steps"), **record["train"]}
    with pytest.raises(SettingsError, match="found enhance beside them and no steps; use the ver"):
        restore(RunSettings, record, "here")


def test_a_record_that_is_older_than_a_setting_was_made_without_it() -> None:
    record = asdict(RUN)
    for name in ("boundary", "boundary_fraction", "step_gain", "hinge_weight", "hinge_tokens"):
        del record["train"][name]
    del record["train"]["shrink"]
    for name in ("benign", "benign_examples", "granularity", "movement_steps"):
        del record["score"][name]
    before = replace(RUN, train=replace(RUN.train, shrink=0.0))
    assert restore(RunSettings, record, "here") == before


def test_auto_is_none_in_python_in_toml_and_in_records(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[train]\nlearning_rate = "auto"\n')
    settings = TrainSettings(learning_rate="auto")  # type: ignore[arg-type]
    assert settings.learning_rate is None
    assert settings == TrainSettings(learning_rate=None) == RunSettings.read(path).train
    assert restore(TrainSettings, to_json(settings), "here") == settings


def test_settings_of_parts_are_named_by_their_path() -> None:
    assert flatten(RUN)["score.density"] == 0.5
    assert flatten(RUN)["base"] == "base"
