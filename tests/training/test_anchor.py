"""The anchor in any loop: what it adds to the task's gradient, when, and what it says of drift."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from transformers import PreTrainedModel

from safeweights_peft import Anchor, SafetyPreservingCallback, TrainingError, preserve
from safeweights_peft.data import Example
from safeweights_peft.errors import ModelError
from safeweights_peft.training.anchor import make_anchor
from tests.training.maps import BATCHES, hooks, kept, load, make_map, make_sft_trainer, same
from tests.training.test_preserve_trainer import make_trainer
from tests.training.twins import adapted
from tests.two_processes import run_in_two_processes

TOKENIZER: Any = SimpleNamespace(pad_token_id=256)
Step = Callable[[nn.Module, Optimizer], None]


def examples(count: int, seed: int) -> list[Example]:
    """Random rows of several lengths, of which all prompts begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(250, (length,), generator=generator).tolist())

    return [Example((7, 8, *draw(3 + row % 3)), draw(4 + row % 2)) for row in range(count)]


def anchor_of(model: nn.Module, **options: Any) -> Anchor:
    defaults = {"every": 1, "batch_rows": 4, "weight": 3.0, "tokens": 4}
    harmful, benign = examples(5, 0), examples(7, 1)
    return make_anchor(model, TOKENIZER, harmful, benign, **defaults | options)


def start_logits(base: Path, row: Example) -> Tensor:
    """The start model's logits of one answer, with nothing shared or padded."""
    return answer_of(load(base).eval(), row).detach()


def answer_of(model: nn.Module, row: Example) -> Tensor:
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    return model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]


def divergence(model: nn.Module, base: Path, anchor: Anchor, step: int) -> Tensor:
    """The slow twin: KL over whole rows of logits, with all but the 64 likeliest added up."""
    terms = []
    for place in anchor.deal(step):
        row = anchor.rows[place]
        first, second = (
            F.softmax(logits.double(), -1)
            for logits in (start_logits(base, row), answer_of(model, row))
        )
        kept = first.topk(64, -1).indices
        for start, now, ids in zip(first, second, kept, strict=True):
            p, q = torch.cat([start[ids], 1 - start[ids].sum()[None]]), now[ids]
            q = torch.cat([q, 1 - q.sum()[None]])
            terms.append((p * (p / q).log()).sum())
    return torch.stack(terms).mean().float()


def task_loss(model: nn.Module, step: int) -> Tensor:
    rows = BATCHES[step]
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def clip(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def train(model: nn.Module, optimizer: Optimizer, steps: range = range(4)) -> None:
    for step in steps:
        task_loss(model, step).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_slowly(
    model: nn.Module, base: Path, anchor: Anchor, steps: int = 4, rate: float = 0.5
) -> None:
    """The twin of a training by SGD."""
    for step in range(steps):
        task_loss(model, step).backward()
        clip(model)
        gradients = [entry.grad.clone() for entry in trained(model)]
        model.zero_grad()
        if (step + 1) % anchor.every == 0:
            (anchor.every * anchor.weight * divergence(model, base, anchor, step + 1)).backward()
        with torch.no_grad():
            for entry, gradient in zip(trained(model), gradients, strict=True):
                pull = 0 if entry.grad is None else entry.grad
                entry -= rate * (gradient + pull)
        model.zero_grad()


def close(left: nn.Module, right: nn.Module) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=2e-5)
        for a, b in zip(left.parameters(), right.parameters(), strict=True)
    )


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("build", [load, adapted])
def test_the_gradient_is_the_clipped_tasks_and_the_weighted_kl_to_the_start(
    build: Callable[[Path], nn.Module], every: int, tiny_llama: Path
) -> None:
    model, twin = build(tiny_llama), build(tiny_llama)
    if build is adapted:  # a LoRA that does nothing at the start
        for one in (model, twin):
            for name, entry in one.named_parameters():
                if "lora_B" in name:
                    entry.data.zero_()
    anchor = anchor_of(model, every=every)
    with preserve(model, anchor=anchor):
        train(model, SGD(trained(model), lr=0.5))
    train_slowly(twin, tiny_llama, anchor)
    assert close(model, twin)
    plain = build(tiny_llama)
    train(plain, SGD(trained(plain), lr=0.5))
    assert not close(plain, twin)


