"""Frozen entries keep their bits under any optimizer, and the others train as if masked densely."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import AutoModelForCausalLM, PreTrainedModel

from safeweights_peft.errors import UnsupportedFeatureError
from safeweights_peft.freeze import FreezeGuard, FrozenEntries

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def adamw_8bit(parameters: list[nn.Parameter]) -> Optimizer:
    library = pytest.importorskip("bitsandbytes", reason="8-bit optimizers need bitsandbytes")
    return library.optim.AdamW8bit(parameters, lr=0.01, weight_decay=0.1, min_8bit_size=64)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-8bit": adamw_8bit,
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, lr=0.01, weight_decay=0.1),
    "adafactor-transformers": lambda p: transformers.Adafactor(p, weight_decay=0.1),
}

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Job:
    """A tiny model, a tenth of every parameter to freeze, and some batches."""

    def __init__(self, base: Path, dtype: torch.dtype | str = "auto") -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        generator = torch.Generator().manual_seed(1)
        self.indices = {
            name: torch.randperm(tensor.numel(), generator=generator)[: -(-tensor.numel() // 10)]
            .sort()
            .values.int()
            for name, tensor in self.model.named_parameters()
        }
        self.batches = torch.randint(250, (40, 2, 12), generator=generator)
        self.before = self.copy()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    def entries(self) -> list[FrozenEntries]:
        return [FrozenEntries(k, tensor, self.indices[k]) for k, tensor in self.parameters.items()]

    def mask(self, name: str) -> Tensor:
        mask = torch.zeros_like(self.before[name], dtype=torch.bool)
        mask.view(-1)[self.indices[name]] = True
        return mask

    def backward(self, rows: Tensor) -> None:
        self.model(input_ids=rows, labels=rows).loss.backward()

    def train(self, make: MakeOptimizer, steps: int = 20) -> Optimizer:
        optimizer = make(list(self.model.parameters()))
        for rows in self.batches[:steps]:
            self.backward(rows)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    def kept(self) -> bool:
        """Tells whether every frozen entry has the bits that it had."""
        return all(
            same_bits(tensor[self.mask(name)], self.before[name][self.mask(name)])
            for name, tensor in self.copy().items()
        )

    def trained(self) -> bool:
        """Tells whether in every parameter most of the other entries have moved."""
        return all(
            (tensor != self.before[name])[~self.mask(name)].float().mean() > 0.5
            for name, tensor in self.copy().items()
        )


@contextmanager
def frozen(job: Job) -> Iterator[None]:
    guard = FreezeGuard(job.entries())
    guard.attach()
    try:
        yield
    finally:
        guard.detach()


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


def train_densely(job: Job, make: MakeOptimizer, steps: int = 20) -> None:
    """Does the same with dense masks, in the slow, obvious way."""
    optimizer = make(list(job.model.parameters()))
    for rows in job.batches[:steps]:
        job.backward(rows)
        for name, tensor in job.parameters.items():
            tensor.grad = torch.where(job.mask(name), 0, tensor.grad)
        optimizer.step()
        for name, tensor in job.parameters.items():
            tensor.data.copy_(torch.where(job.mask(name), job.before[name], tensor.data))
        optimizer.zero_grad()


@every_optimizer
def test_an_optimizer_moves_no_frozen_entry_and_most_others(
    make: MakeOptimizer, tiny_llama: Path
) -> None:
    job = Job(tiny_llama)
    with frozen(job):
        job.train(make)
        assert job.kept()
    assert job.kept()
    assert job.trained()


@every_optimizer
def test_training_is_bitwise_that_of_dense_masks(make: MakeOptimizer, tiny_llama: Path) -> None:
    job, twin = Job(tiny_llama), Job(tiny_llama)
    with frozen(job):
        job.train(make)
    train_densely(twin, make)
    assert all(same_bits(job.copy()[name], tensor) for name, tensor in twin.copy().items())


def test_a_bfloat16_model_keeps_its_frozen_entries(tiny_llama_bf16: Path) -> None:
    job = Job(tiny_llama_bf16)
    with frozen(job):
        job.train(OPTIMIZERS["sgd"])
    assert job.parameters["model.norm.weight"].dtype is torch.bfloat16
    assert job.kept()


def test_tied_embeddings_keep_their_frozen_entries(tiny_tied_llama: Path) -> None:
    job = Job(tiny_tied_llama, torch.float32)
    with frozen(job):
        job.train(OPTIMIZERS["adamw"])
    assert "lm_head.weight" not in job.parameters
    assert job.kept()
    assert job.trained()


def test_biases_keep_their_frozen_entries() -> None:
    layer = nn.Linear(6, 5)
    before = layer.bias.detach().clone()
    guard = FreezeGuard([FrozenEntries("bias", layer.bias, torch.tensor([0, 4]))])
    guard.attach()
    optimizer = OPTIMIZERS["adamw"](list(layer.parameters()))
    layer(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    guard.detach()
    assert (layer.bias == before).tolist() == [True, False, False, False, True]


def test_momentum_from_before_moves_no_frozen_entry(tiny_llama: Path) -> None:
    job = Job(tiny_llama)
    optimizer = job.train(OPTIMIZERS["sgd"], steps=3)
    job.before = job.copy()
    with frozen(job):
        job.train(lambda _: optimizer)
        assert job.kept()


def test_accumulated_gradients_of_frozen_entries_are_zero(tiny_llama: Path) -> None:
    job = Job(tiny_llama)
    with frozen(job):
        for rows in job.batches[:3]:
            job.backward(rows)
    for name, tensor in job.parameters.items():
        assert (tensor.grad[job.mask(name)] == 0).all()
        assert (tensor.grad[~job.mask(name)] != 0).any()


def test_accumulated_gradients_of_other_entries_are_as_ever(tiny_llama: Path) -> None:
    job, twin = Job(tiny_llama), Job(tiny_llama)
    with frozen(job):
        for rows in job.batches[:3]:
            job.backward(rows)
    for rows in job.batches[:3]:
        twin.backward(rows)
    for name, tensor in job.parameters.items():
        mask = job.mask(name)
        assert same_bits(tensor.grad[~mask], twin.parameters[name].grad[~mask])


def test_the_norm_for_clipping_counts_no_frozen_entry(tiny_llama: Path) -> None:
    job, twin = Job(tiny_llama), Job(tiny_llama)
    with frozen(job):
        job.backward(job.batches[0])
        found = nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
    twin.backward(twin.batches[0])
    others = [tensor.grad[~twin.mask(name)] for name, tensor in twin.parameters.items()]
    assert found.item() == pytest.approx(torch.cat(others).norm().item(), rel=1e-5)


def test_a_gradient_that_is_not_finite_is_cleared_as_well() -> None:
    weight = nn.Parameter(torch.ones(3))
    guard = FreezeGuard([FrozenEntries("weight", weight, torch.tensor([1]))])
    guard.attach()
    (weight * torch.tensor([1.0, torch.nan, torch.inf])).sum().backward()
    guard.detach()
    assert weight.grad.tolist() == [1.0, 0.0, torch.inf]


def test_frozen_entries_are_written_back_where_an_optimizer_steps_during_the_backward_pass(
    tiny_llama: Path,
) -> None:
    job = Job(tiny_llama)
    for weight in job.model.parameters():
        optimizer = OPTIMIZERS["adamw"]([weight])

        def step(parameter: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(step)
    with frozen(job):
        for rows in job.batches[:3]:
            job.backward(rows)
        assert job.kept()
        assert job.trained()


def test_a_step_of_an_optimizer_of_other_parameters_writes_nothing_back() -> None:
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    guard = FreezeGuard([FrozenEntries("weight", weight, torch.tensor([1]))])
    guard.attach()
    weight.data.fill_(2.0)
    SGD([other], lr=0.1).step()
    assert weight.tolist() == [2.0, 2.0, 2.0]
    guard.detach()
    assert weight.tolist() == [2.0, 1.0, 2.0]


def test_a_parameter_that_is_not_contiguous_keeps_the_right_entries() -> None:
    weight = nn.Parameter(torch.arange(6.0).view(3, 2).t())
    before = weight.detach().clone()
    guard = FreezeGuard([FrozenEntries("weight", weight, torch.tensor([1, 5], dtype=torch.int32))])
    guard.attach()
    optimizer = SGD([weight], lr=0.1, weight_decay=0.1)
    (weight * torch.ones(2, 3)).sum().backward()
    optimizer.step()
    guard.detach()
    assert not weight.is_contiguous()
    assert weight.grad.tolist() == [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    assert (weight == before).tolist() == [[False, True, False], [False, False, True]]


def test_a_model_that_is_cast_on_the_way_keeps_its_entries_in_the_new_dtype(
    tiny_llama: Path,
) -> None:
    job = Job(tiny_llama)
    with frozen(job):
        job.model.to(torch.bfloat16)
        job.train(OPTIMIZERS["adamw"], steps=3)
    job.before = {name: tensor.bfloat16() for name, tensor in job.before.items()}
    assert job.kept()


def test_a_sparse_gradient_is_refused_by_name() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    guard = FreezeGuard([FrozenEntries("words.weight", embedding.weight, torch.tensor([1]))])
    guard.attach()
    with pytest.raises(
        UnsupportedFeatureError, match=r"words\.weight: .* found a sparse one; make"
    ):
        embedding(torch.tensor([1])).sum().backward()
    guard.detach()


def test_a_parameter_that_needs_no_gradient_is_guarded_once_it_trains(tiny_llama: Path) -> None:
    job = Job(tiny_llama)
    job.model.requires_grad_(False)
    with frozen(job):
        job.model.requires_grad_(True)
        job.train(OPTIMIZERS["adamw"], steps=3)
        assert job.kept()


def test_nothing_of_a_detached_guard_is_left_behind() -> None:
    weight, hooks = nn.Parameter(torch.ones(3)), len(_global_optimizer_post_hooks)
    guard = FreezeGuard([FrozenEntries("weight", weight, torch.tensor([1]))])
    guard.attach()
    assert len(_global_optimizer_post_hooks) == hooks + 1
    guard.detach()
    assert len(_global_optimizer_post_hooks) == hooks
    assert not weight._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("dtype", "index_dtype", "expected"),
    [
        (torch.bfloat16, torch.int32, 6),
        (torch.float32, torch.int32, 8),
        (torch.float32, torch.int64, 12),
    ],
)
def test_a_guard_holds_at_most_twelve_bytes_per_entry(
    dtype: torch.dtype, index_dtype: torch.dtype, expected: int
) -> None:
    weight = nn.Parameter(torch.ones(100, 100, dtype=dtype))
    indices = torch.arange(0, 10_000, 10, dtype=index_dtype)
    entries = FrozenEntries("weight", weight, indices)
    guard = FreezeGuard([entries])
    guard.attach()
    weight.sum().backward()
    SGD([weight], lr=0.1).step()
    gc.collect()
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in vars(entries).values()
        if isinstance(tensor, Tensor) and tensor is not weight
    }
    guard.detach()
    assert sum(held.values()) == expected * len(indices)
