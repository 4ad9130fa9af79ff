"""The protecting job: safety weights are put back, and what that did is measured."""

import json
from pathlib import Path

import pytest

from safeweights_peft.errors import DataError
from safeweights_peft.fetching import BaseModel
from safeweights_peft.files import read_json
from safeweights_peft.jobs.evaluate import evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.protect import protect_tuned
from safeweights_peft.jobs.score import score
from safeweights_peft.merging.verify import verify
from safeweights_peft.settings import ComputeSettings, EvaluateSettings, Method
from tests.jobs.conftest import Run
from tests.tiny_jobs import Recorder, Requests


@pytest.fixture(scope="module")
def tuned(run: Run, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, tuned without regard to most of its map: under one of a few other weights."""
    folder = tmp_path_factory.mktemp("tuned")
    score(Job(run.base), folder / "map", requests.score(density=0.01, method=Method.BOTTOM))
    out = folder / "model"
    preserve_model(Job(run.base), folder / "map", requests.lessons, out, requests.preserve())
    return out


@pytest.fixture
def settings(requests: Requests) -> EvaluateSettings:
    return requests.evaluate(task=requests.lessons)


def test_the_maps_weights_are_the_bases_again(run: Run, tuned: Path, tmp_path: Path) -> None:
    assert not verify(run.out / "map", tuned).ok
    protect_tuned(Job(run.base), tuned, run.out / "map", tmp_path / "out")
    assert verify(run.out / "map", tmp_path / "out").ok


def test_the_record_holds_what_both_models_were_measured_at(
    run: Run, tuned: Path, settings: EvaluateSettings, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    record = protect_tuned(Job(run.base), tuned, run.out / "map", out, settings)
    for stage, model in (("before", tuned), ("after", out)):
        alone = evaluate(Job(model), None, settings)
        assert record[stage]["attack_success_rate"] == alone["harmful"]["attack_success_rate"]
        assert record[stage]["task_loss"] == alone["task"]["loss"]
    assert record["before"]["task_loss"] != record["after"]["task_loss"]
    assert read_json(out / "protecting.json", DataError) == json.loads(json.dumps(record))


def test_nothing_is_measured_unless_asked(run: Run, tuned: Path, tmp_path: Path) -> None:
    progress = Recorder()
    out = tmp_path / "out"
    record = protect_tuned(Job(run.base, progress=progress), tuned, run.out / "map", out)
    assert [entry[0] for entry in progress.tasks] == ["Copy the tuned model"]
    assert "before" not in record


def test_missing_requests_are_noticed_before_anything_is_written(
    run: Run, tuned: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.evaluate(task=str(tmp_path / "missing.json"))
    with pytest.raises(DataError, match=r"missing\.json"):
        protect_tuned(Job(run.base), tuned, run.out / "map", tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_the_revision_of_a_base_on_the_hub_is_asked_of_the_base_alone(
    run: Run, tuned: Path, settings: EvaluateSettings, tmp_path: Path
) -> None:
    base = BaseModel("someone/base", run.base, "0123abc")
    job = Job(base, ComputeSettings(revision="main"))
    record = protect_tuned(job, tuned, run.out / "map", tmp_path / "out", settings)
    assert record["base"]["revision"] == "0123abc"
    assert record["before"]["task_loss"] != record["after"]["task_loss"]
