"""Soft tokens: an answer that was chosen, as something that can be differentiated.

What is read is the answer itself, one hard token after the other; what is differentiated are soft
tokens, the probabilities of a Gumbel-softmax (arXiv 1611.01144) whose noise is drawn given that it
led to that answer (arXiv 2010.04838), so that both speak of the same text.
"""

from __future__ import annotations

import torch


def straight_through(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    derivative: torch.Tensor,
    temperature: float,
    samples: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Carry a derivative with respect to hard tokens on to the logits that led to them."""
    total = logits.new_zeros(())
    for _ in range(samples):
        noise = gumbel_noise(logits.detach(), token_ids, generator)
        soft_tokens = torch.softmax((logits + noise) / temperature, -1)
        total = total + (derivative * soft_tokens).sum()
    return total / samples


def gumbel_noise(
    logits: torch.Tensor, token_ids: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Draw Gumbel noise under which given tokens have the largest of noise plus logit.

    Source: arXiv 2010.04838, equation 6: the largest is a Gumbel variable around the logarithm of
    the sum of exponentials, the others are Gumbel variables cut off there.
    """
    exponential = torch.empty(logits.shape).exponential_(generator=generator).to(logits.device)
    logs = exponential.clamp_min(torch.finfo(torch.float32).tiny).log()
    chosen = token_ids.unsqueeze(-1)
    largest = logits.logsumexp(-1, keepdim=True) - logs.gather(-1, chosen)
    others = -torch.logaddexp(logs - logits, -largest)
    return others.scatter(-1, chosen, largest) - logits
