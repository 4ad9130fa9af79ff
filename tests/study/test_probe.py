"""The probing job: each draw is what a perturbed checkpoint does, and interrupts cost nothing."""

import json
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from safeweights_peft.chat import Chat
from safeweights_peft.errors import (
    BaseMismatchError,
    DataError,
    EvaluationError,
    ModelError,
    ReportError,
    SafeWeightsError,
    SelectionError,
)
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.utility import measure_utility
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs import job as frame
from safeweights_peft.jobs.evaluate import evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.merging.merge import merge
from safeweights_peft.modeling.layout import eligible_parameters, total_parameters
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.patch.groups import count_lines
from safeweights_peft.patch.io import read_artifact, read_map, write_map
from safeweights_peft.rates import wilson
from safeweights_peft.selection.scores import SCORES, score_entries
from safeweights_peft.selection.topk import Order, select
from safeweights_peft.settings import ComputeSettings, Granularity, Method, ProbeSettings
from safeweights_peft.study import probe as module
from safeweights_peft.study.controls import draw_lines
from safeweights_peft.study.probe import _pick, probe
from safeweights_peft.study.specificity import mean_over_draws
from tests.jobs.conftest import Run
from tests.tiny_jobs import BENIGN, Interrupted, Recorder, Requests, content
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer

SETTINGS = ProbeSettings(noise=2.0, draws=2, seed=5)
ROWS = [
    (None, "base", 1),
    ("noise", "map", 2),
    ("noise", "random", 2),
    ("noise", "bottom", 2),
    ("zero", "map", 1),
    ("zero", "random", 2),
    ("zero", "bottom", 1),
]
TASKS = [
    "Score safety",
    "Ask the base benign requests",
    "Ask harmful requests",
    "Compare with the base",
    "Ask perturbed models",
]


class Probed(NamedTuple):
    """A finished probe of a model that refuses.

    Attributes:
        base: the base with a patch merged in.
        patch: that patch.
        out: the result's directory.
        result: what the job returned.
        tasks: the progress that it showed.
    """

    base: Path
    patch: Path
    out: Path
    result: dict[str, Any]
    tasks: list[list[Any]]


