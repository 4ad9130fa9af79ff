"""The scoring job: the right number of entries, by the plain formula, of a base that is named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from safeweights_peft.data import encode_example
from safeweights_peft.errors import FormatError, SelectionError
from safeweights_peft.format import SafetyMap, read_map
from safeweights_peft.merge import verify
from safeweights_peft.modeling import eligible_parameters, load_tokenizer, resolve_base
from safeweights_peft.pipeline import Method, score
from tests.tiny_jobs import HARMFUL, REFUSAL, Recorder, Requests, content


def count(safety_map: SafetyMap) -> int:
    return sum(indices.size for indices in safety_map.indices.values())


def plain_scores(base: Path) -> dict[str, np.ndarray]:
    """|σ · ∂S/∂θ| of all entries, one request at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = load_tokenizer(resolve_base(str(base)))
    for text in HARMFUL:
        example = encode_example(tokenizer, text, REFUSAL, 12)
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
    safety_map = score(str(tiny_llama), tmp_path / "map", requests.score(density=0.05))
    plain = plain_scores(tiny_llama)
    lowest = min(scores.min() for scores in safety_map.scores.values())
    for name, scores in plain.items():
        indices = safety_map.indices.get(name, np.empty(0, np.int32))
        found = safety_map.scores.get(name, np.empty(0, np.float32))
        assert found == pytest.approx(scores[indices], rel=1e-3)
        assert np.delete(scores, indices).max() <= lowest * 1.001


@pytest.mark.parametrize("method", list(Method))
def test_every_method_selects_the_same_number_of_entries(
    method: Method, tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.score(method=method, density=0.03)
    safety_map = score(str(tiny_llama), tmp_path / "map", settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert count(safety_map) == round(0.03 * sum(each.numel() for each in model.parameters()))


def test_the_bottom_control_scores_below_the_top(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    top = score(str(tiny_llama), tmp_path / "top", requests.score())
    settings = requests.score(method=Method.BOTTOM)
    bottom = score(str(tiny_llama), tmp_path / "bottom", settings)
    highest = max(scores.max() for scores in bottom.scores.values())
    assert highest < min(scores.min() for scores in top.scores.values())


def test_the_random_control_is_fixed_by_its_seed(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    drawn = [
        score(str(tiny_llama), tmp_path / str(i), requests.score(method=Method.RANDOM, seed=seed))
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
        score(str(tiny_llama), tmp_path / name, requests.score())
    files = [(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_returned_is_what_is_on_disk(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    returned = score(str(tiny_llama), tmp_path / "map", requests.score())
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
    score(str(path), tmp_path / "map", requests.score(density=0.01))
    assert verify(tmp_path / "map", path).ok


def test_the_map_tells_how_it_was_made(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.score(density=0.07, seed=3)
    metadata = score(str(tiny_llama), tmp_path / "map", settings).metadata
    assert metadata.base_model_name_or_path == str(tiny_llama)
    told = metadata.selection
    assert (told["method"], told["density"], told["seed"]) == ("esi", 0.07, 3)
    assert told["data_digest"].startswith("sha256:")


def test_a_map_holds_no_request(tiny_llama: Path, requests: Requests, tmp_path: Path) -> None:
    score(str(tiny_llama), tmp_path / "map", requests.score())
    for name, file in content(tmp_path).items():
        assert not any(text.encode() in file for text in HARMFUL), name


def test_an_existing_result_is_refused_before_anything_else(
    requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match=r"set overwrite to replace it$"):
        score("no base is looked for", tmp_path, requests.score())


def test_an_existing_result_is_replaced_when_asked(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    score(str(tiny_llama), tmp_path / "map", requests.score(density=0.01))
    again = score(str(tiny_llama), tmp_path / "map", requests.score(density=0.02), overwrite=True)
    assert count(read_map(tmp_path / "map")) == count(again)


def test_a_failed_score_leaves_the_old_map(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    score(str(tiny_llama), tmp_path / "map", requests.score())
    before = content(tmp_path)
    with pytest.raises(SelectionError):
        score(str(tiny_llama), tmp_path / "map", requests.score(density=1.0), overwrite=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("density", [1e-9, 1.0])
def test_a_density_that_cannot_be_met_is_refused_with_the_largest_that_can(
    density: float, tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    with pytest.raises(SelectionError, match=r"^density: expected 1 to \d+ .*at most 0\.\d+"):
        score(str(tiny_llama), tmp_path / "map", requests.score(density=density))


def test_progress_reaches_its_total(tiny_llama: Path, requests: Requests, tmp_path: Path) -> None:
    recorder = Recorder()
    score(str(tiny_llama), tmp_path / "map", requests.score(), progress=recorder)
    ((description, total, done),) = recorder.tasks
    assert description == "Scoring weights"
    assert done == total > 0
