"""Perturbed entries, held to a dense mask over the whole tensor, and restored bit for bit."""

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safeweights_peft.patch.groups import Group
from safeweights_peft.study.perturb import noise, perturb, zeros
from tests.tuner.patches import load_base, logits, random_content, same_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest, tiny_llama: Path) -> nn.Module:
    return load_base(tiny_llama, dtype=request.param)


def indices_of(
    model: nn.Module, density: float = 0.1, group: Group | None = None
) -> dict[str, np.ndarray]:
    indices, _ = random_content(model, density=density, group=group)
    return indices


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies all weights as integers: -0 is not 0, and a NaN is itself."""
    return {
        name: each.detach().clone().view(torch.uint8) for name, each in model.named_parameters()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def masked(
    model: nn.Module, indices: dict[str, np.ndarray]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Gives each parameter with a dense mask of its chosen entries."""
    for name, parameter in model.named_parameters():
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[torch.from_numpy(indices.get(name, np.empty(0)).astype(np.int64))] = True
        yield name, parameter.detach().clone(), mask.view_as(parameter)


@pytest.mark.parametrize("group", [None, "row", "column"])
def test_noise_is_that_of_a_dense_mask_rounded_once(model: nn.Module, group: Group | None) -> None:
    indices = indices_of(model, group=group)
    expected = {}
    for name, before, mask in masked(model, indices):
        generator = np.random.default_rng([7, 2, zlib.crc32(f"noise at {name}".encode())])
        drawn = torch.zeros(before.shape)
        drawn[mask] = torch.from_numpy(generator.standard_normal(int(mask.sum()), np.float32))
        moved = before.float() + 0.38 * before.float().std() * drawn
        expected[name] = torch.where(mask, moved.to(before.dtype), before)
    with perturb(model, indices, noise(0.38, 7, 2))():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_zeros_are_those_of_a_dense_mask(model: nn.Module) -> None:
    indices = indices_of(model)
    expected = {name: before * ~mask for name, before, mask in masked(model, indices)}
    with perturb(model, indices, zeros)():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("change", [noise(0.38, 0), zeros], ids=["noise", "zero"])
def test_entries_are_restored_bit_for_bit(model: nn.Module, change) -> None:
    parameter = model.get_parameter("model.norm.weight")
    parameter.data[:3] = torch.tensor([-0.0, torch.inf, 1e-7])
    before = bits(model)
    with perturb(model, indices_of(model), change)():
        assert not same(bits(model), before)
    assert same(bits(model), before)


def test_entries_are_restored_after_an_exception(model: nn.Module) -> None:
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), perturb(model, indices_of(model), zeros)():
        raise KeyboardInterrupt
    assert same(bits(model), before)


def test_what_is_switched_on_again_is_the_same_perturbation(model: nn.Module) -> None:
    switch_on, before = perturb(model, indices_of(model), noise(0.38, 0)), bits(model)
    with switch_on():
        first = bits(model)
    assert same(bits(model), before)
    with switch_on():
        assert same(bits(model), first)


def test_entries_are_as_they_were_where_a_change_fails(tiny_llama: Path) -> None:
    model = load_base(tiny_llama)
    before = bits(model)

    def fail_at_the_norm(name: str, parameter: nn.Parameter, entries: Tensor) -> Tensor:
        if name == "model.norm.weight":
            raise MemoryError
        return zeros(name, parameter, entries)

    with pytest.raises(MemoryError):
        perturb(model, indices_of(model), fail_at_the_norm)
    assert same(bits(model), before)


def test_tied_weights_change_together_and_are_restored(tiny_tied_llama: Path) -> None:
    model = load_base(tiny_tied_llama)
    before, head = bits(model), model.get_output_embeddings().weight
    assert head is model.get_parameter(EMBEDDING)
    with perturb(model, {EMBEDDING: np.arange(100)}, zeros)():
        assert not head.flatten()[:100].any()
    assert same(bits(model), before)


def test_a_restored_model_says_what_it_said(tiny_llama: Path) -> None:
    model = load_base(tiny_llama)
    before = logits(model)
    with perturb(model, indices_of(model), noise(0.38, 0))():
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("factor", [0.1, 0.38])
def test_noise_has_the_asked_size_in_sigmas_of_the_tensor(tiny_llama: Path, factor: float) -> None:
    model = load_base(tiny_llama)
    before = model.get_parameter(EMBEDDING).detach().clone()
    with perturb(model, {EMBEDDING: np.arange(before.numel())}, noise(factor, 0))():
        added = model.get_parameter(EMBEDDING).detach() - before
    assert added.std() == pytest.approx(factor * before.std().item(), rel=0.05)
    assert added.mean() == pytest.approx(0, abs=0.05 * factor * before.std().item())


def test_noise_is_fixed_by_its_seeds(tiny_llama: Path) -> None:
    models = [load_base(tiny_llama) for _ in range(4)]
    seeds = [(3, 1), (3, 1), (3, 2), (4, 1)]
    indices = indices_of(models[0])
    contexts = [
        perturb(each, indices, noise(0.38, *seed))()
        for each, seed in zip(models, seeds, strict=True)
    ]
    for context in contexts:
        context.__enter__()
    same_as_first = [same_weights(models[0], each) for each in models]
    for context in contexts:
        context.__exit__(None, None, None)
    assert same_as_first == [True, True, False, False]
