"""The scoring job: the right number of entries, by the plain formula, of a base that is named."""

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from safeweights_peft.chat import Chat
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import DataError, FormatError, ModelError, SelectionError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs import scoring
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.merging.gather import find_state
from safeweights_peft.merging.verify import verify
from safeweights_peft.modeling.layout import eligible_parameters, total_parameters
from safeweights_peft.modeling.loading import load_tokenizer
from safeweights_peft.patch.artifacts import SafetyMap
from safeweights_peft.patch.io import read_map
from safeweights_peft.patch.records import State
from safeweights_peft.selection import transfer
from safeweights_peft.selection.objective import ReferenceObjective
from safeweights_peft.selection.scores import SCORES, score_entries, sum_gradients
from safeweights_peft.selection.topk import select
from safeweights_peft.settings import Granularity, Method
from safeweights_peft.sources import read_rows
from tests.tiny_guards import (
    save_byte_level_tokenizer,
    save_tiny_classifier,
    save_tiny_guard,
)
from tests.tiny_jobs import BENIGN, HARMFUL, REFUSAL, Interrupted, Recorder, Requests, content
from tests.tiny_models import save_tiny_tokenizer, save_tiny_vlm


def count(safety_map: SafetyMap) -> int:
    return sum(indices.size for indices in safety_map.indices.values())


