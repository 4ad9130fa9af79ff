"""The frame of all jobs: nothing is loaded early or twice, and unfinished work is found again."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from safeweights_peft.errors import DataError, ModelError
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs import job as frame
from safeweights_peft.jobs.evaluate import evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.protect import protect_lora, protect_tuned
from safeweights_peft.jobs.work import once
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.settings import ComputeSettings, PreserveMethod, ScoreSettings
from tests.jobs.conftest import Run
from tests.tiny_jobs import BENIGN, Interrupted, Recorder, Requests


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The models loaded so far."""
    loaded: list[object] = []
    load = frame.load_model

    def count(*arguments: object) -> object:
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(frame, "load_model", count)
    return loaded


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    job = Job(tmp_path / "nowhere", ComputeSettings(device="nonsense"))
    with pytest.raises(ModelError, match="expected a model directory or a Hub id"):
        _ = job.base
    with pytest.raises(ModelError, match="--device nonsense: expected a torch device"):
        _ = job.device


def test_a_job_of_several_processes_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="expected a job in one process, found 2, which would"):
        Job("no base is looked for")
    monkeypatch.setenv("WORLD_SIZE", "1")
    Job("no base is looked for")


def test_the_model_is_loaded_once_until_it_is_taken(tiny_llama: Path, loads: list[object]) -> None:
    job = Job(tiny_llama)
    assert not loads
    job.ask("some", BENIGN, 2)
    assert job.model is loads[0]
    taken = job.take_model()
    assert len(loads) == 1
    assert job.model is not taken
    assert len(loads) == 2


def test_a_base_that_was_found_already_is_taken_as_it_is(tiny_llama_bf16: Path) -> None:
    base = resolve_base(str(tiny_llama_bf16))
    job = Job(base, ComputeSettings("cpu", "bfloat16"))
    assert job.base is base
    assert job.model.dtype is job.dtype is torch.bfloat16


def test_another_model_may_be_asked(tiny_llama: Path, loads: list[object]) -> None:
    job, other = Job(tiny_llama), Job(tiny_llama).model
    assert job.ask("some", BENIGN, 2, model=other) == Job(tiny_llama).ask("some", BENIGN, 2)
    assert len(loads) == 2


def test_steps_are_shown_by_the_step_that_is_reached(tiny_llama: Path) -> None:
    recorder = Recorder()
    with Job(tiny_llama, progress=recorder).steps("Climbing", 9) as reach:
        reach(5)
        reach(6)
    assert recorder.tasks == [["Climbing", 9, 6]]


def test_a_record_names_base_adapter_settings_and_versions(run: Run) -> None:
    artifact = read_artifact(run.out / "map")
    record = Job(run.base).record("trial", artifact, ScoreSettings(seed=3), found=7)
    assert record["kind"] == "trial"
    assert record["base"] == {"name": str(run.base), "revision": None}
    assert record["content_id"] == artifact.metadata.content_id
    assert record["found"] == 7
    assert (record["settings"]["seed"], record["settings"]["dtype"]) == (3, "auto")
    assert record["torch_version"] == torch.__version__
    assert json.loads(json.dumps(record)) == record


def interrupt(base: Path, out: Path) -> Path:
    """Leaves work of a job that did not end."""
    with suppress(Interrupted), Job(base).work(out, {"seed": 1}) as folder:
        (folder / "half").touch()
        raise Interrupted
    return folder


REFUSED = {
    "nothing": "",
    "identity": r"seed \(1 there, 2 here\); the same command as then resumes it, another --out or",
    "base": "files of the base, so it can't be resumed; another --out or --overwrite starts anew",
    "version": r"torch_version \(.* there, 9\.9 here\), so it can't be resumed; another --out or",
}


@pytest.mark.parametrize("change", REFUSED)
def test_work_is_found_again_and_refused_where_what_it_depends_on_has_changed(
    change: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "out"
    folder = interrupt(base, out)
    if change == "base":
        (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    if change == "version":
        version = frame.version
        monkeypatch.setattr(frame, "version", lambda n: "9.9" if n == "torch" else version(n))
    identity = {"seed": 2 if change == "identity" else 1}
    if change != "nothing":
        message = f"found one with other {REFUSED[change]}"
        with pytest.raises(DataError, match=message), Job(base).work(out, identity):
            pass
        assert [path.name for path in folder.iterdir() if path.name != "identity"] == ["half"]
        assert len(list(tmp_path.iterdir())) == 2
    with Job(base).work(out, identity, overwrite=change != "nothing") as found:
        assert (found / "half").exists() == (change == "nothing")
        assert folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_a_process_left_that_was_killed_before_its_first_checkpoint_refuses_nothing(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.0123456789ab.work").mkdir()
    (tmp_path / ".out.0123456789ab.work" / ".identity.0123abcd.tmp").touch()
    with Job(tiny_llama).work(out, {}):
        pass
    (tmp_path / ".out.file.work").touch()  # a file of somebody's
    with Job(tiny_llama).work(out, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".out.file.work"]


def test_work_on_a_commit_is_found_again_though_its_files_were_fetched_anew(
    tiny_llama: Path, tmp_path: Path
) -> None:
    out, names = tmp_path / "out", []
    for number, commit in enumerate(("a" * 40, "a" * 40, "b" * 40)):
        folder = shutil.copytree(tiny_llama, tmp_path / f"base-{number}", copy_function=shutil.copy)
        with Job(BaseModel("someone/tiny", folder, commit)).work(out, {}) as work_dir:
            names.append(work_dir)
    assert names[0] == names[1] != names[2]


def test_a_step_is_done_once(tmp_path: Path) -> None:
    assert once(tmp_path / "step.json", lambda: {"found": 1}) == {"found": 1}
    assert once(tmp_path / "step.json", lambda: {"found": 2}) == {"found": 1}


def content_id(folder: Path) -> str:
    found = read_artifact(folder).metadata.content_id
    assert found is not None
    return found


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


@pytest.mark.parametrize(
    ("each", "steps", "notes"),
    [(1, [5, 6], ["Train: resumed at step 5"]), (1, [1, 2], []), (0, [8, 16], [])],
    ids=["resumed", "from the start", "in batches"],
)
def test_a_task_says_from_where_it_resumes(
    each: int, steps: list[int], notes: list[str], tiny_llama: Path
) -> None:
    recorder = Recorder()
    with Job(tiny_llama, progress=recorder).steps("Train", 16, each) as reach:
        for step in steps:
            reach(step)
    assert recorder.notes == notes
    assert recorder.tasks == [["Train", 16, steps[-1]]]
