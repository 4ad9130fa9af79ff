"""Batched answers, greedy or drawn, held to plain generation of one request at a time."""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.chat import Chat
from safeweights_peft.data import Batching, Example, Layout
from safeweights_peft.errors import EvaluationError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.loading import load_model, load_tokenizer

LIMIT, END = 12, 258
REQUESTS = [
    "Bake a cake.",
    "Sew.",
    "Write a poem about the sea in the style of a tired lighthouse keeper.",
    "Sew.",
    "Plant a tree, then another.",
    "Sew on.",
    "?",
]


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    base = resolve_base(str(path))
    return load_model(base, torch.float32), load_tokenizer(base)


def answer_alone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: str,
    ends: Collection[int] = (END,),
) -> Example:
    """The slow twin: one request, no padding, no cache, one argmax a token."""
    prompt = Chat(tokenizer).encode_prompt(request)
    answer: tuple[int, ...] = ()
    while len(answer) < LIMIT and not (answer and answer[-1] in ends):
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
        answer += (int(logits.argmax()),)
    return Example(prompt, answer)


def generate_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: str
) -> tuple[int, ...]:
    ids = torch.tensor([Chat(tokenizer).encode_prompt(request)])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=LIMIT,
    )
    return tuple(output[0, ids.shape[1] :].tolist())


