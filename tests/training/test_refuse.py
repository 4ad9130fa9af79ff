"""SET: the loss is the plain one, only the chosen entries move, and a run can be broken off."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from safeweights_peft.chat import Chat
from safeweights_peft.data import IGNORED, Example, Layout, collate
from safeweights_peft.errors import TrainingError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.layout import describe
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode
from safeweights_peft.settings import TrainSettings
from safeweights_peft.training import finetune
from safeweights_peft.training.refuse import (
    StepLoss,
    compute_refusal_loss,
    compute_retain_loss,
    train_to_refuse,
    weigh_tokens,
)
from safeweights_peft.tuner.adapter import create_adapter
from safeweights_peft.tuner.layer import layers
from tests.tiny_jobs import BENIGN, HARMFUL, REFUSAL, Interrupted
from tests.tiny_kinds import build
from tests.tiny_models import save_tiny_tokenizer

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
SETTINGS = TrainSettings(
    steps=5,
    learning_rate=0.01,
    retain_weight=1.0,
    harmful_batch_size=2,
    benign_batch_size=3,
    token_decay=0.8,
    warmup_steps=1,
    seed=0,
)
ANSWERS = torch.tensor([[3, 1, 4, 1], [5, 2, IGNORED, IGNORED], [6, IGNORED, IGNORED, IGNORED]])


class Job:
    """A tiny base with an adapter of random entries, and examples to train it on."""

    def __init__(
        self,
        base: Path,
        dtype: str | torch.dtype = "auto",
        values_dtype: str = "float32",
        names: list[str] = NAMES,
    ) -> None:
        source = resolve_base(str(base))
        self.tokenizer = load_tokenizer(source)
        self.plain = load_model(source, dtype)
        random = np.random.default_rng(0)
        records = describe(self.plain, names, base)
        self.indices = {
            name: np.sort(random.choice(record.numel, 200, replace=False))
            for name, record in records.items()
        }
        metadata = AdapterMetadata(mode=Mode.SET, values_dtype=values_dtype, tensors=records)
        self.model = create_adapter(load_model(source, dtype), metadata, self.indices)
        self.harmful = [Chat(self.tokenizer).encode_example(text, REFUSAL, 8) for text in HARMFUL]
        self.benign = [Chat(self.tokenizer).encode_example(text, "Yes.", 4) for text in BENIGN]

    def run(self, work_dir: Path, stop_at: int | None = None, **changes: object) -> list[StepLoss]:
        """Train, or break off in the middle of a step."""

        def on_step(step: int, **losses: float) -> None:
            self.steps.append(step)
            if step == stop_at:
                raise Interrupted

        self.steps: list[int] = []
        settings = dataclasses.replace(SETTINGS, **changes)
        examples = (self.harmful, self.benign)
        return train_to_refuse(self.model, self.tokenizer, *examples, settings, work_dir, on_step)

    def values(self) -> dict[str, Tensor]:
        return {layer.name: layer["default"].detach() for layer in layers(self.model, "default")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def answer_logits_alone(model: nn.Module, example: Example) -> Tensor:
    """Run one example by itself: no padding, no batch; (A, V)."""
    ids = torch.tensor([example.prompt_ids + example.answer_ids])
    return model(ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1].float()


def plain_refusal_loss(model: nn.Module, examples: list[Example], decay: float) -> Tensor:
    total, weights = torch.zeros(()), 0.0
    for example in examples:
        logits = answer_logits_alone(model, example)
        for position, token in enumerate(example.answer_ids):
            total = total - decay**position * logits[position].log_softmax(-1)[token]
            weights += decay**position
    return total / weights


def test_the_refusal_loss_is_that_of_a_plain_loop_over_tokens() -> None:
    logits, decay = torch.randn(3, 4, 7), 0.7
    total = weights = 0.0
    for row in range(3):
        for position in range(4):
            token = int(ANSWERS[row, position])
            if token != IGNORED:
                odds = [math.exp(x) for x in logits[row, position].tolist()]
                total -= decay**position * math.log(odds[token] / sum(odds))
                weights += decay**position
    assert compute_refusal_loss(logits, ANSWERS, decay).item() == pytest.approx(
        total / weights, rel=1e-5
    )


def test_the_retain_loss_is_that_of_a_plain_loop_over_tokens() -> None:
    logits, base, decay = torch.randn(3, 4, 7), torch.randn(3, 4, 7), 0.7
    total = weights = 0.0
    for row in range(3):
        for position in range(4):
            if int(ANSWERS[row, position]) != IGNORED:
                p = base[row, position].double().softmax(-1).tolist()
                q = logits[row, position].double().softmax(-1).tolist()
                kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                total += decay**position * kl
                weights += decay**position
    actual = compute_retain_loss(logits, base, ANSWERS, decay).item()
    assert actual == pytest.approx(total / weights, rel=1e-5)


def test_what_stands_after_an_answers_end_changes_no_loss() -> None:
    logits, base = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    before = (
        compute_refusal_loss(logits, ANSWERS, 0.7),
        compute_retain_loss(logits, base, ANSWERS, 0.7),
    )
    logits[ANSWERS == IGNORED] = 1e4
    base[ANSWERS == IGNORED] = -1e4
    after = (
        compute_refusal_loss(logits, ANSWERS, 0.7),
        compute_retain_loss(logits, base, ANSWERS, 0.7),
    )
    assert after == before


def test_token_weights_fall_by_the_decay_and_sum_to_one() -> None:
    weights = weigh_tokens(ANSWERS, 0.5)
    assert weights.sum().item() == pytest.approx(1.0)
    assert torch.equal(weights > 0, ANSWERS != IGNORED)
    assert torch.allclose(weights[0, 1:], weights[0, :-1] / 2)


def test_the_first_steps_loss_is_the_base_models_own(tiny_llama: Path, tmp_path: Path) -> None:
    job = Job(tiny_llama)
    (loss,) = job.run(tmp_path, steps=1, harmful_batch_size=len(job.harmful))
    with torch.no_grad():
        expected = plain_refusal_loss(job.plain, job.harmful, SETTINGS.token_decay).item()
    assert loss.refusal == pytest.approx(expected, rel=1e-4)
    assert loss.retain == pytest.approx(0, abs=1e-5)


def test_the_first_step_moves_each_entry_against_its_plain_gradient(
    tiny_llama: Path, tmp_path: Path
) -> None:
    job = Job(tiny_llama)
    job.run(tmp_path, steps=1, harmful_batch_size=len(job.harmful), warmup_steps=0)
    parameters = {name: job.plain.get_parameter(name).requires_grad_() for name in NAMES}
    plain_refusal_loss(job.plain, job.harmful, SETTINGS.token_decay).backward()
    for name, values in job.values().items():
        gradient = parameters[name].grad.flatten()[torch.from_numpy(job.indices[name])]
        clear = gradient.abs() > 1e-5
        assert clear.float().mean() > 0.9
        assert torch.equal(values[clear].sign(), -gradient[clear].sign())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("qwen3_5_text", NAMES),  # padded on the left
        ("rwkv", ["rwkv.blocks.0.feed_forward.key.weight", "head.weight"]),  # row by row
    ],
)
def test_models_with_a_state_are_trained_as_if_each_row_were_alone(
    kind: str, names: list[str], tmp_path: Path
) -> None:
    build(kind).save_pretrained(tmp_path / "base")
    job = Job(save_tiny_tokenizer(tmp_path / "base"), names=names)
    (loss,) = job.run(tmp_path, steps=1, harmful_batch_size=6, warmup_steps=0)
    parameters = {name: job.plain.get_parameter(name).requires_grad_() for name in names}
    expected = plain_refusal_loss(job.plain, job.harmful, SETTINGS.token_decay)
    assert loss.refusal == pytest.approx(expected.item(), rel=1e-4)
    assert loss.retain == pytest.approx(0, abs=1e-5)
    expected.backward()
    for name, values in job.values().items():
        gradient = parameters[name].grad.flatten()[torch.from_numpy(job.indices[name])]
        clear = gradient.abs() > 1e-5
        assert clear.float().mean() > 0.5
        assert torch.equal(values[clear].sign(), -gradient[clear].sign())


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16"])
def test_training_leaves_the_base_bitwise_as_it_was(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = Job(request.getfixturevalue(base))
    job.run(tmp_path)
    assert same(dict(job.model.unload().named_parameters()), dict(job.plain.named_parameters()))


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16"])
def test_the_merged_model_differs_from_the_base_at_selected_entries_only(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = Job(request.getfixturevalue(base))
    job.run(tmp_path)
    merged = dict(job.model.merge_and_unload().named_parameters())
    for name, before in job.plain.named_parameters():
        moved = (merged[name] != before).flatten().nonzero().flatten().numpy()
        assert set(moved) <= set(job.indices.get(name, []))


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16"])
def test_the_selected_entries_move(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = Job(request.getfixturevalue(base))
    job.run(tmp_path)
    for values in job.values().values():
        assert values.dtype is torch.float32
        assert (values != 0).float().mean() > 0.9


def test_both_losses_together_fall(tiny_llama: Path, tmp_path: Path) -> None:
    job = Job(tiny_llama)
    losses = job.run(tmp_path, steps=20, harmful_batch_size=6)
    whole = [loss.refusal + SETTINGS.retain_weight * loss.retain for loss in losses]
    assert whole[-1] < 0.9 * whole[0]


def test_a_larger_retain_weight_keeps_the_model_closer_to_its_base(
    tiny_llama: Path, tmp_path: Path
) -> None:
    retained = []
    for weight in (0.0, 100.0):
        losses = Job(tiny_llama).run(tmp_path / str(weight), steps=10, retain_weight=weight)
        retained.append(losses[-1].retain)
    assert retained[1] < retained[0] / 2


@pytest.mark.parametrize(
    ("stop_at", "values_dtype"),
    [(1, "float32"), (3, "float32"), (5, "float32"), (4, "bfloat16")],
)
def test_an_interrupted_run_ends_bitwise_like_a_straight_one(
    stop_at: int, values_dtype: str, tiny_llama: Path, tmp_path: Path
) -> None:
    straight = Job(tiny_llama, values_dtype=values_dtype)
    losses = straight.run(tmp_path / "straight")
    with pytest.raises(Interrupted):
        Job(tiny_llama, values_dtype=values_dtype).run(tmp_path / "broken", stop_at)
    resumed = Job(tiny_llama, values_dtype=values_dtype)
    assert resumed.run(tmp_path / "broken") == losses
    assert same(resumed.values(), straight.values())


def test_a_resumed_run_starts_after_its_last_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Job(tiny_llama).run(tmp_path, stop_at=4)
    resumed = Job(tiny_llama)
    resumed.run(tmp_path)
    assert resumed.steps == [4, 5]


@pytest.mark.parametrize("state", ["", '{"epoch": 0.'], ids=["no state", "half a state"])
def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(
    state: str, tiny_llama: Path, tmp_path: Path
) -> None:
    losses = Job(tiny_llama).run(tmp_path / "straight")
    with pytest.raises(Interrupted):
        Job(tiny_llama).run(tmp_path / "broken", stop_at=4)
    half = tmp_path / "broken" / "checkpoint-4"
    half.mkdir()
    if state:
        (half / "trainer_state.json").write_text(state)
    resumed = Job(tiny_llama)
    assert resumed.run(tmp_path / "broken") == losses
    assert resumed.steps == [4, 5]


def test_a_finished_run_is_not_trained_again(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = Job(tiny_llama), Job(tiny_llama)
    losses = first.run(tmp_path)
    assert second.run(tmp_path) == losses
    assert second.steps == []
    assert same(second.values(), first.values())


@pytest.mark.parametrize("stop_at", [3, None])
def test_the_storage_dtype_of_the_values_is_the_same_after_training(
    stop_at: int | None, tiny_llama: Path, tmp_path: Path
) -> None:
    job = Job(tiny_llama, values_dtype="bfloat16")
    try:
        job.run(tmp_path, stop_at)
    except Interrupted:
        assert stop_at is not None
    assert job.model.peft_config["default"].values_dtype == "bfloat16"


def test_the_same_seed_gives_the_same_values(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = Job(tiny_llama), Job(tiny_llama)
    first.run(tmp_path / "first", seed=7)
    torch.manual_seed(99)  # what the caller's generator holds must not matter
    second.run(tmp_path / "second", seed=7)
    assert same(first.values(), second.values())


def test_another_seed_gives_other_values(tiny_llama: Path, tmp_path: Path) -> None:
    first, second = Job(tiny_llama), Job(tiny_llama)
    first.run(tmp_path / "first", seed=7)
    second.run(tmp_path / "second", seed=8)
    assert not same(first.values(), second.values())


def test_no_example_comes_again_before_all_have_come(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, seen = Job(tiny_llama), []

    def spy(examples: list[Example], pad_token_id: int, layout: Layout) -> object:
        if any(example in job.harmful for example in examples):  # the benign come alone as well
            seen.extend(examples)
        return collate(examples, pad_token_id, layout)

    monkeypatch.setattr(sys.modules[train_to_refuse.__module__], "collate", spy)
    job.run(tmp_path, steps=6, harmful_batch_size=4, benign_batch_size=4)
    for known in (job.harmful, job.benign):
        dealt = [example for example in seen if example in known]
        rounds = [dealt[start : start + len(known)] for start in range(0, len(dealt), len(known))]
        assert len(rounds) == 4
        assert all(set(round_) == set(known) for round_ in rounds)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 60)  # a save would find the values first
    job = Job(tiny_llama)
    with pytest.raises(TrainingError, match=r"^step 2: expected a finite loss, found .*lower --lr"):
        job.run(tmp_path, learning_rate=1e38, warmup_steps=0)


@pytest.mark.parametrize("missing", ["harmful", "benign"])
def test_training_without_examples_is_refused(
    missing: str, tiny_llama: Path, tmp_path: Path
) -> None:
    job = Job(tiny_llama)
    setattr(job, missing, [])
    with pytest.raises(TrainingError, match=r"^examples: expected harmful and benign ones"):
        job.run(tmp_path)


def test_training_prints_nothing(
    tiny_llama: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(tiny_llama)
    capfd.readouterr()
    # One checkpoint: of several within a second, transformers says that their order is unsure.
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 60)
    job.run(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_trained_model_is_ready_to_be_used(tiny_llama: Path, tmp_path: Path) -> None:
    job = Job(tiny_llama)
    job.run(tmp_path)
    assert isinstance(job.model, PeftModel)
    assert not any(module.training for module in job.model.modules())
