"""The safety that a judge sees in a model's own answers, as something to differentiate.

S(theta) = mean over harmful requests x of J(x, y), y the model's greedy answer and J the judge's
probability that it is safe (arXiv 2604.08297). The answers stay as they are; their tokens become
soft ones, through which dJ/dy reaches theta.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from safeweights_peft.data import Example, collate
from safeweights_peft.errors import SelectionError
from safeweights_peft.modeling.answers import answer_logits
from safeweights_peft.selection.scorers import AnswerScorer
from safeweights_peft.selection.soft_tokens import straight_through


@dataclass(frozen=True)
class Answered:
    """A request and what the model answered.

    Attributes:
        request: the user's request.
        example: the prompt's and the answer's tokens, without those that end a turn.
    """

    request: str
    example: Example


def check_answers(answers: Sequence[Answered]) -> None:
    """Make sure that there is something to judge."""
    if not answers:
        raise SelectionError("answers: expected at least one, found none; give more requests")
    empty = [each.request for each in answers if not each.example.answer_ids]
    if empty:
        raise SelectionError(
            f"request {' '.join(empty[0].split())[:40]!r}: expected an answer of the model, "
            "found none; leave the request out"
        )


class JudgedObjective:
    """A judge's expected score of a model's own answers; see this module and `AnswerScorer`."""

    def __init__(
        self,
        scorer: AnswerScorer,
        answers: Sequence[Answered],
        pad_token_id: int,
        batch_size: int = 8,
        temperature: float = 1.0,
        samples: int = 1,
        seed: int = 0,
    ) -> None:
        """Take the answers that are to be judged."""
        check_answers(answers)
        self._scorer, self._answers = scorer, answers
        self._pad_token_id, self._batch_size = pad_token_id, batch_size
        self._temperature, self._samples, self._seed = temperature, samples, seed
        self._scores: dict[int, float] = {}

    @property
    def mean_score(self) -> float | None:
        """The mean of S over the answers; None unless all have been scored."""
        is_known = len(self._scores) == len(self._answers)
        return sum(self._scores.values()) / len(self._answers) if is_known else None

    def __len__(self) -> int:
        """Count the batches."""
        return -(-len(self._answers) // self._batch_size)

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield scalars whose gradients sum to the estimate of dS/dtheta."""
        for first in range(start * self._batch_size, len(self._answers), self._batch_size):
            answers = self._answers[first : first + self._batch_size]
            batch = collate([each.example for each in answers], self._pad_token_id)
            logits = answer_logits(model, batch.to(model.device))
            rows = [
                self._term(first + row, answered, logits[row])
                for row, answered in enumerate(answers)
            ]
            yield torch.stack(rows).sum() / len(self._answers)

    def _term(self, place: int, answered: Answered, logits: torch.Tensor) -> torch.Tensor:
        token_ids = answered.example.answer_ids
        self._scores[place], derivative = self._scorer.score(answered.request, token_ids)
        padding = logits.shape[-1] - derivative.shape[-1]
        derivative = torch.nn.functional.pad(derivative, (0, padding)).to(logits.device)
        return straight_through(
            logits[: len(token_ids)],
            torch.tensor(token_ids, device=logits.device),
            derivative,
            self._temperature,
            self._samples,
            self._generator(place),
        )

    def _generator(self, place: int) -> torch.Generator:
        state = np.random.SeedSequence((self._seed, place)).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))