@dataclass(frozen=True)
class Case:
    """A model and what it answers to each request alone."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    expected: list[Example]


@pytest.fixture(
    scope="module", params=["tiny_llama", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
)
def case(request: pytest.FixtureRequest) -> Case:
    model, tokenizer = load(request.getfixturevalue(request.param))
    return Case(model, tokenizer, [answer_alone(model, tokenizer, text) for text in REQUESTS])


@pytest.mark.parametrize("batch_size", [1, 3, 25])
def test_batched_answers_are_those_of_one_request_at_a_time(case: Case, batch_size: int) -> None:
    found = generate_answers(
        case.model, Chat(case.tokenizer), REQUESTS, max_new_tokens=LIMIT, batch_size=batch_size
    )
    assert found == case.expected


def test_batched_answers_are_those_of_the_models_own_generate(case: Case) -> None:
    found = generate_answers(case.model, Chat(case.tokenizer), REQUESTS, max_new_tokens=LIMIT)
    expected = [generate_alone(case.model, case.tokenizer, request) for request in REQUESTS]
    assert [example.answer_ids for example in found] == expected


def draw_answers(case: Case, requests: list[str], seed: int, batch_size: int = 25) -> list[Example]:
    return generate_answers(
        case.model,
        Chat(case.tokenizer),
        requests,
        max_new_tokens=LIMIT,
        batch_size=batch_size,
        seed=seed,
    )


def test_drawn_answers_hang_on_the_seed_and_not_on_the_batch(case: Case) -> None:
    first = draw_answers(case, REQUESTS, 0)
    assert first == draw_answers(case, REQUESTS, 0, batch_size=3)
    assert first != draw_answers(case, REQUESTS, 1)
    assert first[1] != first[3]  # the same request, drawn apart
    assert first != case.expected


def test_drawing_leaves_the_random_state_alone(tiny_llama: Path) -> None:
    case, before = Case(*load(tiny_llama), []), torch.get_rng_state()
    draw_answers(case, REQUESTS[:2], 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("generates", [True, False])
def test_tokens_are_drawn_from_what_the_model_predicts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generates: bool
) -> None:
    model, tokenizer = load(with_ends(tmp_path, tiny_llama, 3))  # settings that nobody asked for
    if not generates:
        layout = Layout(Batching.ALONE, generates=False)
        monkeypatch.setattr("safeweights_peft.evaluation.generate.find_layout", lambda _: layout)
    count = 2000 if generates else 300
    found = generate_answers(
        model, Chat(tokenizer), ["Sew."] * count, max_new_tokens=1, batch_size=500, seed=5
    )
    prompt = torch.tensor([Chat(tokenizer).encode_prompt("Sew.")])
    with torch.no_grad():
        expected = model(prompt).logits[0, -1].double().softmax(-1)
    tokens = torch.tensor([answer.answer_ids[0] for answer in found])
    # Of 259 tokens: chi-square in ten bins of about a tenth each.
    order = expected.argsort(descending=True)
    bins = torch.empty(len(expected), dtype=torch.int64)
    bins[order] = (expected[order].cumsum(0) * 10).long().clamp(max=9)
    wanted = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, expected) * count
    counted = torch.bincount(bins[tokens], minlength=10)
    assert ((counted - wanted) ** 2 / wanted).sum() < 27.9  # 0.1 % of draws, by chance


def test_answers_keep_the_order_of_their_requests(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    found = generate_answers(model, Chat(tokenizer), REQUESTS, max_new_tokens=2, batch_size=2)
    prompts = [Chat(tokenizer).encode_prompt(request) for request in REQUESTS]
    assert [example.prompt_ids for example in found] == prompts


def test_a_prompt_that_begins_another_is_answered_as_if_alone(tiny_llama: Path) -> None:
    """Without a cue for the answer one prompt can be the start of the next."""
    model, tokenizer = load(tiny_llama)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    requests = ["Sew", "Sew a", "Sew a hem", "Sew"]
    found = generate_answers(model, Chat(tokenizer), requests, max_new_tokens=LIMIT)
    assert found == [answer_alone(model, tokenizer, request) for request in requests]


def with_ends(tmp_path: Path, source: Path, ends: int | list[int] | None) -> Path:
    """Copies a model and changes its generation settings: other ends, and sampling on."""
    path = tmp_path / "model"
    shutil.copytree(source, path)
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 3, "eos_token_id": ends}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_stops_at_the_first_of_the_models_end_tokens_and_keeps_it(
    tmp_path: Path, tiny_llama: Path, several: bool
) -> None:
    model, tokenizer = load(tiny_llama)
    endless = [answer_alone(model, tokenizer, request, ()).answer_ids for request in REQUESTS]
    ends = [endless[0][3], endless[2][5]] if several else endless[0][3]
    stopping, _ = load(with_ends(tmp_path, tiny_llama, ends))
    found = generate_answers(stopping, Chat(tokenizer), REQUESTS, max_new_tokens=LIMIT)
    stops = ends if isinstance(ends, list) else [ends]
    assert found == [answer_alone(model, tokenizer, request, stops) for request in REQUESTS]
    assert len({len(example.answer_ids) for example in found}) > 1


def test_the_tokenizers_end_token_stands_in_where_the_model_names_none(
    tmp_path: Path, tiny_llama: Path
) -> None:
    model, tokenizer = load(with_ends(tmp_path, tiny_llama, None))
    model.generation_config.eos_token_id = None
    plain = generate_answers(model, Chat(tokenizer), REQUESTS[:1], max_new_tokens=LIMIT)[
        0
    ].answer_ids
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(plain[2])
    found = generate_answers(model, Chat(tokenizer), REQUESTS[:1], max_new_tokens=LIMIT)[
        0
    ].answer_ids
    assert found == plain[: plain.index(plain[2]) + 1]


def test_a_models_own_sampling_settings_stay_out(tmp_path: Path, tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    sampling, _ = load(with_ends(tmp_path, tiny_llama, END))
    assert sampling.generation_config.do_sample
    expected = generate_answers(model, Chat(tokenizer), REQUESTS, max_new_tokens=LIMIT)
    assert generate_answers(sampling, Chat(tokenizer), REQUESTS, max_new_tokens=LIMIT) == expected


def test_an_answer_is_never_longer_than_the_limit(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    for limit in (1, 5):
        answers = generate_answers(model, Chat(tokenizer), REQUESTS, max_new_tokens=limit)
        assert max(len(example.answer_ids) for example in answers) <= limit


def test_each_batch_is_reported_with_its_size(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    sizes: list[int] = []
    generate_answers(
        model,
        Chat(tokenizer),
        REQUESTS,
        max_new_tokens=1,
        batch_size=3,
        on_batch=lambda answers: sizes.append(len(answers)),
    )
    assert sizes == [3, 3, 1]


def test_no_requests_at_all_are_refused(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    with pytest.raises(EvaluationError, match="prompts: expected at least one request"):
        generate_answers(model, Chat(tokenizer), [], max_new_tokens=1)