def test_the_kept_targets_are_the_start_models_and_no_later_one(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    anchor = anchor_of(model)
    rows = range(len(anchor.rows))
    assert anchor.compute_loss(model, rows).item() == pytest.approx(0, abs=1e-6)
    train(model, AdamW(model.parameters(), lr=0.01))
    assert anchor.compute_loss(model, rows).item() > 0.01


def test_it_holds_the_answers(tiny_llama: Path) -> None:
    ends = []
    for weight in (0.0, 3.0):
        model = load(tiny_llama)
        anchor = anchor_of(model, weight=weight)
        with preserve(model, anchor=anchor):
            train(model, AdamW(model.parameters(), lr=0.01), range(12))
        ends.append(anchor.compute_loss(model, range(len(anchor.rows))).item())
    assert ends[1] < 0.5 * ends[0]


def test_all_rows_of_a_kind_come_before_any_comes_again(tiny_llama: Path) -> None:
    anchor = anchor_of(load(tiny_llama), every=3)
    assert anchor.refusals == 5
    dealt = [anchor.deal(3 * turn) for turn in range(1, 11)]
    for kind, places in ((slice(0, 2), range(5)), (slice(2, 4), range(5, 10))):
        in_order = [place for rows in dealt for place in rows[kind]]
        for start in range(0, 20, 5):
            assert sorted(in_order[start : start + 5]) == list(places)
    assert dealt != [anchor_of(load(tiny_llama), every=3, seed=1).deal(3 * n) for n in range(1, 11)]


def test_an_entry_of_the_map_gets_no_gradient_from_the_anchor(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    optimizer = AdamW(model.parameters(), lr=0.01)
    with preserve(model, safety_map), preserve(model, anchor=anchor_of(model)):
        train(model, optimizer)
        assert kept(model, tiny_llama, safety_map)
    for name, indices in safety_map.indices.items():
        momentum = optimizer.state[model.get_parameter(name)]["exp_avg"].flatten()
        assert not momentum[torch.from_numpy(indices)].any(), name


def by_closure(model: nn.Module, optimizer: Optimizer) -> None:
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = task_loss(model, step)
            loss.backward()
            clip(model)
            return loss

        optimizer.step(closure)


def by_two_optimizers(model: nn.Module, optimizer: Optimizer) -> None:
    # The second steps by what was computed before the first did.
    first, second = trained(model)[::2], trained(model)[1::2]
    optimizers = [SGD(first, lr=0.5), SGD(second, lr=0.5)]
    for step in range(4):
        task_loss(model, step).backward()
        clip(model)
        for one in optimizers:
            one.step()
        model.zero_grad()


def by_accelerate(model: nn.Module, optimizer: Optimizer) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(4):
        for half in BATCHES[step].split(1):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=half, labels=half).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()


def compiled(model: nn.Module, optimizer: Optimizer) -> None:
    train(torch.compile(model, backend="eager"), optimizer)


class Scaler(torch.amp.GradScaler):
    """A scaler as of a GPU, which a CPU has as well."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=2.0**7)


def by_scaler(model: nn.Module, optimizer: Optimizer) -> None:
    scaler = Scaler()
    for step in range(4):
        scaler.scale(task_loss(model, step)).backward()
        scaler.unscale_(optimizer)
        clip(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "loop", [by_closure, by_two_optimizers, by_accelerate, compiled, by_scaler]
)
def test_any_loop_gets_the_same_gradient(loop: Step, tiny_llama: Path) -> None:
    model, twin = load(tiny_llama), load(tiny_llama)
    anchor = anchor_of(model, every=2)
    with preserve(model, anchor=anchor):
        loop(model, SGD(model.parameters(), lr=0.5))
    train_slowly(twin, tiny_llama, anchor)
    assert close(model, twin)
    assert anchor.steps == 4


def test_a_fused_optimizer_under_a_scaler_unscales_the_anchors_gradient_too(
    tiny_llama: Path,
) -> None:
    model, twin = load(tiny_llama), load(tiny_llama)
    anchor = anchor_of(model)
    optimizer, scaler = SGD(model.parameters(), lr=0.5, fused=True), Scaler()
    with preserve(model, anchor=anchor):
        scaler.scale(task_loss(model, 0)).backward()
        scaler.step(optimizer)  # not unscaled before
    plain = SGD(twin.parameters(), lr=0.5)
    with preserve(twin, anchor=anchor_of(twin)):
        task_loss(twin, 0).backward()
        plain.step()
    assert close(model, twin)


def test_an_optimizer_that_needs_other_derivatives_works(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2)
    with preserve(model, anchor=anchor_of(model)):
        by_closure(model, optimizer)
    assert all(torch.isfinite(entry).all() for entry in model.parameters())


def test_the_models_mode_and_all_random_numbers_are_left_alone(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, lora_dropout=0.5)
    model.train()
    modes = [module.training for module in model.modules()]
    anchor = anchor_of(model)
    before = torch.get_rng_state()
    with preserve(model, anchor=anchor):
        optimizer = AdamW(trained(model), lr=0.01)
        for entry in trained(model):
            entry.grad = torch.ones_like(entry)
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes


def test_the_anchor_runs_under_the_autocast_of_the_loop(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dtypes = load(tiny_llama), []
    anchor, real = anchor_of(model), Anchor.compute_loss

    def compute_loss(self: Anchor, model: nn.Module, rows: Any) -> Tensor:
        dtypes.append(model.lm_head(torch.ones(1, 32)).dtype)
        return real(self, model, rows)

    monkeypatch.setattr(Anchor, "compute_loss", compute_loss)
    optimizer = SGD(model.parameters(), lr=0.5)
    with preserve(model, anchor=anchor):
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = task_loss(model, 0)
            loss.backward()
            optimizer.step()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_an_overflow_of_the_anchor_leaves_the_tasks_step(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = load(tiny_llama), load(tiny_llama)
    anchor, real = anchor_of(model), Anchor.compute_loss
    monkeypatch.setattr(Anchor, "compute_loss", lambda *these: real(*these) * math.inf)
    with preserve(model, anchor=anchor):
        train(model, SGD(model.parameters(), lr=0.5))
    train(twin, SGD(twin.parameters(), lr=0.5))
    assert same(model.state_dict(), twin.state_dict())


def test_another_models_optimizer_is_left_alone(tiny_llama: Path) -> None:
    model, other = load(tiny_llama), load(tiny_llama)
    anchor = anchor_of(model)
    with preserve(model, anchor=anchor):
        train(other, SGD(other.parameters(), lr=0.5))
    assert (anchor.steps, anchor.drift) == (0, [])


def test_all_hooks_are_gone_at_the_end(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    before = hooks(model)
    with preserve(model, anchor=anchor_of(model)):
        assert hooks(model) > before
    assert hooks(model) == before
    with pytest.raises(ZeroDivisionError), preserve(model, anchor=anchor_of(model)):
        _ = 1 / 0
    assert hooks(model) == before


def test_a_model_that_refuses_nothing_has_nothing_to_anchor(tiny_llama: Path) -> None:
    with pytest.raises(TrainingError, match=r"found one that refuses none.*--no-anchor"):
        make_anchor(load(tiny_llama), TOKENIZER, [], examples(3, 0))


def test_a_model_that_does_not_train_and_nothing_to_keep_are_refused(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    with pytest.raises(ModelError, match="expected a map, a patch or an anchor"), preserve(model):
        pass
    anchor = anchor_of(model)
    model.requires_grad_(False)
    with (
        pytest.raises(ModelError, match="expected parameters that require gradients"),
        preserve(model, anchor=anchor),
    ):
        pass


def drifted(model: nn.Module, base: Path, rows: list[Example]) -> float:
    firsts = [(start_logits(base, row)[0], answer_of(model, row)[0]) for row in rows]
    return sum(int(a.argmax() != b.argmax()) for a, b in firsts) / len(rows)


def test_the_drift_is_the_fraction_of_answers_with_another_first_token(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    anchor = anchor_of(model, weight=0.0, check_every=2)
    seen = []
    with preserve(model, anchor=anchor):
        optimizer = AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            train(model, optimizer, range(step, step + 1))
            rows = list(anchor.rows)
            seen.append(
                (step + 1, drifted(model, tiny_llama, rows), drifted(model, tiny_llama, rows[:5]))
            )
    found = [(drift.step, drift.drifted, drift.refusals) for drift in anchor.drift]
    assert found == [pytest.approx(seen[1]), pytest.approx(seen[2])]
    assert found[-1][1] > 0


def test_a_training_that_drifts_too_far_is_stopped(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    anchor = anchor_of(model, weight=0.0, check_every=2, stop_above=0.0)
    with (
        pytest.raises(TrainingError, match=r"step 2: expected at most 0 of .*; raise --anchor-w"),
        preserve(model, anchor=anchor),
    ):
        train(model, AdamW(model.parameters(), lr=0.03), range(8))
    assert anchor.steps == 2


def test_a_resumed_loop_is_held_by_the_same_rows(tiny_llama: Path) -> None:
    straight, resumed = load(tiny_llama), load(tiny_llama)
    with preserve(straight, anchor=anchor_of(straight)):
        train(straight, SGD(straight.parameters(), lr=0.5), range(4))
    anchor = anchor_of(resumed)
    with preserve(resumed, anchor=anchor):
        train(resumed, SGD(resumed.parameters(), lr=0.5), range(2))
    again = anchor_of(load(tiny_llama))
    again.steps = 2
    with preserve(resumed, anchor=again):
        train(resumed, SGD(resumed.parameters(), lr=0.5), range(2, 4))
    assert same(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize("has_map", [True, False])
def test_a_resumed_trainer_ends_bitwise_like_a_straight_one(
    has_map: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    ends, logs = [], []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = load(tiny_llama)
        anchor = anchor_of(model, every=2, check_every=2)
        callback = SafetyPreservingCallback(make_map(tiny_llama) if has_map else None, anchor)
        trainer = make_trainer(model, callback, tmp_path)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(model.state_dict())
        logs.append([e for e in trainer.state.log_history if "anchor_drift" in e])
        assert [drift.step for drift in anchor.drift] == [2, 4, 6]
    assert same(*ends)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 3
    free = load(tiny_llama)
    make_trainer(free, SafetyPreservingCallback(make_map(tiny_llama)), tmp_path / "free").train()
    assert not same(free.state_dict(), ends[0])


def test_a_trainer_adds_the_gradient_after_it_has_accumulated_and_clipped(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = load(tiny_llama), load(tiny_llama)
    row, anchor = BATCHES[0][0], anchor_of(model, every=2)
    # All rows alike, as a trainer shuffles them.
    trainer = make_trainer(
        *(model, SafetyPreservingCallback(anchor=anchor), tmp_path),
        **{"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.1, "max_steps": 4},
        **{"learning_rate": 0.5, "weight_decay": 0.0},
    )
    trainer.train_dataset = [{"input_ids": row, "labels": row}] * 16
    trainer.train()
    monkeypatch.setitem(globals(), "BATCHES", row.repeat(4, 1, 1))
    train_slowly(twin, tiny_llama, anchor)
    assert close(model, twin)


@pytest.mark.slow
def test_a_trl_trainer_is_held(tiny_llama: Path, tmp_path: Path) -> None:
    model = load(tiny_llama)
    anchor = anchor_of(model)
    make_sft_trainer(model, tmp_path, [SafetyPreservingCallback(anchor=anchor)]).train()
    assert anchor.steps == 3
    assert [drift.step for drift in anchor.drift] == [3]


def work(rank: int, base: Path, folder: Path) -> None:
    model: PreTrainedModel = load(base)
    wrapped = DistributedDataParallel(model)
    anchor = anchor_of(model)
    optimizer = SGD(wrapped.parameters(), lr=0.5)
    with preserve(wrapped, anchor=anchor):
        for step in range(4):
            half = BATCHES[step][rank : rank + 1]
            wrapped(input_ids=half, labels=half).loss.backward()
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
    torch.save(model.state_dict(), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_held_alike_and_as_one_is(tiny_llama: Path, tmp_path: Path) -> None:
    run_in_two_processes(work, tmp_path, tiny_llama, tmp_path)
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (0, 1))
    assert same(first, second)
    model, twin = load(tiny_llama), load(tiny_llama)
    model.load_state_dict(first)
    train_slowly(twin, tiny_llama, anchor_of(twin))
    assert close(model, twin)
