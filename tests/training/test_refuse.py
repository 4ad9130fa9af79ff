"""SET: the loss is the plain one, only the chosen entries move, and a run can be broken off."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
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
from safeweights_peft.training.losses import (
    Targets,
    compute_hinge_loss,
    compute_refusal_loss,
    compute_retain_loss,
    compute_targets,
    find_likeliest,
    find_openers,
    sum_up,
    weigh_tokens,
)
from safeweights_peft.training.refuse import (
    StepLoss,
    deal_steps,
    find_learning_rate,
    train_to_refuse,
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
    answer_tokens=4,
    warmup_steps=1,
    shrink=0.0,
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


def keep(base: Tensor, openers: tuple[int, ...] = ()) -> Targets:
    """Keep what is kept of a base's logits."""
    ids, chances = find_likeliest(base), base.softmax(-1)
    silence = torch.log(1 - chances[..., list(openers)].sum(-1))
    return Targets(ids.int(), sum_up(base, ids), torch.tensor(openers, dtype=torch.int64), silence)


def test_the_retain_loss_is_that_of_a_plain_loop_over_tokens() -> None:
    logits, base = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    total = count = 0.0
    for row in range(3):
        for position in range(4):
            if int(ANSWERS[row, position]) != IGNORED:
                p = base[row, position].double().softmax(-1).tolist()
                q = logits[row, position].double().softmax(-1).tolist()
                kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                total += kl
                count += 1
    actual = compute_retain_loss(logits, keep(base), ANSWERS).item()
    assert actual == pytest.approx(total / count, rel=1e-5)


