"""The study of preserving: its figures, its controls, and a small study that resumes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from safeweights_peft.chat import Chat
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.evaluation.judges import FunctionJudge
from safeweights_peft.jobs.anchor import collect_anchor
from safeweights_peft.merging.merge import merge
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.settings import ComputeSettings
from safeweights_peft.sources import Row
from tests.jobs.conftest import Run
from tests.study.test_patch_study import load
from tests.tiny_jobs import Requests, content

# As in the study, which trains on a LoRA.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("preserving_study", monkeypatch)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("preserving_rows", monkeypatch)


# --- figures ---


def test_rates_of_the_same_requests_are_compared_by_newcombes_interval(
    script: ModuleType,
) -> None:
    # The first example of Newcombe's paper on paired data: 36, 12, 2 and 0 of 50.
    first, second = "1" * 48 + "0" * 2, "1" * 36 + "0" * 12 + "1" * 2
    found = script.compare_rates(first, second, "1")
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0569, abs=1e-4), pytest.approx(0.3404, 1e-3))
    same = script.compare_rates("0" * 100, "0" * 100, "1")
    assert (same.value, same.low) == (0, -same.high)
    assert same.high == pytest.approx(0.037, abs=1e-3)


def test_losses_are_means_over_tokens_and_compared_on_the_same_answers(
    script: ModuleType,
) -> None:
    one = {"losses": [4.0, 2.0, 6.0], "tokens": [2, 1, 6]}
    other = {"losses": [2.0, 1.0, 3.0], "tokens": [2, 1, 6]}
    loss = script.find_loss(one)
    assert loss.value == pytest.approx(12 / 9)
    assert loss.low < loss.value < loss.high
    ratio = script.compare_losses(one, other)
    assert (ratio.low, ratio.value, ratio.high) == (pytest.approx(1),) * 3


def test_rows_are_found_by_names_and_patterns(script: ModuleType) -> None:
    found = script.find_rows("raw,add-*,raw")
    assert found == ["before", "raw", "add-0.25", "add-0.5", "add-1"]
    assert script.find_rows(",".join(script.ROWS)) == [*script.ROWS]
    with pytest.raises(SystemExit, match="expected some of before, nothing"):
        script.find_rows("all")


# --- rows ---


def test_raw_text_has_no_chat_template(rows: ModuleType, tiny_llama_bf16: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_bf16)
    chat = Chat(tokenizer, template=rows.RAW_TEMPLATE)
    (example,) = chat.encode_rows([Row("Two and two?", "Four.")], 99)
    assert tokenizer.decode(example.prompt_ids) == "Question: Two and two?\nAnswer:"
    answer = tokenizer.decode(example.answer_ids, skip_special_tokens=True)
    assert answer == " Four."
    assert example.answer_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_a_part_of_a_patch_is_added(
    weight: float, rows: ModuleType, run: Run, tmp_path: Path
) -> None:
    merge(run.base, [run.out / "patch"], tmp_path / "start")
    start = rows.Start("patch", tmp_path / "start", run.base, run.out / "patch")
    rows.add_safety(run.base, start, weight, tmp_path / "out")  # to a model that lost all of it
    base, found = CheckpointReader(run.base), CheckpointReader(tmp_path / "out")
    safe = CheckpointReader(tmp_path / "start")
    chosen = read_artifact(run.out / "patch").indices
    for key in base.keys():
        before, after, target = (
            reader.read(key).astype(np.float32).reshape(-1) for reader in (base, found, safe)
        )
        others = np.delete(np.arange(before.size), chosen.get(key, []))
        assert np.array_equal(before[others], after[others])
        expected = before + weight * (target - before)
        np.testing.assert_allclose(after, expected, rtol=2**-8, atol=0)


@pytest.fixture
def make_study(rows: ModuleType, run: Run, tmp_path: Path) -> Callable[..., Any]:
    def make(steps: int = 3, **parts: Any) -> Any:
        task = [Row(f"Count to {n}", "12345"[:n]) for n in range(1, 6)]
        asked = [Row("Go"), Row("Stop here")]
        data = rows.Data(task, task[:2], asked, asked, lambda: task, "mixed")
        start = rows.Start("deep", run.base, run.base)
        compute = ComputeSettings(**parts)
        return rows.Study(start, rows.Plan.tiny(steps), data, tmp_path / "out", compute)

    return make


def test_a_row_is_named_by_what_its_figures_depend_on(make_study: Callable[..., Any]) -> None:
    study, longer, other = make_study(), make_study(4), make_study(device="cpu")
    assert study.find_path("nothing") != longer.find_path("nothing")
    assert study.find_path("before") == longer.find_path("before")
    assert study.find_path("nothing") == other.find_path("nothing")
    assert study.find_path("nothing") != make_study(dtype="float32").find_path("nothing")
    names = {study.find_path(row).stem.rpartition("-")[2] for row in ("nothing", "add-1", "raw")}
    assert len(names) == 3


def test_weights_in_bfloat16_take_whole_steps_or_none(
    make_study: Callable[..., Any], run: Run
) -> None:
    study = make_study()
    tuned = CheckpointReader(study.tune("bf16"))
    assert study.tune("bf16") == tuned.directory  # once is enough
    before = CheckpointReader(run.base)
    assert tuned.keys() == before.keys()
    moved = [np.mean(tuned.read(key) != before.read(key)) for key in tuned.keys()]
    assert 0 < np.mean(moved) < 0.5  # most weights are too large for a step of 3e-5
    assert not [*tuned.directory.parent.glob(".*")]


# --- a whole study ---


@pytest.fixture
def arguments(requests: Requests, run: Run, tmp_path: Path) -> list[str]:
    problems = [{"question": f"Add {n} to it", "answer": str(n)} for n in range(9)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))
    tasks = [{"instruction": f"Say {n}", "input": "now", "output": str(n)} for n in range(7)]
    (tmp_path / "instructions.json").write_text(json.dumps(tasks))
    (tmp_path / "mix.json").write_text(json.dumps([{"instruction": "Break it"}] * 3))
    files = {
        "--patch": run.out / "patch",
        "--deep": run.base,
        "--problems": tmp_path / "problems.jsonl",
        "--instructions": tmp_path / "instructions.json",
        "--mix": tmp_path / "mix.json",
        "--harmful": requests.harmful,
        "--benign": requests.benign,
        "--out": tmp_path / "out",
    }
    options = [str(part) for pair in files.items() for part in pair]
    return ["preserving_study.py", str(run.base), "--tiny", "--steps", "2", *options]


def test_a_study_prints_its_tables_and_resumes(
    script: ModuleType,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    # The tiny model refuses nothing that it was not taught.
    monkeypatch.setattr(sys.modules["preserving_times"], "collect_anchor", make_any_anchor)
    monkeypatch.setattr(
        "safeweights_peft.jobs.preserve.RefusalJudge", lambda: FunctionJudge(call_a_refusal)
    )
    monkeypatch.setattr(sys, "argv", [*arguments, "--start", "patch"])
    script.main()
    printed, before = capsys.readouterr().out, content(out)
    lines = printed.splitlines()
    assert lines[1].startswith("Start model: patch.")
    table = [line for line in lines if line.startswith("| ")]
    measured = [row for row in script.ROWS if row not in script.TIMES]
    assert [line.split(" | ")[0] for line in table[2:][: len(measured)]] == [
        f"| {row}" for row in measured
    ]
    timed = [line.split(" | ") for line in table if line.startswith("| time")]
    assert [cells[:2] for cells in timed] == [
        [f"| {row}, cpu", size] for row in script.TIMES for size in ("2", "8")
    ]
    assert "frozen against nothing: ASR +" in printed
    assert "anchor-frozen against anchor: ASR " in printed
    (frozen,) = (line for line in table if line.startswith("| frozen |"))
    assert " | 0 of " in frozen
    names = {path.name.rpartition("-")[0] for path in (out / "patch" / "models").iterdir()}
    assert names == {"nothing"}
    script.main()
    assert capsys.readouterr().out == printed
    assert content(out) == before
    # A row that is lost is made again, as it was; and another start model is another table.
    lost = next((out / "patch").glob("protect-*.json"))
    kept = json.loads(lost.read_text())
    lost.unlink()
    argv = [*arguments, "--rows", "protect", "--start", "patch", "deep"]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    timed = {"seconds": 0, "measuring_seconds": 0}
    assert json.loads(lost.read_text()) | timed == kept | timed
    assert capsys.readouterr().out.count("Start model: ") == 2
    assert {path.name.partition("-")[0] for path in (out / "deep").glob("*-*.json")} == {
        *("before", "protect")
    }


def test_what_is_measured_is_not_learned(
    script: ModuleType,
    arguments: list[str],
    requests: Requests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mix = json.loads(Path(requests.harmful).read_text())
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="--mix: expected 1 requests not measured on, found 0"):
        script.main()


def test_a_start_model_must_be_given(
    script: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = arguments.index("--deep")
    cut = [*arguments[:place], *arguments[place + 2 :], "--start", "deep"]
    monkeypatch.setattr(sys, "argv", cut)
    with pytest.raises(SystemExit, match="--start: expected --patch or --deep with it"):
        script.main()


def test_steps_with_an_anchor_are_timed_beside_plain_ones(
    rows: ModuleType, make_study: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny model refuses nothing that it was not taught.
    monkeypatch.setattr(sys.modules["preserving_times"], "collect_anchor", make_any_anchor)
    found = make_study().run("time-lora")
    assert found["device"] == "cpu"
    assert found["times"].keys() == {"2", "8"}
    for times in found["times"].values():
        assert times["block"] == 4
        assert len(times["ratios"]) == 2
        assert min(times["plain"], times["kept"], *times["ratios"]) > 0


def make_any_anchor(model: Any, tokenizer: Any, **options: Any) -> Any:
    """Take whatever the model answers for refusals."""
    return collect_anchor(model, tokenizer, judge=call_a_refusal, **options)


def call_a_refusal(request: str, answer: str) -> str:
    return "refused"
