"""The main job: every step leaves its result, and no step is done twice."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safeweights_peft.errors import DataError, ModelError, SafeWeightsError, SelectionError
from safeweights_peft.files import write_json
from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import verify
from safeweights_peft.patch.io import read_adapter
from safeweights_peft.settings import Method
from tests.jobs.conftest import Counts, Run
from tests.tiny_jobs import Interrupted, Recorder, Requests, content

FILES = [
    "settings.json",
    "before.json",
    "map",
    "patch",
    "after.json",
    "reproduce.json",
    "result.json",
]
TASKS = [
    ("Ask harmful requests", 1),
    ("Score safety", 1),
    ("Ask the base benign requests", 1),
    ("Train", 3),
]


def again(run: Run, out: Path, requests: Requests, **options: Any) -> dict[str, Any]:
    """Calls the same job with the same settings."""
    return enhance(requests.run(run.base, steps=20), out, **options)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Takes from a result what doesn't depend on the run's place."""
    patch = {key: value for key, value in result["patch"].items() if key != "path"}
    return result | {"patch": patch}


def test_every_step_leaves_its_result(run: Run) -> None:
    assert {path.name for path in run.out.iterdir()} == set(FILES)


def test_what_is_returned_is_what_is_on_disk(run: Run) -> None:
    assert json.loads((run.out / "result.json").read_text()) == run.result


def test_the_summary_repeats_the_measurements(run: Run) -> None:
    for stage in ("before", "after"):
        measured = json.loads((run.out / f"{stage}.json").read_text())
        told = run.result[stage]
        assert told["attack_success_rate"] == measured["harmful"]["attack_success_rate"]
        assert told["over_refusal_rate"] == measured["benign"]["over_refusal_rate"]
        assert told["invalid"] == measured["harmful"]["invalid"] + measured["benign"]["invalid"]
        assert told["kl"] == measured["utility"]["kl"]
        assert told["perplexity"] == measured["utility"]["perplexity"]


def test_the_attack_success_rate_falls(run: Run) -> None:
    before, after = (run.result[stage]["attack_success_rate"] for stage in ("before", "after"))
    assert before["rate"] == 1
    assert after["rate"] <= 0.5


def test_the_share_of_changed_weights_is_the_density(run: Run) -> None:
    assert run.result["patch"]["share_of_weights"] == pytest.approx(0.2, abs=1e-4)


def test_the_patch_fits_the_base_and_the_merged_model(run: Run, tmp_path: Path) -> None:
    merge(run.base, run.out / "patch", tmp_path / "merged")
    assert verify(run.out / "patch", run.base, tmp_path / "merged").ok


def test_peft_loads_the_patch(run: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(run.base)
    ids = torch.arange(12)[None]
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, run.out / "patch")
    assert not torch.equal(model(ids).logits, before)


def test_a_finished_run_is_not_done_again(run: Run, requests: Requests) -> None:
    before, recorder = content(run.out), Recorder()
    assert again(run, run.out, requests, progress=recorder) == run.result
    assert recorder.tasks == []
    assert content(run.out) == before