def plain_scores(base: Path) -> dict[str, np.ndarray]:
    """|σ · ∂S/∂θ| of all entries, one request at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = load_tokenizer(resolve_base(str(base)))
    for text in HARMFUL:
        example = Chat(tokenizer).encode_example(text, REFUSAL, 12)
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        log_p = model(ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        chosen = log_p.gather(1, torch.tensor(example.answer_ids)[:, None])
        (chosen.mean() / len(HARMFUL)).backward()
    return {
        name: (parameter.std() * parameter.grad).abs().flatten().detach().numpy()
        for name, parameter in eligible_parameters(model).items()
    }


def test_the_map_holds_the_entries_that_the_plain_formula_puts_first(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    safety_map = score(Job(tiny_llama), tmp_path / "map", requests.score(density=0.05))
    plain = plain_scores(tiny_llama)
    lowest = min(scores.min() for scores in safety_map.scores.values())
    for name, scores in plain.items():
        indices = safety_map.indices.get(name, np.empty(0, np.int32))
        found = safety_map.scores.get(name, np.empty(0, np.float32))
        assert found == pytest.approx(scores[indices], rel=1e-3)
        assert np.delete(scores, indices).max() <= lowest * 1.001


def plain_gains_per_harm(base: Path, requests: Requests) -> dict[str, np.ndarray]:
    """g^2 / (F + 0.1 mean F), with an answer of at most 16 tokens drawn for each benign row."""
    model, chat = (
        AutoModelForCausalLM.from_pretrained(base),
        Chat(load_tokenizer(resolve_base(str(base)))),
    )
    rows = random.Random(0).sample(read_rows(requests.benign), len(BENIGN))
    answers = generate_answers(model, chat, rows, max_new_tokens=16, batch_size=4, seed=0)
    parameters = eligible_parameters(model)
    fisher = {name: np.zeros(parameter.shape) for name, parameter in parameters.items()}
    for answer in answers:
        start, ids = len(answer.prompt_ids), torch.tensor([answer.prompt_ids + answer.answer_ids])
        log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        loss = log_p.gather(-1, ids[0, start:, None]).sum()
        model.zero_grad()
        loss.backward()
        for name, parameter in parameters.items():
            square = parameter.grad.double().numpy() ** 2
            fisher[name] += square / len(answer.answer_ids) / len(answers)
    mean = sum(part.sum() for part in fisher.values()) / sum(part.size for part in fisher.values())
    sigmas = {name: parameter.std().item() for name, parameter in parameters.items()}
    return {
        name: (scores.reshape(fisher[name].shape) / sigmas[name]) ** 2 / (fisher[name] + mean / 10)
        for name, scores in plain_scores(base).items()
    }


def test_gain_per_harm_is_that_of_the_plain_formula(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.score(method=Method.FISHER, density=0.05)
    safety_map = score(Job(tiny_llama), tmp_path / "map", settings)
    lowest = min(scores.min() for scores in safety_map.scores.values())
    for name, scores in plain_gains_per_harm(tiny_llama, requests).items():
        indices = safety_map.indices.get(name, np.empty(0, np.int32))
        found = safety_map.scores.get(name, np.empty(0, np.float32))
        assert found == pytest.approx(scores.flat[indices], rel=1e-3)
        assert np.delete(scores, indices).max() <= lowest * 1.001


@pytest.mark.parametrize("granularity", [Granularity.ROW, Granularity.COLUMN])
def test_a_map_of_groups_has_whole_ones_that_score_best(
    tiny_llama: Path, requests: Requests, tmp_path: Path, granularity: Granularity
) -> None:
    settings = requests.score(method=Method.FISHER, granularity=granularity, density=0.05)
    safety_map = score(Job(tiny_llama), tmp_path / "map", settings)
    axis = {Granularity.ROW: -1, Granularity.COLUMN: -2}[granularity]
    lowest = min(scores.min() for scores in safety_map.scores.values())
    for name, scores in plain_gains_per_harm(tiny_llama, requests).items():
        found = np.zeros(scores.size)
        if name in safety_map.indices:
            found[safety_map.indices[name]] = safety_map.scores[name]
        found = found.reshape(scores.shape)
        assert not np.ptp(found, axis).any()
        best, means = found.max(axis), scores.mean(axis)
        assert best[best > 0] == pytest.approx(means[best > 0], rel=1e-3)
        assert max(means[best == 0], default=0) <= lowest * 1.001
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_llama).parameters())
    assert 0 <= round(0.05 * total) - count(safety_map) < 48
    assert verify(tmp_path / "map", tiny_llama).ok


def test_more_entries_than_a_lora_moves_are_refused_before_anything_is_asked(
    tiny_mixtral: Path, requests: Requests, tmp_path: Path
) -> None:
    job = Job(tiny_mixtral, progress=(progress := Recorder()))
    settings = requests.score(method=Method.MOVEMENT, density=0.5)
    with pytest.raises(SelectionError, match=r"those of layers that LoRA moves, found .* fisher"):
        score(job, tmp_path / "map", settings)
    assert not progress.tasks


def test_scoring_by_movement_leaves_the_base_as_it_was(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    job, settings = Job(tiny_llama), requests.score(method=Method.MOVEMENT, movement_steps=2)
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    first = score(job, tmp_path / "map", settings)
    assert all(torch.equal(tensor, before[n]) for n, tensor in job.model.state_dict().items())
    assert same(score(job, tmp_path / "again", settings), first)
    assert first.metadata.selection["benign_digest"].startswith("sha256:")


# No LoRA stands beside experts, so that movement leaves them.
@pytest.mark.parametrize("method", sorted(set(Method) - {Method.MOVEMENT}))
def test_every_other_method_selects_whole_rows_of_experts(
    method: Method, tiny_mixtral: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.score(method=method, granularity=Granularity.ROW)
    safety_map = score(Job(tiny_mixtral), tmp_path / "map", settings)
    for name, indices in safety_map.indices.items():
        columns = safety_map.metadata.tensors[name].shape[-1]
        _, counts = np.unique(indices // columns, return_counts=True)
        assert (counts == columns).all()


@pytest.mark.parametrize("method", list(Method))
def test_every_method_selects_the_same_number_of_entries(
    method: Method, tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.score(method=method, density=0.03)
    safety_map = score(Job(tiny_llama), tmp_path / "map", settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert count(safety_map) == round(0.03 * sum(each.numel() for each in model.parameters()))


def test_a_base_that_cannot_be_patched_on_disk_is_refused_before_it_is_scored(
    tiny_llama: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {key: tensors[key].double()}, base / "model.safetensors", {"format": "pt"})
    monkeypatch.delattr("safeweights_peft.jobs.scoring.sum_gradients")
    with pytest.raises(ModelError, match=f"{key}: expected one of the dtypes"):
        score(Job(base), tmp_path / "map", requests.score())


@pytest.mark.parametrize("model_type", ["qwen2_vl", "llama4"])
def test_a_map_of_a_model_with_eyes_lies_in_its_published_checkpoint(
    model_type: str, requests: Requests, tmp_path: Path
) -> None:
    base = save_tiny_tokenizer(save_tiny_vlm(tmp_path / "base", model_type))
    safety_map = score(Job(base), tmp_path / "map", requests.score(density=0.01))
    assert find_state(CheckpointReader(base), safety_map) is State.BASE


def test_the_bottom_control_scores_below_the_top(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    top = score(Job(tiny_llama), tmp_path / "top", requests.score())
    settings = requests.score(method=Method.BOTTOM)
    bottom = score(Job(tiny_llama), tmp_path / "bottom", settings)
    highest = max(scores.max() for scores in bottom.scores.values())
    assert highest < min(scores.min() for scores in top.scores.values())


def test_the_random_control_is_fixed_by_its_seed(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    drawn = [
        score(Job(tiny_llama), tmp_path / str(i), requests.score(method=Method.RANDOM, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    ]
    first, same, other = (
        {name: indices.tolist() for name, indices in each.indices.items()} for each in drawn
    )
    assert first == same
    assert first != other


def test_a_score_is_the_same_a_second_time(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        score(Job(tiny_llama), tmp_path / name, requests.score())
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_returned_is_what_is_on_disk(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    returned = score(Job(tiny_llama), tmp_path / "map", requests.score())
    stored = read_map(tmp_path / "map")
    assert stored.indices.keys() == returned.indices.keys()
    for name, indices in returned.indices.items():
        assert np.array_equal(stored.indices[name], indices)
        assert np.array_equal(stored.scores[name], returned.scores[name])


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16", "tiny_mixtral"])
def test_the_map_fits_its_base_on_disk(
    base: str, requests: Requests, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(base)
    score(Job(path), tmp_path / "map", requests.score(density=0.01))
    assert verify(tmp_path / "map", path).ok


def test_the_map_tells_how_it_was_made(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.score(density=0.07, seed=3)
    metadata = score(Job(tiny_llama), tmp_path / "map", settings).metadata
    assert metadata.base_model_name_or_path == str(tiny_llama)
    told = metadata.selection
    assert (told["method"], told["density"], told["seed"]) == ("esi", 0.07, 3)
    assert told["data_digest"].startswith("sha256:")


def test_a_map_holds_no_request(tiny_llama: Path, requests: Requests, tmp_path: Path) -> None:
    score(Job(tiny_llama), tmp_path / "map", requests.score())
    for name, file in content(tmp_path).items():
        assert not any(text.encode() in file for text in HARMFUL), name


def test_an_existing_result_is_refused_before_anything_else(
    requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match=r"give --overwrite to replace it$"):
        score(Job("no base is looked for"), tmp_path, requests.score())


def test_an_existing_result_is_replaced_when_asked(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    score(Job(tiny_llama), tmp_path / "map", requests.score(density=0.01))
    again = score(Job(tiny_llama), tmp_path / "map", requests.score(density=0.02), overwrite=True)
    assert count(read_map(tmp_path / "map")) == count(again)


def test_a_failed_score_leaves_the_old_map(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    score(Job(tiny_llama), tmp_path / "map", requests.score())
    before = content(tmp_path)
    with pytest.raises(SelectionError):
        score(Job(tiny_llama), tmp_path / "map", requests.score(density=1.0), overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("density", [1e-9, 1.0])
def test_a_density_that_cannot_be_met_is_refused_with_the_largest_that_can(
    density: float, tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    with pytest.raises(SelectionError, match=r"^--density: expected 1 to \d+ .*at most 0\.\d+"):
        score(Job(tiny_llama), tmp_path / "map", requests.score(density=density))


def test_progress_reaches_its_total(tiny_llama: Path, requests: Requests, tmp_path: Path) -> None:
    recorder = Recorder()
    score(Job(tiny_llama, progress=recorder), tmp_path / "map", requests.score())
    ((description, total, done),) = recorder.tasks
    assert description == "Score safety"
    assert done == total > 0


def same(left: SafetyMap, right: SafetyMap) -> bool:
    return left.indices.keys() == right.indices.keys() and all(
        np.array_equal(left.indices[name], right.indices[name])
        and np.array_equal(left.scores[name], right.scores[name])
        for name in left.indices
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("method", "granularity"),
    [
        (Method.ESI, Granularity.ENTRY),
        (Method.BOTTOM, Granularity.ENTRY),
        (Method.BOTTOM, Granularity.COLUMN),
        (Method.FISHER, Granularity.ENTRY),
        (Method.FISHER, Granularity.AUTO),
    ],
)
def test_passes_over_few_layers_give_the_same_map_bit_for_bit(
    tiny_llama: Path,
    requests: Requests,
    tmp_path: Path,
    layers: int,
    method: Method,
    granularity: Granularity,
) -> None:
    settings = requests.score(method=method, granularity=granularity)
    whole = score(Job(tiny_llama), tmp_path / "whole", settings)
    settings = replace(settings, layers_per_pass=layers)
    assert same(score(Job(tiny_llama), tmp_path / "parts", settings), whole)


@pytest.mark.parametrize("at", [2, 4, 5])
def test_an_interrupted_scoring_goes_on_to_the_same_map(
    tiny_llama: Path,
    requests: Requests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    settings = requests.score(batch_size=2, layers_per_pass=1)
    straight = score(Job(tiny_llama), tmp_path / "straight", settings)
    broken = Recorder("Score safety", after=at)
    with pytest.raises(Interrupted):
        score(Job(tiny_llama, progress=broken), tmp_path / "map", settings)
    assert same(score(Job(tiny_llama), tmp_path / "map", settings), straight)
    assert sorted(path.name for path in tmp_path.iterdir() if "map" in path.name) == ["map"]


# A pass is 3 terms of safety and 6 benign rows.
@pytest.mark.parametrize("at", [1, 4, 9, 11, 13, 18])
@pytest.mark.parametrize("granularity", [Granularity.ENTRY, Granularity.AUTO])
def test_an_interrupted_scoring_by_harm_goes_on_to_the_same_map(
    tiny_llama: Path,
    requests: Requests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    granularity: Granularity,
) -> None:
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    settings = requests.score(
        method=Method.FISHER, granularity=granularity, batch_size=2, layers_per_pass=1
    )
    straight = score(Job(tiny_llama), tmp_path / "straight", settings)
    broken = Recorder("Score safety", after=at)
    with pytest.raises(Interrupted):
        score(Job(tiny_llama, progress=broken), tmp_path / "map", settings)
    assert same(score(Job(tiny_llama), tmp_path / "map", settings), straight)
    assert sorted(path.name for path in tmp_path.iterdir() if "map" in path.name) == ["map"]


@pytest.mark.parametrize("task", ["Score usefulness", "Score safety"])
def test_an_interrupted_contrast_under_a_guard_goes_on_to_the_same_map(
    tiny_llama: Path,
    requests: Requests,
    guard: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
) -> None:
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    settings = requests.score(
        guard=str(guard),
        profile=str(tmp_path / "profile.json"),
        answer_tokens=9,
        batch_size=2,
        contrast=requests.benign,
    )
    straight = score(Job(tiny_llama), tmp_path / "straight", settings)
    broken = Recorder(task, after=2)
    with pytest.raises(Interrupted):
        score(Job(tiny_llama, progress=broken), tmp_path / "map", settings)
    resumed = score(Job(tiny_llama), tmp_path / "map", settings)
    assert same(resumed, straight)
    known = resumed.metadata.selection["mean_safety"], straight.metadata.selection["mean_safety"]
    assert known[0] in {None, known[1]}


def test_a_judge_that_was_changed_meanwhile_judges_from_the_beginning(
    tiny_llama: Path,
    requests: Requests,
    guard: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    profile = tmp_path / "profile.json"
    settings = requests.score(guard=str(guard), profile=str(profile), answer_tokens=9, batch_size=2)
    with pytest.raises(Interrupted):
        score(Job(tiny_llama, progress=Recorder("Score safety", 2)), tmp_path / "map", settings)
    profile.write_text(json.dumps({"safe": ["x"], "unsafe": ["y"]}))
    straight = score(Job(tiny_llama), tmp_path / "straight", settings)
    with pytest.raises(DataError, match=r"other .*profile\.safe \("):
        score(Job(tiny_llama), tmp_path / "map", settings)
    again = score(Job(tiny_llama), tmp_path / "map", settings, overwrite=True)
    assert same(again, straight)
    assert not list(tmp_path.glob(".map.*"))


def test_work_that_cannot_be_read_is_done_again(
    tiny_llama: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    settings = requests.score(batch_size=2)
    broken = Recorder("Score safety", after=3)
    with pytest.raises(Interrupted):
        score(Job(tiny_llama, progress=broken), tmp_path / "map", settings)
    (kept,) = tmp_path.glob(".map.*/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    straight = score(Job(tiny_llama), tmp_path / "straight", settings)
    assert same(score(Job(tiny_llama), tmp_path / "map", settings), straight)


def test_a_score_that_depends_on_no_weight_is_refused(
    tiny_llama: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constant(self: ReferenceObjective, model: nn.Module, start: int = 0) -> Iterator[Tensor]:
        yield torch.ones(())

    monkeypatch.setattr(ReferenceObjective, "terms", constant)
    with pytest.raises(SelectionError, match="expected weights on which it depends, found none"):
        score(Job(tiny_llama), tmp_path / "map", requests.score())


@pytest.mark.parametrize("what", ["base", "guard"])
def test_a_model_that_is_read_is_never_replaced(
    tiny_llama: Path, requests: Requests, guard: Path, tmp_path: Path, what: str
) -> None:
    out = {"base": tiny_llama, "guard": guard}[what]
    settings = requests.score(guard=str(guard), profile=str(tmp_path / "profile.json"))
    before = content(out)
    with pytest.raises(FormatError):
        score(Job(tiny_llama), out, settings, overwrite=True)
    assert content(out) == before


def test_what_an_interrupted_scoring_has_done_is_not_done_again(
    tiny_llama: Path, requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SAVE_SECONDS", 0)
    settings = requests.score(batch_size=2)
    broken = Recorder("Score safety", after=3)
    with pytest.raises(Interrupted):
        score(Job(tiny_llama, progress=broken), tmp_path / "map", settings)
    starts = []
    terms = ReferenceObjective.terms

    def watched(self: ReferenceObjective, model: nn.Module, start: int = 0) -> Iterator[Tensor]:
        starts.append(start)
        return terms(self, model, start)

    monkeypatch.setattr(ReferenceObjective, "terms", watched)
    score(Job(tiny_llama), tmp_path / "map", settings)
    assert starts == [2]


def test_entries_that_matter_for_benign_answers_are_left_out(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    plain = score(Job(tiny_llama), tmp_path / "plain", requests.score(density=0.478))
    settings = requests.score(density=0.2, contrast=requests.benign, contrast_density=0.1)
    contrasted = score(Job(tiny_llama), tmp_path / "contrasted", settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    spared = useful_entries(model, tiny_llama, round(0.1 * total_parameters(model)))
    expected = dense(plain, model)
    for name, indices in spared.items():
        expected[name][indices] = 0
    lowest = min(scores.min() for scores in contrasted.scores.values())
    for name, scores in expected.items():
        chosen = np.zeros(scores.size, bool)
        chosen[contrasted.indices.get(name, [])] = True
        assert (scores[chosen] >= lowest).all()
        assert (scores[~chosen] <= lowest).all()


def dense(safety_map: SafetyMap, model: nn.Module) -> dict[str, np.ndarray]:
    scores = {n: np.zeros(p.numel(), np.float32) for n, p in eligible_parameters(model).items()}
    for name, indices in safety_map.indices.items():
        scores[name][indices] = safety_map.scores[name]
    return scores


def useful_entries(model: nn.Module, base: Path, count: int) -> dict[str, np.ndarray]:
    """The entries that matter most for the model's own answers to benign requests."""
    tokenizer = load_tokenizer(resolve_base(str(base)))
    examples = generate_answers(model, Chat(tokenizer), BENIGN, max_new_tokens=64)
    parameters = eligible_parameters(model)
    gradients = sum_gradients(model, parameters, ReferenceObjective(examples, 256, 8))
    selected = select(score_entries(SCORES[Method.ESI], parameters, gradients), count)
    return {name: each.indices for name, each in selected.items()}


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transfer, "CACHE_DIR", tmp_path / "cache")
    profile = {"safe": ["s"], "unsafe": ["u"], "cue": "\n"}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    return save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))


