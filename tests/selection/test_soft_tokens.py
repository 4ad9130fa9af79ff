"""Soft tokens: the noise leads to the answer that was given, and is Gumbel noise otherwise."""

import pytest
import torch

from safeweights_peft.selection.soft_tokens import gumbel_noise, straight_through


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_with_the_noise_the_chosen_tokens_have_the_largest_logits() -> None:
    logits = 5 * torch.randn(500, 11, generator=seeded())
    chosen = torch.randint(11, (500,), generator=seeded(1))
    noise = gumbel_noise(logits, chosen, seeded(2))
    assert torch.equal((logits + noise).argmax(-1), chosen)


def test_over_choices_made_by_their_own_probability_the_noise_is_plain_gumbel_noise() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0]).expand(100_000, 4)
    chosen = torch.multinomial(logits[0].softmax(0), 100_000, replacement=True, generator=seeded())
    noise = gumbel_noise(logits, chosen, seeded(1))
    euler_gamma, variance = 0.5772, torch.pi**2 / 6
    torch.testing.assert_close(noise.mean(0), torch.full((4,), euler_gamma), atol=0.02, rtol=0)
    torch.testing.assert_close(noise.var(0), torch.full((4,), variance), atol=0.04, rtol=0)
    covariance = torch.cov(noise.T) - torch.diag(noise.var(0))
    assert covariance.abs().max() < 0.03


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_give_finite_noise(scale: float) -> None:
    logits = scale * torch.tensor([[1.0, -1.0, 0.0]] * 50)
    for token in range(3):
        noise = gumbel_noise(logits, torch.full((50,), token), seeded())
        assert noise.isfinite().all()


def test_the_gradient_is_that_of_the_softmax_written_out() -> None:
    logits = torch.randn(3, 7, generator=seeded(), requires_grad=True)
    chosen, derivative = torch.tensor([2, 0, 6]), torch.randn(3, 7, generator=seeded(1))
    straight_through(logits, chosen, derivative, 0.5, 2, seeded(2)).backward()
    generator, expected = seeded(2), torch.zeros(3, 7)
    for _ in range(2):
        noise = gumbel_noise(logits.detach(), chosen, generator)
        for t in range(3):
            p = ((logits.detach()[t] + noise[t]) / 0.5).softmax(0)
            jacobian = (torch.diag(p) - torch.outer(p, p)) / 0.5
            expected[t] += jacobian @ derivative[t] / 2
    torch.testing.assert_close(logits.grad, expected)
