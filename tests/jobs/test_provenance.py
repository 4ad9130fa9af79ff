"""A result says of which base and by which adapter it was made."""

import json
import shutil
from pathlib import Path

import pytest

from safeweights_peft.errors import DataError
from safeweights_peft.files import write_json
from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.jobs.evaluate import evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.protect import protect_lora, protect_tuned
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.settings import PreserveMethod
from tests.jobs.conftest import Run
from tests.tiny_jobs import Requests


def content_id(folder: Path) -> str:
    found = read_artifact(folder).metadata.content_id
    assert found is not None
    return found


@pytest.fixture
def unmeasured(run: Run, tmp_path: Path) -> Path:
    """A finished run without the last two results."""
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    (out / "result.json").unlink()
    return out


def test_an_evaluation_of_the_base_alone_names_no_adapter(run: Run) -> None:
    told = json.loads((run.out / "before.json").read_text())
    assert told["base"] == {"name": str(run.base), "revision": None}
    assert told["content_id"] is None


def test_an_evaluation_and_the_summary_name_the_patch_by_its_content(run: Run) -> None:
    told = json.loads((run.out / "after.json").read_text())
    assert told["base"] == run.result["base"] == {"name": str(run.base), "revision": None}
    assert told["content_id"] == run.result["content_id"] == content_id(run.out / "patch")


def test_what_was_preserved_and_protected_names_the_map(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    safety_map, settings = run.out / "map", requests.preserve(steps=2)
    tuned, lora = tmp_path / "tuned", tmp_path / "lora"
    job = Job(run.base), safety_map, requests.lessons
    records = [
        preserve_model(*job, tuned, settings),
        preserve_model(*job, lora, requests.preserve(steps=2, method=PreserveMethod.LORA)),
        protect_tuned(Job(run.base), tuned, safety_map, tmp_path / "protected"),
        protect_lora(str(lora), safety_map, tmp_path / "corrected", str(run.base)),
    ]
    for record in records:
        assert record["base"] == {"name": str(run.base), "revision": None}
        assert record["content_id"] == content_id(safety_map)


def test_a_lora_has_no_content_id(run: Run, requests: Requests, tmp_path: Path) -> None:
    settings = requests.preserve(steps=2, method=PreserveMethod.LORA)
    job = Job(run.base), run.out / "map", requests.lessons, tmp_path / "lora", settings
    preserve_model(*job)
    result = evaluate(Job(run.base), tmp_path / "lora", requests.evaluate(limit=1))
    assert result["content_id"] is None


@pytest.mark.parametrize("stale", [None, "sha256:" + 64 * "0"])
def test_a_run_never_goes_on_from_an_evaluation_of_another_patch(
    stale: str | None, run: Run, unmeasured: Path, requests: Requests
) -> None:
    after = json.loads((unmeasured / "after.json").read_text())
    write_json(unmeasured / "after.json", after | {"content_id": stale})
    settings = requests.run(run.base, steps=20)
    with pytest.raises(DataError, match=r"after\.json: expected a result for .*; delete it"):
        enhance(settings, unmeasured)
    assert not (unmeasured / "result.json").exists()
    (unmeasured / "after.json").unlink()
    found = enhance(settings, unmeasured)
    assert found["content_id"] == run.result["content_id"]