def test_a_guard_judges_the_models_own_answers(
    tiny_llama: Path, requests: Requests, guard: Path, tmp_path: Path
) -> None:
    profile = str(tmp_path / "profile.json")
    settings = requests.score(guard=str(guard), profile=profile, answer_tokens=9)
    found = score(Job(tiny_llama), tmp_path / "map", settings)
    assert found.metadata.selection["objective"] == "guard"
    assert 0 < found.metadata.selection["mean_safety"] < 1
    assert count(found) == count(score(Job(tiny_llama), tmp_path / "plain", requests.score()))
    assert same(score(Job(tiny_llama), tmp_path / "again", settings), found)


def test_a_classifier_judges_the_models_own_answers(
    tiny_llama: Path, requests: Requests, guard: Path, tmp_path: Path
) -> None:
    classifier = save_tiny_classifier(save_byte_level_tokenizer(tmp_path / "cls"), ["ok", "bad"])
    settings = requests.score(classifier=str(classifier), label="unsafe=bad", answer_tokens=9)
    found = score(Job(tiny_llama), tmp_path / "map", settings)
    assert found.metadata.selection["objective"] == "classifier"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": "g", "classifier": "c"}, "expected one judge, found --classifier too"),
        ({"guard": "g"}, "--guard: expected --guard-profile with it, found none"),
        ({"profile": "wildguard"}, "--guard-profile: expected --guard with it, found none"),
        ({"samples": 2}, "--samples: expected --guard or --classifier with it, found neither"),
        ({"temperature": 1.0}, "--temperature: expected --guard or --classifier with it"),
        ({"classifier": "c"}, "--classifier: expected --classifier-label with it, found none"),
        ({"classifier": "c", "label": "bad"}, "expected safe=LABEL or unsafe=LABEL, found 'bad'"),
        ({"guard": "g", "profile": "nobody"}, "nobody: expected a JSON file or one of llama-guard"),
        (
            {"guard": "g", "profile": "wildguard", "method": Method.RANDOM},
            "expected --method esi or",
        ),
        ({"contrast": "builtin:benign_train", "method": Method.BOTTOM}, "expected --method esi"),
        ({"contrast": "builtin:benign_train", "granularity": "row"}, "--granularity entry and a"),
        ({"benign_examples": 9}, "--benign-examples: expected --method fisher or movement with it"),
        ({"movement_steps": 9}, "--movement-steps: expected --method movement with it"),
        ({"method": "movement", "layers_per_pass": 1}, "--layers-per-pass: expected another"),
        (
            {"granularity": "column", "density": 0.001},
            "--density: expected room for the longest column, 48 entries of .*at least 0.0",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tiny_llama: Path, requests: Requests, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        score(Job(tiny_llama), tmp_path / "map", requests.score(**changes))
    assert not list(tmp_path.glob("*map*"))
