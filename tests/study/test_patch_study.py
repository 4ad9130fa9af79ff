"""The study of patches: its figures, its adapters in memory, and a small study that resumes."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.train import train
from safeweights_peft.patch.io import read_adapter, read_map
from safeweights_peft.schema import to_json
from safeweights_peft.settings import Granularity, Method
from safeweights_peft.sources import Row
from tests.tiny_jobs import Requests, content

# PEFT's own methods, which the study compares with.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__(name)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("patch_figures", monkeypatch)


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("patch_cells", monkeypatch)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("patch_study", monkeypatch)


# --- figures ---


def make_test(seed: int = 0, kl: float = 1.0, shift: float = 0.0) -> dict[str, Any]:
    """A row whose ASR falls by a tenth with each step of its scale, and whose KL grows squared."""
    scales = [0.8, 1.0, 1.25]
    random = np.random.default_rng(seed)
    order = random.permutation(100)

    def refused(count: float) -> str:
        return "".join(str(int(position < count)) for position in order)

    return {
        "scales": scales,
        "refused": {
            "harmful": [refused(count) for count in (85, 95, 100)],
            "benign": [refused(count + shift) for count in (1, 2, 3)],
            "builtin_harmful": [refused(count) for count in (70, 80, 90)],
            "builtin_benign": [refused(count) for count in (5, 10, 15)],
        },
        "kl": [[0.02 * kl * scale**2] * 40 for scale in scales],
        "tokens": [2] * 40,
        "categories": ["ordinary"] * 60 + ["looks-harmful"] * 40,
    }


def test_figures_are_read_where_the_asr_is_reached(figures: ModuleType) -> None:
    found = figures.Tests([make_test()]).figure(0.0667)
    # A line through 15, 5 and 0 % falls by 7.5 % a step of the scale, from 6.67 % in its middle.
    assert found["scale"] == pytest.approx(1, abs=1e-4)
    assert found["asr"] == pytest.approx(0.05)
    assert found["kl"] == pytest.approx(0.01, abs=1e-5)
    assert found["over_refusal"] == pytest.approx(0.02, abs=1e-4)
    assert found["builtin_asr"] == pytest.approx(0.2, abs=1e-4)
    stronger = figures.Tests([make_test()]).figure(0.0)
    assert stronger["kl"] == pytest.approx(0.01 * stronger["scale"] ** 2)
    assert stronger["scale"] > 1.1


def test_one_scale_is_taken_as_it_is(figures: ModuleType) -> None:
    test = make_test()
    test["scales"], test["kl"] = [2.0], test["kl"][:1]
    test["refused"] = {kind: lines[:1] for kind, lines in test["refused"].items()}
    found = figures.Tests([test]).figure(0.05)
    assert found["scale"] == pytest.approx(2)
    assert (found["asr"], found["over_refusal"]) == (pytest.approx(0.15), 0.01)


@pytest.mark.parametrize(("rates", "place"), [((0.1, 0.1, 0.1), 0.0), ((0.1, 0.2, 0.3), 0.0)])
def test_an_asr_that_does_not_fall_leaves_the_scale_where_it_was(
    figures: ModuleType, rates: tuple[float, ...], place: float
) -> None:
    scales = np.log([0.8, 1.0, 1.25])
    assert figures.find_place(scales, np.array(rates), 0.05) == pytest.approx(place)


def test_no_scale_is_read_far_beyond_those_measured(figures: ModuleType) -> None:
    scales = np.log([0.8, 1.0, 1.25])
    place = figures.find_place(scales, np.array([0.9, 0.8, 0.7]), 0.0)
    assert np.exp(place) == pytest.approx(1.25 * (1.25 / 0.8) ** 0.5)


def test_intervals_hold_the_figures_and_are_never_narrower_than_those_of_the_counts(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "DRAWS", 100)
    found = figures.Tests([make_test(seed) for seed in range(3)]).estimate(0.05)
    for estimate in found.values():
        assert estimate.low <= estimate.value <= estimate.high
        assert len(estimate.draws) == 100
    assert found["over_refusal"].high > 0.06
    assert {"built-in, ordinary", "built-in, looks-harmful"} < found.keys()


def test_rows_asked_the_same_are_compared_in_pairs(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "DRAWS", 100)
    one, twice, shifted = (
        figures.Tests([make_test(**changes)]).estimate(0.05)
        for changes in ({}, {"kl": 2.0}, {"shift": 10})
    )
    ratio = figures.compare(twice, one)["kl"]
    assert (ratio.low, ratio.value, ratio.high) == (pytest.approx(2),) * 3
    more = figures.compare(shifted, one)["over_refusal"]
    assert more.value == pytest.approx(0.1)
    assert 0 < more.low < more.value < more.high


# --- scales, rows ---


@pytest.mark.parametrize("crossing", [0.26, 0.7, 1.0, 1.9])
def test_the_scale_is_found_by_few_measurements(script: ModuleType, crossing: float) -> None:
    asked = []

    def measure(scale: float) -> float:
        asked.append(scale)
        return 0.05 - 0.1 * float(np.log(scale / crossing))

    assert script.find_scale(measure, 0.05) == pytest.approx(crossing)
    assert len({*asked}) <= 5


@pytest.mark.parametrize(("rate", "scale"), [(0.0, 0.25), (1.0, 2.0)])
def test_an_asr_that_is_always_or_never_reached_gives_the_ends(
    script: ModuleType, rate: float, scale: float
) -> None:
    assert script.find_scale(lambda _: rate, 0.05) == scale


def test_what_reaches_the_asr_comes_before_what_does_not(script: ModuleType) -> None:
    cells = [
        {"kl": 0.01, "asr_by_scale": {"1": 0.5, "2": 0.2}},
        {"kl": 0.05, "asr_by_scale": {"1": 0.06, "2": 0.04}},
        {"kl": 0.03, "asr_by_scale": {"1": 0.05}},
        {"kl": 0.01, "asr_by_scale": {"2": 0.1}},
    ]
    ordered = sorted(range(4), key=lambda place: script.rank(cells[place], 0.05))
    assert ordered == [2, 1, 3, 0]


def test_rows_are_found_by_patterns_and_by_any_number(script: ModuleType) -> None:
    assert script.find_rows(["fisher-row-*", "lora-2", "fisher-row-1"]) == [
        *("fisher-row-0.05", "fisher-row-0.2", "fisher-row-0.3", "fisher-row-1"),
        "lora-2",
    ]
    assert len(script.find_rows(script.DEFAULT_ROWS)) == 50
    with pytest.raises(ValueError, match="could not convert"):
        script.find_rows(["lora-all"])


def test_a_row_is_read_by_its_name(cells: ModuleType) -> None:
    parse = cells.Choice.parse
    assert parse("fisher-row-0.3") == ("fisher", 0.003, Granularity.ROW)
    assert parse("lora-4") == ("lora", 4, Granularity.ENTRY)
    assert parse("supertuning-0.2")[:2] == ("supertuning", 0.002)


# --- adapters in memory ---

Make = Callable[..., Any]


@pytest.fixture
def make_study(
    cells: ModuleType, requests: Requests, tiny_llama_bf16: Path, tmp_path: Path
) -> Make:
    def make(*rows: str, **changes: Any) -> Any:
        settings = requests.run(tiny_llama_bf16, train=requests.train(**changes))
        choices = [cells.Choice.parse(row) for row in rows]
        return cells.Study(Job(tiny_llama_bf16), settings, choices, tmp_path, 4, 4)

    return make


@pytest.mark.parametrize(
    "row", ["esi-entry-20", "fisher-row-20", "lora-2", "shira-2", "supertuning-10"]
)
@torch.no_grad()
def test_a_base_with_a_change_answers_as_the_adapter_and_is_itself_again(
    row: str, cells: ModuleType, make_study: Make, tmp_path: Path
) -> None:
    study, choice = make_study(row), cells.Choice.parse(row)
    model, ids = study.job.model, torch.arange(40, 60)[None]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(input_ids=ids).logits
    with torch.enable_grad():
        study.train(choice, 0.5, 0, tmp_path / "trained.safetensors")
    change = study.restore(choice, 0, tmp_path / "trained.safetensors")
    with study.adapted(choice, 0) as adapted:
        tensors = cells.load_file(tmp_path / "trained.safetensors")
        for name, parameter in cells.trained(adapted):
            parameter.copy_(tensors[name])
        with torch.enable_grad():  # else entries are rounded as in the checkpoint
            expected = adapted.eval()(input_ids=ids).logits.detach()
    assert not torch.allclose(expected, before, atol=1e-3)
    with study.scaled(change, 1.0):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert {*model.state_dict()} == {*weights}
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_patch_is_the_one_that_the_training_job_makes(
    cells: ModuleType, make_study: Make, requests: Requests, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    study, choice = make_study("esi-entry-20"), cells.Choice.parse("esi-entry-20")
    told = study.train(choice, 0.5, 3, tmp_path / "trained.safetensors")
    change = study.restore(choice, 3, tmp_path / "trained.safetensors", tmp_path / "saved")
    score(Job(tiny_llama_bf16), tmp_path / "map", requests.score(seed=3))
    settings = requests.train(seed=3, learning_rate=None, step_gain=0.5)
    record = train(Job(tiny_llama_bf16), tmp_path / "map", tmp_path / "patch", settings)
    assert told["rate"] == record["learning_rate"]
    assert told["losses"]["refusal"] == pytest.approx(record["losses"][-1]["refusal"], rel=1e-4)
    for name, delta in read_adapter(tmp_path / "patch").deltas.items():
        added = change[name].flatten()
        values = torch.from_numpy(delta.values.astype(np.float32))
        positions = torch.from_numpy(delta.indices.astype(np.int64))
        torch.testing.assert_close(added[positions], values, atol=2e-4, rtol=0.02)
        assert int(added.count_nonzero()) <= positions.numel()
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"adapter_config.json"}


@pytest.mark.parametrize(
    "row",
    ["esi-entry-5", "bottom-entry-5", "random-entry-5", "esi-row-5", "esi-column-5", "esi-auto-5"],
)
def test_a_narrowed_map_is_the_map_of_that_density(
    row: str,
    cells: ModuleType,
    make_study: Make,
    requests: Requests,
    tiny_llama_bf16: Path,
    tmp_path: Path,
) -> None:
    kind, granularity, _ = row.split("-")
    study = make_study(row, f"{kind}-{granularity}-20")
    found = study.find_map(cells.Choice.parse(row), 1)
    settings = replace(
        requests.score(density=0.05, seed=1),
        method=Method(kind),
        granularity=Granularity(granularity),
    )
    score(Job(tiny_llama_bf16), tmp_path / "direct", settings)
    direct = read_map(tmp_path / "direct")
    assert [*found.indices] == [*direct.indices]
    for name, indices in direct.indices.items():
        assert np.array_equal(found.indices[name], indices)
        assert np.array_equal(found.scores[name], direct.scores[name])
    with study.adapted(cells.Choice.parse(row), 1) as model:
        assert sum(p.numel() for _, p in cells.trained(model)) == sum(
            indices.size for indices in direct.indices.values()
        )


def test_changed_bits_are_those_of_the_merged_checkpoint(
    cells: ModuleType, make_study: Make
) -> None:
    study = make_study("lora-1")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = study.job.model.get_parameter(name)
    total = sum(p.numel() for p in study.job.model.parameters())
    change = torch.zeros_like(weight)
    change[0, 0] = -2 * weight[0, 0]  # flips the sign alone
    change[0, 1] = 1e-6 * weight[0, 1]  # is rounded away
    found = study.count_changed({name: change}, 1.0)
    assert found["weights_changed"] == pytest.approx(1 / total)
    assert found["bits_changed"] == pytest.approx(1 / (16 * total))


def test_kl_and_refusals_are_those_of_the_changed_base(make_study: Make) -> None:
    study, rows = make_study("lora-1"), [Row("Go"), Row("Stop here"), Row("Run")]
    name = "model.layers.0.mlp.up_proj.weight"
    change = {name: torch.randn(study.job.model.get_parameter(name).shape)}
    answers = study.answer(rows)
    found = study.measure_kl(answers, change, [0.0, 0.1, 0.2])
    assert np.abs(found[0]).max() < 1e-5
    assert (found[1] > 0).all()
    assert (found[2] > found[1]).all()
    assert study.find_refused(rows, change, 0.1) == [False] * 3


@pytest.mark.parametrize("method", Method)
def test_a_recipe_for_all_methods_is_read_by_each(
    method: Method, cells: ModuleType, requests: Requests, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    recipe = requests.score(
        **{"benign": requests.benign, "benign_examples": 3, "movement_steps": 2, "density": 0.1}
    )
    settings = cells.pick_scoring(recipe, method)
    score(Job(tiny_llama_bf16), tmp_path / "map", settings)
    assert read_map(tmp_path / "map").metadata.selection["method"] == method


# --- a whole study ---


def test_a_study_prints_its_tables_and_resumes(
    script: ModuleType,
    requests: Requests,
    tiny_llama_bf16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.modules["patch_figures"], "DRAWS", 20)
    run = requests.run(tiny_llama_bf16, steps=2)
    (tmp_path / "recipe.json").write_text(json.dumps(to_json(run)))
    arguments = [
        *("patch_study.py", tiny_llama_bf16, "--out", tmp_path / "out", "--harmful"),
        *(requests.harmful, "--benign", requests.benign, "--rows", "esi-entry-5", "lora-1"),
        *("--gains", "0.2", "0.5", "--seeds", "0", "1", "--around", "1", "--tokens", "3"),
        *("--harmful-validation", "1-2", "--harmful-test", "3-5", "--benign-validation", "1-2"),
        *("--benign-test", "3-3", "5-6", "--kl-rows", "2", "--batch-size", "64"),
        *("--settings", tmp_path / "recipe.json", "--asr", "1"),
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    script.main()
    printed, before = capsys.readouterr().out, content(tmp_path / "out")
    lines = printed.splitlines()
    assert lines[0] == "At the scale validated for an ASR of 100%:"
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        *("| row", "| ---", "| esi-entry-5", "| lora-1"),
    ]
    assert lines[-1].startswith("| esi-entry-5 |")
    cells = [path for path in before if path.startswith("cells/lora-1/")]
    assert sum("validation" in path for path in cells) == 3
    assert sum("test" in path for path in cells) == 2
    script.main()
    assert capsys.readouterr().out == printed
    assert content(tmp_path / "out") == before
    # A cell that is lost is made again, as it was.
    lost = next(path for path in cells if "test" in path)
    (tmp_path / "out" / lost).unlink()
    script.main()
    again = json.loads((tmp_path / "out" / lost).read_text())
    assert again | {"seconds": 0} == json.loads(before[lost]) | {"seconds": 0}
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--tokens", "2"])
    with pytest.raises(SystemExit, match="expected the arguments of this call, found others"):
        script.main()