def full_kl(base: Tensor, tuned: Tensor) -> Tensor:
    p, q = base.double().log_softmax(-1), tuned.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("change", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
def test_the_likeliest_tokens_and_the_rest_have_about_the_kl_of_all(
    spread: float, change: float
) -> None:
    # As far spread as a model's logits, 2 to 4, the likeliest of 2,000 hold much of the mass.
    random = torch.Generator().manual_seed(0)
    base = spread * torch.randn(50, 1, 2000, generator=random)
    tuned = base + change * torch.randn(50, 1, 2000, generator=random)
    answers = torch.zeros(50, 1, dtype=torch.int64)
    expected = full_kl(base, tuned).mean().item()
    actual = compute_retain_loss(tuned, keep(base), answers).item()
    assert actual <= expected
    if spread == 4.0:
        assert actual >= 0.97 * expected


def test_what_stands_after_an_answers_end_changes_no_loss() -> None:
    logits, base = torch.randn(3, 4, 7), torch.randn(3, 4, 7)

    def losses() -> tuple[Tensor, ...]:
        return (
            compute_refusal_loss(logits, ANSWERS, 0.7),
            compute_retain_loss(logits, keep(base), ANSWERS),
            compute_hinge_loss(logits, keep(base, (1, 5)), ANSWERS),
        )

    before = losses()
    logits[ANSWERS == IGNORED] = 1e4
    base[ANSWERS == IGNORED] = -1e4
    assert losses() == before


def test_the_hinge_is_that_of_a_plain_loop_over_tokens() -> None:
    logits, base, openers = torch.randn(3, 4, 7), torch.randn(3, 4, 7), (1, 5)
    total = 0.0
    for row in range(3):
        for position in range(4):
            if int(ANSWERS[row, position]) != IGNORED:
                was, now = (
                    1 - x[row, position].double().softmax(-1)[list(openers)].sum().item()
                    for x in (base, logits)
                )
                total += max(0.0, math.log(was) - math.log(now))
    actual = compute_hinge_loss(logits, keep(base, openers), ANSWERS).item()
    assert actual == pytest.approx(total / 3, rel=1e-5)


def test_the_hinge_costs_nothing_where_openers_are_no_likelier_than_in_the_base() -> None:
    base = torch.randn(3, 4, 7)
    logits = base.clone().requires_grad_()
    lower = torch.zeros(7).index_fill(0, torch.tensor([1, 5]), -0.1)
    loss = compute_hinge_loss(logits + lower, keep(base, (1, 5)), ANSWERS)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("gap", [0.1, 10.0, 1e4])
def test_the_hinge_pushes_openers_down_and_stays_finite(gap: float) -> None:
    base = torch.randn(3, 4, 7)
    logits = base + gap * torch.eye(7)[1]
    logits.requires_grad_()
    loss = compute_hinge_loss(logits, keep(base, (1, 5)), ANSWERS)
    loss.backward()
    assert loss.item() > 0
    assert logits.grad.isfinite().all()
    if gap < 20:  # from where there is no slope in float32
        assert (logits.grad[..., 1][ANSWERS != IGNORED] > 0).all()


def test_openers_are_the_first_tokens_of_refusals_wherever_a_text_goes_on(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(resolve_base(str(tiny_llama)))
    chat = Chat(tokenizer)
    refusals = [chat.encode_example("Go", text, 8) for text in ("I can't.", "No.", "I won't.")]
    openers = find_openers(tokenizer, refusals)
    assert {refusal.answer_ids[0] for refusal in refusals} <= set(openers)
    assert {tokenizer.decode([token]).strip() for token in openers} == {"I", "N"}


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_targets_are_what_the_base_predicts_for_each_row_alone(tiny_llama: Path, size: int) -> None:
    job = Job(tiny_llama)
    chat = Chat(job.tokenizer)
    texts = ["Yes.", "Well, yes.", "No", "Yes, of course, and more.", "Y", "Yes."]
    pairs = zip(BENIGN, texts, strict=True)
    rows = [chat.encode_example(request, text, 9) for request, text in pairs]
    settings = dataclasses.replace(
        SETTINGS, benign_batch_size=size, hinge_weight=1.0, hinge_tokens=9
    )
    targets = compute_targets(job.model, job.tokenizer, rows, settings, job.harmful)
    for place, row in enumerate(rows):
        with torch.no_grad():
            alone = answer_logits_alone(job.plain, row).log_softmax(-1)
        count, near = len(row.answer_ids), min(len(row.answer_ids), 4)
        kept = targets.token_ids[place, :near].long()
        assert torch.allclose(
            targets.log_probs[place, :near, :-1], alone[:near].gather(-1, kept), atol=1e-4
        )
        others = alone[:near].exp().scatter(-1, kept, 0.0).sum(-1).log()
        assert torch.allclose(targets.log_probs[place, :near, -1], others, atol=1e-4)
        silent = (1 - alone[near:].exp()[:, targets.openers].sum(-1)).log()
        assert torch.allclose(targets.silence[place, : count - near], silent, atol=1e-4)


def test_the_base_is_asked_once_for_each_benign_answer(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, asked = Job(tiny_llama), []
    module = sys.modules[train_to_refuse.__module__]

    def spy(model: nn.Module, tokenizer: object, examples: list[Example], *rest: object) -> object:
        asked.extend(examples)
        return compute_targets(model, tokenizer, examples, *rest)

    monkeypatch.setattr(module, "compute_targets", spy)
    job.run(tmp_path, steps=6)
    assert len(asked) == len(set(asked)) == len(set(job.benign))


def test_the_hinge_keeps_later_tokens_of_benign_answers_from_refusals(
    tiny_llama: Path, tmp_path: Path
) -> None:
    lost = []
    for weight in (1e-6, 10.0):
        job = Job(tiny_llama)
        chat = Chat(job.tokenizer)
        job.benign = [chat.encode_example(text, "Yes, of course.", 12) for text in BENIGN]
        changes = {"hinge_weight": weight, "hinge_tokens": 12, "steps": 20, "retain_weight": 0.0}
        losses = job.run(tmp_path / str(weight), benign_batch_size=6, **changes)
        assert losses[0].hinge == pytest.approx(0, abs=1e-5)
        lost.append(losses[-1].hinge)
    assert lost[1] < lost[0] / 2


def steps_of(benign: int, boundary: int, **changes: object) -> list[list[tuple[str, int]]]:
    """Deal examples, and tell of each benign one its kind and number."""
    kinds = [
        [Example((kind, number), (0,)) for number in range(count)]
        for kind, count in enumerate((3, benign, boundary))
    ]
    settings = dataclasses.replace(SETTINGS, **changes)
    return [
        [(" bB"[kind], number) for kind, number in (row.prompt_ids for row in rows)]
        for _, rows in deal_steps(*kinds, settings)
    ]


@pytest.mark.parametrize("fraction", [0.05, 0.35, 0.4, 1.0])
def test_boundary_rows_are_their_fraction_of_the_benign_ones(fraction: float) -> None:
    steps = steps_of(9, 7, boundary_fraction=fraction, steps=40, benign_batch_size=10)
    assert {len(rows) for rows in steps} == {10}
    drawn = [sum(kind == "B" for kind, _ in rows) for rows in steps]
    assert max(drawn) - min(drawn) <= 1
    assert sum(drawn) == round(400 * fraction)
    for kind, count in (("b", 9), ("B", 7)):
        dealt = [row for rows in steps for row in rows if row[0] == kind]
        rounds = [dealt[at : at + count] for at in range(0, len(dealt) // count * count, count)]
        assert all(len(set(rows)) == count for rows in rounds)


def test_without_a_fraction_boundary_rows_come_with_the_others() -> None:
    together = steps_of(9, 7, steps=8, benign_batch_size=4)
    assert len({row for rows in together[:4] for row in rows}) == 16


@pytest.mark.parametrize(("benign", "boundary"), [(0, 5), (5, 0)])
def test_a_fraction_of_one_kind_alone_is_refused(benign: int, boundary: int) -> None:
    with pytest.raises(TrainingError, match=r"^boundary_fraction: .* found only one kind"):
        steps_of(benign, boundary, boundary_fraction=0.4)


def absolute_gradient(model: nn.Module, indices: dict[str, np.ndarray], loss: Tensor) -> float:
    loss.backward()
    return sum(
        float(model.get_parameter(name).grad.flatten()[torch.from_numpy(at)].abs().sum())
        for name, at in indices.items()
    )


def test_each_step_takes_back_a_fraction_of_all_values_at_any_rate(
    tiny_llama: Path, tmp_path: Path
) -> None:
    # AdamW's first step doesn't depend on how large a value is: only what is taken back does.
    for rate in (1e-3, 1e-2):
        moved = {}
        for shrink in (0.0, 0.25):
            job = Job(tiny_llama)
            for values in job.values().values():
                values.fill_(0.5)
            changes = {"shrink": shrink, "learning_rate": rate, "warmup_steps": 0}
            job.run(tmp_path / f"{rate}-{shrink}", steps=1, **changes)
            moved[shrink] = job.values()
        for name, values in moved[0.0].items():
            expected = values - 0.25 * 0.5
            torch.testing.assert_close(moved[0.25][name], expected, rtol=1e-5, atol=1e-6)


def test_values_below_a_module_named_like_a_norm_shrink_too(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, groups = Job(tiny_llama), []
    module = sys.modules[train_to_refuse.__module__]

    def run(trainer, on_step):
        outer = nn.Module()
        outer.add_module("input_layernorm", trainer.model)
        names = trainer.get_decay_parameter_names(outer)
        groups.extend(name for name, _ in outer.named_parameters() if name not in names)
        return []

    monkeypatch.setattr(module, "run_trainer", run)
    job.run(tmp_path)
    assert groups == []


@pytest.mark.parametrize("size", [1, 4, 100])
def test_auto_divides_the_gain_by_the_plain_sum_of_absolute_gradients(
    size: int, tiny_llama: Path
) -> None:
    job = Job(tiny_llama)
    job.plain.requires_grad_(True)
    loss = plain_refusal_loss(job.plain, job.harmful, SETTINGS.token_decay)
    expected = 0.25 / absolute_gradient(job.plain, job.indices, loss)
    settings = dataclasses.replace(
        SETTINGS, step_gain=0.25, harmful_batch_size=size, benign_batch_size=1
    )
    rate = find_learning_rate(job.model, job.tokenizer, job.harmful, settings)
    assert rate == pytest.approx(expected, rel=6e-3)
    assert rate == float(f"{rate:.3g}")
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_a_step_at_the_rate_found_gains_what_was_asked(tiny_llama: Path, tmp_path: Path) -> None:
    losses = Job(tiny_llama).run(
        *(tmp_path,),
        **{"learning_rate": None, "step_gain": 0.05, "steps": 2, "warmup_steps": 0},
        harmful_batch_size=6,
    )
    assert losses[0].refusal - losses[1].refusal == pytest.approx(0.05, rel=0.2)


def test_a_rate_found_and_given_by_hand_is_the_same_training(
    tiny_llama: Path, tmp_path: Path
) -> None:
    found, given = Job(tiny_llama), Job(tiny_llama)
    losses = found.run(tmp_path / "found", learning_rate=None)
    settings = dataclasses.replace(SETTINGS, learning_rate=None)
    rate = find_learning_rate(given.model, given.tokenizer, given.harmful, settings)
    assert given.run(tmp_path / "given", learning_rate=rate) == losses
    assert same(found.values(), given.values())


def test_an_interrupted_run_with_all_options_ends_bitwise_like_a_straight_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    options = {"learning_rate": None, "hinge_weight": 1.0, "hinge_tokens": 6, "answer_tokens": 2}
    straight, resumed = Job(tiny_llama), Job(tiny_llama)
    losses = straight.run(tmp_path / "straight", **options)
    with pytest.raises(Interrupted):
        Job(tiny_llama).run(tmp_path / "broken", 3, **options)
    assert resumed.run(tmp_path / "broken", **options) == losses
    assert same(resumed.values(), straight.values())


def test_a_rate_is_found_for_a_lora_too(tiny_llama: Path) -> None:
    job = Job(tiny_llama)
    config = LoraConfig(r=2, target_modules=["up_proj", "o_proj"], init_lora_weights=True)
    lora = get_peft_model(job.plain, config)
    settings = dataclasses.replace(SETTINGS, step_gain=0.01)
    rate = find_learning_rate(lora, job.tokenizer, job.harmful, settings)
    with torch.no_grad():
        before = plain_refusal_loss(lora, job.harmful, SETTINGS.token_decay).item()
    plain_refusal_loss(lora, job.harmful, SETTINGS.token_decay).backward()
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter -= rate * parameter.grad.sign()
        after = plain_refusal_loss(lora, job.harmful, SETTINGS.token_decay).item()
    assert before - after == pytest.approx(0.01, rel=0.2)


def test_no_rate_is_found_where_the_loss_is_not_finite(tiny_llama: Path) -> None:
    job = Job(tiny_llama)
    with torch.no_grad():
        job.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"^--lr auto: expected a finite gradient .* nan; give"):
        find_learning_rate(job.model, job.tokenizer, job.harmful, SETTINGS)


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