@pytest.mark.parametrize("done", range(1, len(FILES)))
def test_a_run_that_ended_after_a_step_goes_on_to_the_same_result(
    done: int, run: Run, requests: Requests, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    for name in FILES[done:]:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = content(out)
    assert figures(again(run, out, requests)) == figures(run.result)
    assert content(out).items() >= kept.items()


@pytest.mark.parametrize(("task", "after"), TASKS)
def test_a_run_that_ended_within_a_step_goes_on_to_the_same_result(
    task: str, after: int, run: Run, requests: Requests, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        again(run, out, requests, progress=Recorder(task, after))
    assert figures(again(run, out, requests)) == figures(run.result)
    assert {path.name for path in out.iterdir()} == set(FILES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"score": {"density": 0.3}}, "score.density (0.2 there, 0.3 here)"),
        ({"score": {"method": Method.RANDOM}}, "score.method (esi there, random here)"),
        ({"train": {"steps": 21}}, "train.steps (20 there, 21 here)"),
        ({"evaluate": {"limit": 5}}, "evaluate.limit (None there, 5 here)"),
        ({"compute": {"dtype": "float32"}}, "compute.dtype (auto there, float32 here)"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_other_settings_are_refused_by_name(
    change: dict[str, dict[str, Any]], named: str, run: Run, requests: Requests
) -> None:
    before = content(run.out)
    settings = requests.run(run.base, steps=20)
    for job, changes in change.items():
        changed = replace(getattr(settings, job), **changes)
        settings = replace(settings, **{job: changed})
    with pytest.raises(DataError) as caught:
        enhance(settings, run.out)
    assert f"found one with other {named}; the same command as then resumes it" in str(caught.value)
    assert content(run.out) == before


def test_a_run_that_is_older_than_a_setting_goes_on(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    settings = json.loads((out / "settings.json").read_text())
    for name in ("boundary", "boundary_fraction", "step_gain", "hinge_weight", "hinge_tokens"):
        del settings["train"][name]
    (out / "settings.json").write_text(json.dumps(settings))
    (out / "result.json").unlink()
    assert figures(again(run, out, requests)) == figures(run.result)


def test_another_base_is_refused_by_name(run: Run, requests: Requests, tiny_llama: Path) -> None:
    with pytest.raises(DataError, match=r"other base \("):
        enhance(requests.run(tiny_llama, steps=20), run.out)


def test_a_directory_with_other_files_is_refused(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="found something else; give another --out"):
        again(run, tmp_path, requests)
    assert content(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_file_in_place_of_the_directory_is_refused(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="found something else; give another --out"):
        again(run, tmp_path / "thesis.txt", requests)


def test_a_missing_base_leaves_nothing(requests: Requests, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        enhance(requests.run(tmp_path / "nowhere"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", ["score", "train", "evaluate"])
def test_a_missing_source_of_requests_is_found_before_the_first_step(
    job: str, tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    changed = getattr(requests, job)(harmful="nowhere.json")
    settings = requests.run(tiny_llama, **{job: changed})
    recorder = Recorder()
    with pytest.raises(DataError, match=r"^nowhere\.json: expected a file"):
        enhance(settings, tmp_path / "run", recorder)
    assert recorder.tasks == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tiny_mixtral", "tiny_qwen3_moe"])
def test_a_mixture_of_experts_is_enhanced_end_to_end(
    kind: str, requests: Requests, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, patch = request.getfixturevalue(kind), tmp_path / "run" / "patch"
    result = enhance(requests.run(base), tmp_path / "run")
    merge(base, patch, tmp_path / "merged")
    assert result["after"]["kl"] > 0
    assert any("experts" in name for name in read_adapter(patch).deltas)
    assert verify(patch, base, tmp_path / "merged").ok
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(patch))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, each in loaded.merge_and_unload().state_dict().items():
        assert torch.equal(each, merged[name]), name


@pytest.mark.parametrize("method", [Method.RANDOM, Method.BOTTOM])
def test_a_control_changes_as_many_weights_as_esi(
    method: Method, run: Run, requests: Requests, tmp_path: Path
) -> None:
    control, few = requests.score(method=method), requests.evaluate(limit=1)
    result = enhance(requests.run(run.base, score=control, evaluate=few), tmp_path / "run")
    assert result["patch"]["entries"] == run.result["patch"]["entries"]


def test_a_broken_result_of_a_step_is_refused_not_repaired(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    (out / "before.json").write_text("{")
    with pytest.raises(SafeWeightsError, match=r"before\.json"):
        again(run, out, requests)


def test_a_run_loads_the_base_twice_and_asks_each_request_once(
    tiny_llama: Path,
    requests: Requests,
    tmp_path: Path,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[str] = []
    hash_file = hashlib.file_digest

    def count_hash(file: Any, name: str) -> Any:
        hashed.append(file.name)
        return hash_file(file, name)

    monkeypatch.setattr(hashlib, "file_digest", count_hash)
    enhance(requests.run(tiny_llama), tmp_path / "run")
    assert counts.loads == 2
    before = after = 6 + 6
    assert counts.asked == before + 6 + after  # and the benign requests of training
    assert len(hashed) == len(set(hashed))


def test_a_guard_without_its_profile_is_refused_before_the_first_step(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.run(tiny_llama, score=requests.score(guard=str(tiny_llama)))
    with pytest.raises(SelectionError, match="--guard: expected --guard-profile with it"):
        enhance(settings, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def unmeasured(run: Run, tmp_path: Path) -> Path:
    """A finished run without the last two results."""
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    (out / "result.json").unlink()
    return out


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
