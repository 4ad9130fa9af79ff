"""The safety S of a model's answers, as something to differentiate: by refusals or by a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from safeweights_peft.data import IGNORED, Example, collate
from safeweights_peft.errors import SelectionError
from safeweights_peft.modeling.answers import answer_logits, find_layout
from safeweights_peft.selection.soft_judges import SoftJudge


class SafetyObjective(Protocol):
    """An expected safety S(theta), differentiated one batch of requests at a time."""

    def __len__(self) -> int:
        """Return how many terms there are."""
        ...

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[Tensor]:
        """Yield scalars whose gradients sum to that of S(theta), or to an estimate of it."""
        ...


class ReferenceObjective:
    """Mean log-likelihood of given answers, such as refusals; needs no judge."""

    # S(theta) = mean over examples of (1 / T) sum over t of log p_theta(y_t | x, y_<t), for a
    # request x and an answer y of T tokens. With harmful requests and refusals it stands in for
    # the judge of arXiv 2604.08297; with benign requests and the model's own answers it measures
    # usefulness.

    def __init__(self, examples: Sequence[Example], pad_token_id: int, batch_size: int = 8) -> None:
        if not examples:
            raise SelectionError("examples: expected at least one request, found none")
        # Prompts of like length share a batch, so that little is padded.
        ordered = sorted(examples, key=lambda example: len(example.prompt_ids))
        self._batches = [
            ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)
        ]
        self._count = len(ordered)
        self._pad_token_id = pad_token_id

    def __len__(self) -> int:
        """Return how many batches there are."""
        return len(self._batches)

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[Tensor]:
        """Yield each batch's part of the mean log-likelihood."""
        for examples in self._batches[start:]:
            batch = collate(examples, self._pad_token_id, find_layout(model)).to(model.device)
            logits = answer_logits(model, batch)
            losses = F.cross_entropy(
                logits.transpose(1, 2), batch.answer_ids, ignore_index=IGNORED, reduction="none"
            )
            lengths = (batch.answer_ids != IGNORED).sum(-1)
            yield -(losses.sum(-1) / lengths).sum() / self._count


@dataclass(frozen=True)
class Answered:
    """A request and the model's own answer, without the tokens that end a turn."""

    request: str
    example: Example


class JudgedObjective:
    """Mean probability, as a judge sees it, that a model's greedy answers are safe."""

    # S(theta) = mean over harmful requests x of J(x, y) (arXiv 2604.08297). The answers y stay as
    # they are; their tokens become soft ones, through which dJ/dy reaches theta.

    def __init__(
        self,
        judge: SoftJudge,
        answers: Sequence[Answered],
        pad_token_id: int,
        batch_size: int = 8,
        temperature: float = 1.0,
        samples: int = 1,
        seed: int = 0,
    ) -> None:
        _check_answers(answers)
        self._judge, self._answers = judge, answers
        self._pad_token_id, self._batch_size = pad_token_id, batch_size
        self._temperature, self._samples, self._seed = temperature, samples, seed
        self._safety: dict[int, float] = {}

    @property
    def mean_safety(self) -> float | None:
        """Mean of J over the answers; None unless all have been judged."""
        is_complete = len(self._safety) == len(self._answers)
        return sum(self._safety.values()) / len(self._answers) if is_complete else None

    def __len__(self) -> int:
        """Return how many batches there are."""
        return -(-len(self._answers) // self._batch_size)

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[Tensor]:
        """Yield scalars whose gradients sum to the estimate of dS/dtheta."""
        for first in range(start * self._batch_size, len(self._answers), self._batch_size):
            answers = self._answers[first : first + self._batch_size]
            examples = [answered.example for answered in answers]
            batch = collate(examples, self._pad_token_id, find_layout(model))
            logits = answer_logits(model, batch.to(model.device))
            rows = [
                self._term(first + row, answered, logits[row])
                for row, answered in enumerate(answers)
            ]
            yield torch.stack(rows).sum() / len(self._answers)

    def _term(self, position: int, answered: Answered, logits: Tensor) -> Tensor:
        token_ids = answered.example.answer_ids
        self._safety[position], derivative = self._judge.differentiate(answered.request, token_ids)
        padding = logits.shape[-1] - derivative.shape[-1]
        derivative = F.pad(derivative, (0, padding)).to(logits.device)
        return carry_to_logits(
            logits[: len(token_ids)],
            torch.tensor(token_ids, device=logits.device),
            derivative,
            self._temperature,
            self._samples,
            self._generator(position),
        )

    def _generator(self, position: int) -> torch.Generator:
        # One per answer: neither the batch size nor an interruption changes the noise.
        state = np.random.SeedSequence((self._seed, position)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))


def _check_answers(answers: Sequence[Answered]) -> None:
    if not answers:
        raise SelectionError("answers: expected at least one, found none; give more requests")
    empty = [answered.request for answered in answers if not answered.example.answer_ids]
    if empty:
        raise SelectionError(
            f"request {' '.join(empty[0].split())[:40]!r}: expected an answer of the model, "
            "found none; leave the request out"
        )


def carry_to_logits(
    logits: Tensor,
    token_ids: Tensor,
    derivative: Tensor,
    temperature: float,
    samples: int,
    generator: torch.Generator,
) -> Tensor:
    """Carry a derivative with respect to hard tokens over to the logits that chose them."""
    # What the judge reads is the answer itself, in hard tokens; what is differentiated are soft
    # tokens, the probabilities of a Gumbel-softmax (arXiv 1611.01144).
    total = logits.new_zeros(())
    for _ in range(samples):
        noise = draw_gumbel_noise(logits.detach(), token_ids, generator)
        soft_tokens = torch.softmax((logits + noise) / temperature, -1)
        total = total + (derivative * soft_tokens).sum()
    return total / samples


def draw_gumbel_noise(logits: Tensor, token_ids: Tensor, generator: torch.Generator) -> Tensor:
    """Draw Gumbel noise under which these tokens have the largest of noise plus logit."""
    # Noise drawn given the answer makes hard and soft tokens speak of the same text. arXiv
    # 2010.04838, equation 6: the largest is a Gumbel variable around the logarithm of the sum of
    # exponentials; the others are Gumbel variables cut off there.
    exponential = torch.empty(logits.shape).exponential_(generator=generator).to(logits.device)
    logs = exponential.clamp_min(torch.finfo(torch.float32).tiny).log()
    chosen = token_ids.unsqueeze(-1)
    largest = logits.logsumexp(-1, keepdim=True) - logs.gather(-1, chosen)
    others = -torch.logaddexp(logs - logits, -largest)
    return others.scatter(-1, chosen, largest) - logits