@pytest.fixture(scope="module")
def probed(run: Run, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    folder, recorder = tmp_path_factory.mktemp("probes"), Recorder()
    merge(run.base, run.out / "patch", folder / "merged")
    job = folder / "merged", run.out / "patch", folder / "probe"
    return Probed(*job, call(*job, requests, progress=recorder), recorder.tasks)


def call(base: Path, map_dir: Path, out: Path, requests: Requests, **options: Any) -> dict:
    """Calls the job with the settings of all these tests."""
    settings = options.pop("settings", SETTINGS)
    asked = options.pop("evaluate", requests.evaluate())
    job = Job(base, options.pop("compute", None), options.pop("progress", None))
    return probe(job, map_dir, out, settings, requests.score(), asked, **options)


def row(result: dict[str, Any], perturbation: str | None, selection: str) -> dict[str, Any]:
    (found,) = (
        each
        for each in result["rows"]
        if (each["perturbation"], each["selection"]) == (perturbation, selection)
    )
    return found


def test_the_rows_are_the_base_and_each_selection_under_each_perturbation(probed: Probed) -> None:
    found = [(r["perturbation"], r["selection"], len(r["draws"])) for r in probed.result["rows"]]
    assert found == ROWS


def test_what_is_returned_is_what_is_on_disk(probed: Probed) -> None:
    assert {path.name for path in probed.out.iterdir()} == {"probe.json", "probe.png"}
    assert json.loads((probed.out / "probe.json").read_text()) == probed.result
    assert (probed.out / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_else_is_left(probed: Probed) -> None:
    assert {path.name for path in probed.out.parent.iterdir()} == {"merged", "probe"}


def test_the_base_is_judged_as_by_an_evaluation(probed: Probed, requests: Requests) -> None:
    told = pick_figures(evaluate(Job(probed.base), None, requests.evaluate()))
    found = row(probed.result, None, "base")
    for key in ("attack_success_rate", "over_refusal_rate"):
        assert found[key] == told[key]
    assert found["kl"] == {"mean": 0.0, "low": None, "high": None}
    assert found["attack_success_rate"]["rate"] <= 0.5


def zero_the_map(model: PreTrainedModel, patch: Path) -> None:
    for name, indices in read_artifact(patch).indices.items():
        mask = np.ones(model.get_parameter(name).numel(), np.float32)
        mask[indices] = 0
        model.get_parameter(name).mul_(torch.from_numpy(mask).view_as(model.get_parameter(name)))


def add_noise(model: PreTrainedModel, indices: dict[str, np.ndarray]) -> None:
    """Adds the second draw of noise, spread over dense tensors."""
    for name, positions in indices.items():
        parameter = model.get_parameter(name)
        generator = np.random.default_rng([5, 1, zlib.crc32(f"noise at {name}".encode())])
        drawn = np.zeros(parameter.numel(), np.float32)
        drawn[positions] = generator.standard_normal(positions.size, np.float32)
        parameter.add_(2 * parameter.std() * torch.from_numpy(drawn).view_as(parameter))


def add_noise_to_the_map(model: PreTrainedModel, patch: Path) -> None:
    add_noise(model, read_artifact(patch).indices)


def add_noise_to_random_entries(model: PreTrainedModel, patch: Path) -> None:
    scores = score_entries(SCORES[Method.RANDOM], eligible_parameters(model), {}, 5, 1)
    excluded = read_artifact(patch).indices
    count = sum(indices.size for indices in excluded.values())
    chosen = select(scores, count, Order.BOTTOM, excluded)
    add_noise(model, {name: each.indices for name, each in chosen.items()})


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (("zero", "map", 0), zero_the_map),
        (("noise", "map", 1), add_noise_to_the_map),
        (("noise", "random", 1), add_noise_to_random_entries),
    ],
    ids=["zero-map", "noise-map", "noise-random"],
)
@torch.no_grad()
def test_a_draw_is_what_a_perturbed_checkpoint_does(
    place: tuple[str, str, int],
    change: Callable[[PreTrainedModel, Path], None],
    probed: Probed,
    requests: Requests,
    tmp_path: Path,
) -> None:
    base = resolve_base(str(probed.base))
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    change(model, probed.patch)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = evaluate(Job(tmp_path), None, requests.evaluate())
    found = row(probed.result, *place[:2])["draws"][place[2]]
    assert found["attack_success_rate"] == told["harmful"]["attack_success_rate"]
    assert found["over_refusal_rate"] == told["benign"]["over_refusal_rate"]
    assert found["complied_rate"]["count"] == told["harmful"]["complied"]
    assert found["invalid_rate"]["count"] == pick_figures(told)["invalid"]
    original = load_model(base, torch.float32)
    answers = generate_answers(original, Chat(tokenizer), BENIGN, max_new_tokens=11, batch_size=4)
    twin = measure_utility(original, answers, tokenizer.pad_token_id, lambda: nullcontext(model))
    assert found["kl"] == pytest.approx(twin.kl, rel=1e-6)
    assert found["kl"] > 0


