"""The sweep: each scale is measured as `eval` measures it, once, and one of them is picked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from safeweights_peft.errors import BaseMismatchError, DataError, EvaluationError, FormatError
from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.jobs.evaluate import Evaluator, evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.sweep import SCALES, measure_scales, pick_scale, sweep
from safeweights_peft.patch.io import read_patch
from safeweights_peft.tables import comparison_rows
from tests.jobs.conftest import Counts, Run
from tests.tiny_guards import save_byte_level_tokenizer, save_tiny_guard
from tests.tiny_jobs import Interrupted, Recorder, Requests, content


def row(scale: float, asr: float, over_refusal: float) -> dict[str, Any]:
    return {
        "scale": scale,
        "attack_success_rate": {"rate": asr},
        "over_refusal_rate": {"rate": over_refusal},
    }


ROWS = [row(0.0, 1.0, 0.0), row(0.5, 0.4, 0.0), row(1.0, 0.1, 0.2), row(1.5, 0.1, 0.6)]


@pytest.mark.parametrize(
    ("max_asr", "max_over_refusal", "scale"),
    [
        (0.4, None, 0.5),  # the smallest that is safe enough
        (0.3, None, 1.0),
        (0.05, None, None),
        (None, 0.0, 0.5),  # the safest that refuses little enough
        (None, 1.0, 1.0),  # and the smallest of equally safe ones
        (0.1, 0.2, 1.0),
        (0.1, 0.1, None),
        (None, None, None),
    ],
)
def test_the_scale_that_is_picked(
    max_asr: float | None, max_over_refusal: float | None, scale: float | None
) -> None:
    assert pick_scale(ROWS, max_asr, max_over_refusal) == scale


def test_every_scale_is_measured_as_by_itself_on_one_model(
    run: Run, requests: Requests, tmp_path: Path, counts: Counts
) -> None:
    result = sweep(Job(run.base), run.out / "patch", tmp_path / "out", requests.evaluate())
    assert counts.loads == 1
    # The base's answers to harmless requests are asked for once: 6, and 6 + 6 at each scale.
    assert counts.asked == 6 + 6 + 12 * (len(SCALES) - 1)
    assert [each["scale"] for each in result["rows"]] == list(SCALES)
    for scale in (0.0, 0.5, 1.5):
        alone = evaluate(Job(run.base), run.out / "patch", requests.evaluate(), scale=scale)
        (found,) = (dict(each) for each in result["rows"] if each["scale"] == scale)
        assert found.pop("scale") == scale
        assert found == pick_figures(alone)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == result


def test_an_interrupted_sweep_resumes_without_asking_again(
    run: Run, requests: Requests, tmp_path: Path, counts: Counts
) -> None:
    arguments = run.out / "patch", tmp_path / "out", requests.evaluate()
    broken = Recorder("Ask at each scale", after=60)
    with pytest.raises(Interrupted):
        sweep(Job(run.base, progress=broken), *arguments)
    asked, recorder = counts.asked, Recorder()
    result = sweep(Job(run.base, progress=recorder), *arguments)
    assert counts.asked - asked < 6 + 12 * len(SCALES)
    (task,) = [task for task in recorder.tasks if task[0] == "Ask at each scale"]
    assert task[1] == task[2]
    other = sweep(Job(run.base), run.out / "patch", tmp_path / "other", requests.evaluate())
    assert result["rows"] == other["rows"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_what_cannot_be_swept_is_refused_before_a_model_is_loaded(
    run: Run, requests: Requests, tiny_llama: Path, tmp_path: Path, counts: Counts
) -> None:
    with pytest.raises(FormatError, match="expected a safety patch, found a safety map"):
        sweep(Job(run.base), run.out / "map", tmp_path / "out", requests.evaluate())
    with pytest.raises(BaseMismatchError):
        sweep(Job(tiny_llama), run.out / "patch", tmp_path / "out", requests.evaluate())
    with pytest.raises(EvaluationError, match="apart from the patch"):
        sweep(Job(run.base), run.out / "patch", run.out / "patch" / "out", requests.evaluate())
    assert counts.loads == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_names_the_smallest_scale_that_is_safe_enough(
    run: Run, requests: Requests, counts: Counts
) -> None:
    before = content(run.out)
    settings = requests.run(run.base, steps=20)
    most = run.result["after"]["attack_success_rate"]["rate"]
    result = enhance(settings, run.out, max_asr=most)
    rows = {each["scale"]: each for each in result["sweep"]["rows"]}
    assert without_scale(rows[0.0]) == run.result["before"]
    assert without_scale(rows[1.0]) == run.result["after"]
    assert counts.asked == 6 + 12 * (len(SCALES) - 2)  # those two are known
    scale = result["sweep"]["scale"]
    assert rows[scale]["attack_success_rate"]["rate"] <= most
    assert all(rows[s]["attack_success_rate"]["rate"] > most for s in rows if s < scale)
    assert comparison_rows(result)[0] == ("", "before", "after", f"at scale {scale:g}")
    kept = content(run.out)
    assert {k: v for k, v in kept.items() if k in before and k != "result.json"}.items() <= (
        before.items()
    )
    asked = counts.asked
    assert enhance(settings, run.out, max_asr=0.0 if most else 1.0)["sweep"]["max_asr"] != most
    assert counts.asked == asked  # another threshold is looked up
    (run.out / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match="delete it, and it is made again"):
        enhance(settings, run.out, max_asr=most)
    (run.out / "sweep.json").unlink()
    assert enhance(settings, run.out) == run.result
    assert content(run.out) == before


def without_scale(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key != "scale"}


def test_a_run_shows_how_answers_begin_before_and_after(run: Run) -> None:
    answers = run.result["answers"]
    for kind, most in (("harmful", 60), ("benign", 120)):
        assert len(answers[kind]) == 5
        for sample in answers[kind]:
            assert len(sample["request"]) <= 40
            for stage in ("before", "after"):
                assert sample[stage].keys() == {"verdict", "answer"}
                assert len(sample[stage]["answer"]) <= most
    verdicts = {sample["after"]["verdict"] for sample in answers["harmful"]}
    assert "refused" in verdicts


def test_a_guard_is_loaded_once_for_all_scales_and_not_kept(
    run: Run, requests: Requests, tmp_path: Path, counts: Counts
) -> None:
    guard = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    profile = {"safe": ["s"], "unsafe": ["u"], "template": "{request}|{answer}|"}
    (tmp_path / "mine.json").write_text(json.dumps(profile))
    judge = f"guard:{guard}={tmp_path / 'mine.json'}"
    settings = requests.evaluate(judge=(judge,), limit=1)
    evaluator = Evaluator(Job(run.base), settings)
    patch = read_patch(run.out / "patch")
    with evaluator.job.work(tmp_path / "out", {}) as work_dir:
        rows = measure_scales(evaluator, run.out / "patch", patch, work_dir)
    assert counts.loads == 2  # the base and the guard
    (reader,) = evaluator.judges["harmful"]
    assert reader._kept is None
    alone = Evaluator(Job(run.base), settings).measure()
    assert rows[0] == {"scale": 0.0, **pick_figures(alone)}
