"""Batches of every kind of model: each row gets what it gets alone; the twin knows no batches."""

import gc
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import utils as generation_utils

from safeweights_peft.chat import Chat
from safeweights_peft.data import Batching, Example, Layout, collate
from safeweights_peft.errors import DataError, EvaluationError, ModelError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.utility import measure_utility
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling import answers
from safeweights_peft.modeling.answers import answer_logits, find_layout, pads_behind
from safeweights_peft.modeling.loading import load_tokenizer
from safeweights_peft.selection.objective import ReferenceObjective
from tests.tiny_kinds import KINDS, build
from tests.tiny_models import COMMON

PAD = 256
START = tuple(range(60, 66))
PROMPTS = [START + tuple(range(70, 70 + count)) for count in (1, 14, 6, 30)]
ANSWERS = [(30, 31), (32, 33, 34), (35,), (36, 37)]
EXAMPLES = [Example(*pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]
parametrize_kinds = pytest.mark.parametrize("kind", KINDS)


built = cache(build)


def run_alone(model: PreTrainedModel, example: Example) -> Tensor:
    """One row, all logits, then a slice; no mask, no positions, no cache."""
    ids = torch.tensor([example.prompt_ids + example.answer_ids])
    return model(ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1].float()


@parametrize_kinds
def test_the_layout_is_the_fastest_that_is_right(kind: str) -> None:
    assert find_layout(built(kind)).batching is KINDS[kind][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@parametrize_kinds
def test_16_bits_neither_hide_what_is_wrong_nor_refuse_what_is_right(
    kind: str, dtype: torch.dtype
) -> None:
    assert find_layout(build(kind, dtype)).batching is KINDS[kind][0]


@parametrize_kinds
def test_logits_in_a_batch_are_those_of_each_row_alone(kind: str) -> None:
    model = built(kind)
    found = answer_logits(model, collate(EXAMPLES, PAD, find_layout(model)))
    assert found.dtype is torch.float32
    assert found.shape == (len(EXAMPLES), 3, COMMON["vocab_size"])
    for row, example in zip(found, EXAMPLES, strict=True):
        expected = run_alone(model, example)
        torch.testing.assert_close(row[: len(expected)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mpt", "gemma3_text", "mamba", "minimax", "roberta"])
def test_padding_behind_rows_is_right_where_padding_before_them_is_not(kind: str) -> None:
    assert pads_behind(built(kind))


def test_rows_are_not_padded_where_gradients_overflow() -> None:
    assert not pads_behind(build("gemma3n_text"))


def test_rows_are_not_padded_where_their_ends_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = model.forward
    # As CPM-Ant, whose prompts see the whole row.
    monkeypatch.setattr(
        model, "forward", lambda input_ids, **_: forward(input_ids.flip(1), use_cache=False)
    )
    assert not pads_behind(model)


@pytest.mark.parametrize("kind", ["mpt", "gemma3_text", "gpt_neo", "qwen3_5_text", "rwkv"])
def test_the_next_faster_layout_would_be_wrong(kind: str) -> None:
    """So that the rows here are ones on which a layout matters."""
    faster = list(Batching)[list(Batching).index(KINDS[kind][0]) - 1]
    batch = collate(EXAMPLES, PAD, Layout(faster))
    model = built(kind)
    found = model(batch.input_ids, attention_mask=batch.attention_mask).logits[0, -4:-2]
    assert (found - run_alone(model, EXAMPLES[0])).abs().max() > 0.01


@parametrize_kinds
def test_generated_answers_are_those_of_each_request_alone(kind: str, tiny_llama: Path) -> None:
    model, tokenizer = built(kind), load_tokenizer(resolve_base(str(tiny_llama)))
    texts = ["?", "Write a poem about the sea.", "Sew on.", "Sew."]
    found = generate_answers(model, Chat(tokenizer), texts, max_new_tokens=5)
    for example in found:
        answer: tuple[int, ...] = ()
        while len(answer) < 5 and 258 not in answer:
            example_so_far = Example(example.prompt_ids, (*answer, 0))
            answer += (int(run_alone(model, example_so_far)[-1].argmax()),)
        assert example.answer_ids == answer


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text", "mamba", "gemma3n_text", "rwkv"])
def test_objectives_and_their_gradients_are_those_of_a_loop_over_rows(kind: str) -> None:
    model = build(kind)
    objective = ReferenceObjective(EXAMPLES, PAD, batch_size=3)
    found = sum(objective.terms(model))
    expected = torch.zeros(())
    for example in EXAMPLES:
        logs = run_alone(model, example).log_softmax(-1)
        token_ids = torch.tensor(example.answer_ids)
        expected = expected + logs.gather(-1, token_ids[:, None]).mean() / len(EXAMPLES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = dict(model.named_parameters())
    gradients = [
        torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for value in (found, expected)
    ]
    for name, left, right in zip(parameters, *gradients, strict=True):
        assert (left is None) == (right is None), name
        if left is not None:
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba", "rwkv"])
def test_perplexity_does_not_depend_on_the_batch(kind: str) -> None:
    model = built(kind)
    together, alone = (
        measure_utility(model, EXAMPLES, PAD, batch_size=size).perplexity for size in (4, 1)
    )
    assert together == pytest.approx(alone, rel=1e-5)


# --- the check itself --------------------------------------------------------------------------


def test_a_model_is_checked_once_and_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    layout = find_layout(model)
    monkeypatch.setattr(model, "forward", None)
    assert find_layout(model) is layout
    gone = weakref.ref(model)
    del model
    monkeypatch.undo()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo"])
def test_dropout_is_off_for_the_check_alone(kind: str) -> None:
    model = build(kind, attn_pdrop=0.5, resid_pdrop=0.5, resid_dropout=0.5).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    assert find_layout(model).batching is KINDS[kind][0]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_without_finite_logits_runs_row_by_row() -> None:
    model = build("llama")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    assert find_layout(model).batching is Batching.ALONE


def test_a_model_whose_logits_are_all_alike_is_as_right_as_any() -> None:
    model = build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert find_layout(model).batching is Batching.SHARED


def test_a_model_that_fails_on_what_it_is_asked_to_cache_runs_row_by_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    forward = model.forward

    def fail(*arguments: Any, use_cache: bool = False, **options: Any) -> Any:
        if use_cache:
            raise IndexError
        return forward(*arguments, use_cache=False, **options)

    monkeypatch.setattr(model, "forward", fail)
    assert find_layout(model).batching is Batching.ALONE


def test_a_cache_without_gradients_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_compute_past", torch.no_grad()(answers._compute_past))
    assert find_layout(build("llama")).batching is Batching.LEFT


def test_a_model_without_gradients_is_judged_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(model, "forward", torch.no_grad()(model.forward))
    assert find_layout(model).batching is Batching.SHARED


def test_the_check_leaves_no_gradients_and_needs_none() -> None:
    model = build("mpt").requires_grad_(False)
    with torch.inference_mode():
        assert find_layout(model).batching is Batching.LEFT
    model = build("gemma3n_text")
    assert find_layout(model).batching is Batching.ALONE
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_fails_on_one_row_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")

    def fail(**options: Any) -> Any:
        raise ValueError("rows of 64\ntokens alone")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(
        ModelError, match=r"^LlamaForCausalLM: expected .*, found ValueError: rows of 64 tokens"
    ):
        find_layout(model)


def test_a_model_that_fails_to_generate_answers_by_its_forward(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = build("minimax"), load_tokenizer(resolve_base(str(tiny_llama)))
    expected = generate_answers(model, Chat(tokenizer), ["Sew.", "Mend it"], max_new_tokens=4)
    model = build("minimax")
    monkeypatch.setattr(model, "generate", None)
    assert not find_layout(model).generates
    found = generate_answers(model, Chat(tokenizer), ["Sew.", "Mend it"], max_new_tokens=4)
    assert found == expected


def test_transformers_has_nothing_to_say_of_how_it_is_called(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It logs by a logger of its own, whose records are no warnings.
    monkeypatch.setattr(generation_utils.logger, "warning_once", pytest.fail)
    tokenizer = load_tokenizer(resolve_base(str(tiny_llama)))
    generate_answers(build("mpt"), Chat(tokenizer), ["Sew."], max_new_tokens=2)


def test_too_little_memory_is_not_taken_for_a_model_that_takes_no_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")

    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        find_layout(model)


def test_a_cache_of_another_class_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherCache(answers.DynamicCache):
        pass

    past = OtherCache(config=build("llama").config)
    monkeypatch.setattr(answers, "_compute_past", lambda model, batch: past)
    assert find_layout(build("llama")).batching is Batching.LEFT


# --- tables of positions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "positions"),
    [
        ("llama", {}, None),
        ("llama", {"max_position_embeddings": COMMON["vocab_size"]}, None),
        ("gpt2", {}, 64),
        ("roberta", {"pad_token_id": 1}, 510),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, 512),
        ("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}, 512),
    ],
)
def test_a_table_of_positions_limits_rows(
    kind: str, options: dict[str, Any], positions: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, kind, KINDS.get(kind, (Batching.SHARED, {})))
    model = build(kind, **options)
    assert find_layout(model).positions == positions
    if positions is not None:
        longest = Example((*START, *[70] * (positions - 1 - len(START))), (7,))
        batch = collate([longest, EXAMPLES[0]], PAD, find_layout(model))
        assert answer_logits(model, batch)[0].isfinite().all()


def test_a_row_longer_than_the_positions_is_refused() -> None:
    long = Example((70,) * 63, (7, 8))
    with pytest.raises(DataError, match=r"^a request: expected at most 64 tokens .* found 63 \+ 2"):
        collate([EXAMPLES[0], long], PAD, find_layout(built("gpt2")))


def test_a_request_that_leaves_no_room_for_its_answer_is_refused(tiny_llama: Path) -> None:
    model, tokenizer = built("gpt2"), load_tokenizer(resolve_base(str(tiny_llama)))
    with pytest.raises(
        EvaluationError, match=r"^request 'Mend the roof': expected at most 24 tokens, as .* 64"
    ):
        generate_answers(model, Chat(tokenizer), ["Mend the roof"], max_new_tokens=40)