def test_a_row_pools_its_draws(probed: Probed) -> None:
    for each in probed.result["rows"]:
        draws = each["draws"]
        assert each["attack_success_rate"]["count"] == sum(
            draw["attack_success_rate"]["count"] for draw in draws
        )
        assert each["kl"]["mean"] == mean_over_draws([draw["kl"] for draw in draws])["mean"]
        single = wilson(each["invalid_rate"]["count"] // len(draws), 12)
        assert each["invalid_rate"]["high"] >= single.rate


def test_draws_differ(probed: Probed) -> None:
    for perturbation, selection in (("noise", "map"), ("noise", "random"), ("zero", "random")):
        first, second = row(probed.result, perturbation, selection)["draws"]
        assert first["kl"] != second["kl"]


def test_each_perturbation_has_a_verdict_and_its_reason(probed: Probed) -> None:
    verdicts = probed.result["verdicts"]
    assert list(verdicts) == ["noise", "zero"]
    for each in verdicts.values():
        assert each["verdict"] in ("specific", "not specific", "can't tell")
        assert each["reason"]


def test_the_result_tells_how_it_was_made(probed: Probed) -> None:
    told = probed.result
    assert told["base"] == {"name": str(probed.base), "revision": None}
    assert told["content_id"] == read_artifact(probed.patch).metadata.content_id
    assert (told["map"], told["artifact"]) == (str(probed.patch), "safety patch")
    assert told["entries"] == sum(
        each.size for each in read_artifact(probed.patch).indices.values()
    )
    assert told["settings"]["probe"] == {"noise": 2.0, "draws": 2, "seed": 5}
    assert told["settings"]["evaluate"]["max_new_tokens"] == 11


def test_progress_reaches_its_totals(probed: Probed) -> None:
    assert [task for task, _, _ in probed.tasks] == TASKS
    assert all(done == total > 0 for _, total, done in probed.tasks)


def test_no_answer_is_kept(probed: Probed) -> None:
    assert '"answer":' not in (probed.out / "probe.json").read_text()


def test_answers_are_kept_when_asked(probed: Probed, requests: Requests, tmp_path: Path) -> None:
    asked = requests.evaluate(keep_answers=True, limit=1)
    settings = replace(SETTINGS, draws=1)
    job = probed.base, probed.patch, tmp_path / "probe", requests
    result = call(*job, evaluate=asked, settings=settings)
    for each in result["rows"]:
        assert "answer" in each["draws"][0]["harmful"]["requests"][0]


@pytest.mark.parametrize(
    ("task", "after"),
    [
        ("Score safety", 1),
        ("Ask the base benign requests", 1),
        ("Ask perturbed models", 40),
        ("Ask perturbed models", 18 * 10),
    ],
)
def test_an_interrupted_probe_goes_on_to_the_same_result(
    task: str, after: int, probed: Probed, requests: Requests, tmp_path: Path
) -> None:
    job = probed.base, probed.patch, tmp_path / "probe", requests
    with pytest.raises(Interrupted):
        call(*job, progress=Recorder(task, after))
    assert not (tmp_path / "probe").exists()
    assert not any(b'"answer":' in each for each in content(tmp_path).values())
    assert call(*job) == probed.result
    assert content(tmp_path) == {f"probe/{n}": each for n, each in content(probed.out).items()}


def test_what_was_finished_before_an_interrupt_is_not_done_again(
    probed: Probed, requests: Requests, tmp_path: Path
) -> None:
    job = probed.base, probed.patch, tmp_path / "probe", requests
    with pytest.raises(Interrupted):
        call(*job, progress=Recorder("Ask perturbed models", 18 * 4 + 1))
    (work_dir,) = tmp_path.iterdir()
    finished = {path.name for path in work_dir.glob("*.json")}
    assert finished == {"base.json"} | {
        f"noise-{each}.json" for each in ("map-0", "map-1", "random-0", "random-1")
    }
    for name in finished - {"base.json"}:
        kept = json.loads((work_dir / name).read_text())
        (work_dir / name).write_text(json.dumps(kept | {"kl": 123.0}))
    recorder = Recorder()
    result = call(*job, progress=recorder)
    assert row(result, "noise", "random")["kl"]["mean"] == 123
    assert row(result, "noise", "bottom") == row(probed.result, "noise", "bottom")
    assert [each for each, _, _ in recorder.tasks] == [TASKS[1], TASKS[4]]
    assert recorder.tasks[-1][1] == recorder.tasks[-1][2]


def test_a_probe_with_other_settings_is_refused_unless_it_may_start_afresh(
    probed: Probed, requests: Requests, tmp_path: Path
) -> None:
    job = probed.base, probed.patch, tmp_path / "probe", requests
    other = {"settings": replace(SETTINGS, seed=6)}
    with pytest.raises(Interrupted):
        call(*job, progress=Recorder("Ask perturbed models", 40), **other)
    with pytest.raises(DataError, match=r"other probe\.seed"):
        call(*job)
    assert call(*job, overwrite=True) == probed.result


@pytest.mark.parametrize("base", ["tiny_tied_llama", "tiny_mixtral"])
def test_a_map_of_any_model_is_probed(
    base: str,
    requests: Requests,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path: Path = request.getfixturevalue(base)
    score(Job(path), tmp_path / "map", requests.score(density=0.05))
    before = content(path)
    settings, asked = replace(SETTINGS, draws=1), requests.evaluate(limit=1)
    job = path, tmp_path / "map", tmp_path / "probe", requests
    loaded = []
    monkeypatch.setattr(
        frame, "load_model", lambda *told: loaded.append(load_model(*told)) or loaded[-1]
    )
    result = call(*job, settings=settings, evaluate=asked)
    assert len(loaded) == 1  # the base's own figures come from the model that is perturbed
    model = load_model(resolve_base(str(path)))
    assert result["entries"] == round(0.05 * total_parameters(model))
    assert row(result, "noise", "map")["kl"]["mean"] > 0
    assert content(path) == before


def test_a_map_of_rows_and_columns_is_compared_with_others_of_its_matrices(
    tiny_llama: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = requests.score(density=0.1, granularity=Granularity.AUTO)
    safety_map = score(Job(tiny_llama), tmp_path / "map", settings)
    perturb, perturbed = module.perturb, []
    monkeypatch.setattr(
        module, "perturb", lambda *told: perturbed.append(told[1]) or perturb(*told)
    )
    job = tiny_llama, tmp_path / "map", tmp_path / "probe", requests
    options = {"settings": replace(SETTINGS, draws=1), "evaluate": requests.evaluate(limit=1)}
    result = call(*job, **options)
    shapes = {name: each.shape for name, each in safety_map.metadata.tensors.items()}
    lines = count_lines(shapes, safety_map.indices)
    assert result["lines"] == lines
    assert min(lines.values()) > 0
    own, random, bottom = perturbed[:3]
    drawn = draw_lines(shapes, safety_map.indices, SETTINGS.seed, 0)
    assert count_lines(shapes, drawn) == result["random_lines"]
    for name, indices in safety_map.indices.items():
        assert np.array_equal(own[name], indices)
        assert not np.intersect1d(random[name], indices).size
        assert np.isin(drawn[name], random[name]).all()
    sizes = [sum(each.size for each in found.values()) for found in (own, random, bottom)]
    assert len({*sizes}) == 1
    assert row(result, "noise", "map")["kl"]["mean"] > 0
    assert row(result, "noise", "random")["kl"]["mean"] > 0


def refused(
    error: type[SafeWeightsError],
    message: str,
    out: Path,
    *job: Any,
    **options: Any,
) -> None:
    """Checks that a job is refused before anything is asked or written."""
    recorder, before = Recorder(), content(out.parent)
    with pytest.raises(error, match=message):
        call(*job[:2], out, *job[2:], progress=recorder, **options)
    assert recorder.tasks == []
    assert content(out.parent) == before


def test_a_patch_that_is_not_merged_is_refused(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    job = run.base, run.out / "patch", requests
    message = "expected the base with the safety patch merged in, found it without"
    refused(BaseMismatchError, message, tmp_path / "probe", *job)


def test_a_map_where_its_patch_is_merged_in_is_refused_with_what_to_give(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    merge(run.base, run.out / "patch", tmp_path / "merged")
    job = tmp_path / "merged", run.out / "map", requests
    message = f"or give the patch as --map, where one is merged into {tmp_path / 'merged'}"
    refused(BaseMismatchError, message, tmp_path / "probe", *job)


def test_a_map_of_another_base_is_refused(run: Run, requests: Requests, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", dtype=torch.bfloat16, seed=1)
    job = save_tiny_tokenizer(other), run.out / "map", requests
    message = "expected in .* the values with digest"
    refused(BaseMismatchError, message, tmp_path / "probe", *job)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_computed_in_another_dtype_is_still_the_maps(
    dtype: str, tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    score(Job(tiny_llama), tmp_path / "map", requests.score(density=0.01))
    job = tiny_llama, tmp_path / "map", tmp_path / "probe", requests
    options = {"settings": replace(SETTINGS, draws=1), "evaluate": requests.evaluate(limit=1)}
    assert call(*job, compute=ComputeSettings(dtype=dtype), **options)["rows"]


def test_a_map_whose_parameters_the_model_lacks_is_refused(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    safety_map = score(Job(tiny_llama), tmp_path / "map", requests.score(density=0.01))
    tensors = safety_map.metadata.tensors
    renamed = {name + ".old": each for name, each in tensors.items()}
    indices = {name + ".old": each for name, each in safety_map.indices.items()}
    scores = {name + ".old": each for name, each in safety_map.scores.items()}
    metadata = replace(safety_map.metadata, tensors=renamed)
    write_map(tmp_path / "map", type(safety_map)(metadata, indices, scores), overwrite=True)
    job = tiny_llama, tmp_path / "map", requests
    refused(ModelError, "expected a parameter of the model", tmp_path / "probe", *job)


def test_a_map_that_reads_a_parameter_from_another_tensor_is_refused(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    up, gate = (f"model.layers.0.mlp.{each}_proj.weight" for each in ("up", "gate"))
    safety_map = score(Job(tiny_llama), tmp_path / "map", requests.score(density=0.05))
    tensors = safety_map.metadata.tensors
    moved = replace(safety_map.metadata, tensors={up: tensors[gate]})
    parts = {up: safety_map.indices[gate]}, {up: safety_map.scores[gate]}
    write_map(tmp_path / "map", type(safety_map)(moved, *parts), overwrite=True)
    assert read_map(tmp_path / "map").metadata.tensors[up].blocks[0].key == gate
    message = rf"^{up}: expected shape \[48, 32\] from {gate}, found \[48, 32\] from {up}, or"
    refused(ModelError, message, tmp_path / "probe", tiny_llama, tmp_path / "map", requests)


def test_a_map_that_leaves_too_little_to_compare_with_is_refused(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    score(Job(tiny_llama), tmp_path / "map", requests.score(density=0.3))
    message = "^map: expected at most as many entries as it leaves"
    job = tiny_llama, tmp_path / "map", requests
    refused(SelectionError, message, tmp_path / "probe", *job)


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_missing_package_is_named_before_anything_is_asked(
    package: str,
    probed: Probed,
    requests: Requests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    job = probed.base, probed.patch, requests
    refused(ReportError, rf"^{package}: expected to be installed", tmp_path / "probe", *job)


def test_a_missing_source_of_requests_is_refused(
    probed: Probed, requests: Requests, tmp_path: Path
) -> None:
    asked = requests.evaluate(benign="nowhere.json")
    job = probed.base, probed.patch, requests
    refused(DataError, r"^nowhere\.json", tmp_path / "probe", *job, evaluate=asked)


def test_an_existing_result_is_refused(probed: Probed, requests: Requests) -> None:
    job = probed.base, probed.patch, requests
    refused(EvaluationError, "give --overwrite to replace it$", probed.out, *job)


def test_a_result_inside_the_base_is_refused(probed: Probed, requests: Requests) -> None:
    job = probed.base, probed.patch, requests
    message = "expected a directory apart from the base"
    refused(EvaluationError, message, probed.base / "probe", *job)


def test_an_existing_result_is_replaced_when_asked(
    probed: Probed, requests: Requests, tmp_path: Path
) -> None:
    out = tmp_path / "probe"
    out.mkdir()
    (out / "old").touch()
    assert call(probed.base, probed.patch, out, requests, overwrite=True) == probed.result
    assert not (out / "old").exists()


def test_what_was_cut_in_a_thought_is_in_no_rate_of_a_draw() -> None:
    part = {"n": 10, "invalid": 1, "complied": 3, "cut_short": 0, "requests": []}
    measured = {
        "harmful": part | {"cut_in_thought": 6, "attack_success_rate": {"n": 4}},
        "benign": part | {"cut_in_thought": 2, "over_refusal_rate": {"n": 8}},
        "utility": {"kl": 0.0, "perplexity": 1.0},
        "task": None,
    }
    picked = _pick(measured)
    assert (picked["complied_rate"]["count"], picked["complied_rate"]["n"]) == (3, 4)
    assert (picked["invalid_rate"]["count"], picked["invalid_rate"]["n"]) == (2, 12)
    assert picked["cut_in_thought"] == 8
