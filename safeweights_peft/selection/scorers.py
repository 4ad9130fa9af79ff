"""Models that score an answer's safety, and how that score changes with the answer's tokens.

A guard reads the whole conversation and says a label; a classifier reads the answer alone. Both
give dS/dp for the model's own tokens, wherever a tokenizer of their own cuts the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection.guards import GuardProfile
from safeweights_peft.selection.transfer import TokenTexts, identity, overlaps, vocabulary_transfer

CHUNK = 8192
"""Tokens of a vocabulary whose embeddings are looked up together."""


class AnswerScorer(Protocol):
    """Scores one answer, and tells how the score depends on its tokens."""

    def score(self, request: str, token_ids: Sequence[int]) -> tuple[float, torch.Tensor]:
        """Score an answer."""
        ...


class GuardScorer:
    """A causal language model that says a label, such as "safe" or "unsafe".

    S = sum of p(label) over the safe ones / the same over all labels, at the position where the
    label comes, after the whole conversation in the guard's own template.
    """

    def __init__(
        self,
        guard_model: PreTrainedModel,
        guard_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        profile: GuardProfile,
    ) -> None:
        """Find the labels, and how the tokenizers differ."""
        self._guard, self._tokenizer = guard_model.requires_grad_(False), guard_tokenizer
        self._profile = profile
        self._bridge = _Bridge(tokenizer, guard_tokenizer)
        self._safe = [self._label_id(label) for label in profile.safe]
        self._labels = self._safe + [self._label_id(label) for label in profile.unsafe]

    def score(self, request: str, token_ids: Sequence[int]) -> tuple[float, torch.Tensor]:
        """Let the guard read the conversation."""
        before, after = self._profile.around(self._tokenizer, request)
        ids, read = self._bridge.splice(before, token_ids, after)
        score, gradient = _differentiate(self._guard, ids, self._probability_of_safe)
        return score, self._bridge.carry(self._guard, gradient[read.positions], token_ids, read)

    def _probability_of_safe(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._guard(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
        return (logits[self._safe].logsumexp(0) - logits[self._labels].logsumexp(0)).exp()

    def _label_id(self, label: str) -> int:
        _, after = self._profile.around(self._tokenizer, "request")
        without, with_label = (
            self._tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (after, after + label)
        )
        if with_label[:-1] != without:
            raise SelectionError(
                f"{self._tokenizer.name_or_path}: expected the label {label!r} to be one token "
                f"after the prompt, found {len(with_label) - len(without)}; give a profile with "
                "its first token"
            )
        return int(with_label[-1])


class ClassifierScorer:
    """A sequence classifier that reads the answer alone; S is its probability of a label."""

    def __init__(
        self,
        classifier: PreTrainedModel,
        classifier_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        label: str,
        is_safe: bool,
    ) -> None:
        """Find the label, and how the tokenizers differ."""
        labels = classifier.config.label2id or {}
        if label not in labels:
            raise SelectionError(
                f"{classifier.name_or_path}: expected one of its labels "
                f"{', '.join(sorted(labels))}, found {label!r}; name one of them"
            )
        self._classifier = classifier.requires_grad_(False)
        self._label, self._is_safe = int(labels[label]), is_safe
        self._bridge = _Bridge(tokenizer, classifier_tokenizer)

    def score(self, request: str, token_ids: Sequence[int]) -> tuple[float, torch.Tensor]:
        """Let the classifier read the answer."""
        ids, read = self._bridge.read_alone(token_ids)
        score, gradient = _differentiate(self._classifier, ids, self._probability_of_safe)
        carried = self._bridge.carry(self._classifier, gradient[read.positions], token_ids, read)
        return score, carried

    def _probability_of_safe(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._classifier(input_ids=ids).logits[0].float()
        is_exclusive = (
            self._classifier.config.problem_type != "multi_label_classification" and len(logits) > 1
        )
        every = logits.softmax(0) if is_exclusive else logits.sigmoid()
        labelled = every[self._label]
        return labelled if self._is_safe else 1 - labelled


@dataclass(frozen=True, eq=False)
class _Reading:
    """Where a scorer's input holds the answer.

    Attributes:
        positions: of the U tokens that are read for the answer.
        shares: (U, T) float32, see `overlaps`; None where the tokens are the model's own.
    """

    positions: list[int]
    shares: torch.Tensor | None


class _Bridge:
    """The way from a model's tokens to a scorer's, and of derivatives back."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, scorer_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._scorer_tokenizer, self._count = scorer_tokenizer, len(tokenizer)
        self._texts: TokenTexts | None = None
        if identity(tokenizer) != identity(scorer_tokenizer):
            self._texts = TokenTexts(tokenizer)
            self._transfer = vocabulary_transfer(tokenizer, scorer_tokenizer)

    def splice(
        self, before: str, token_ids: Sequence[int], after: str
    ) -> tuple[list[int], _Reading]:
        """Put an answer between two texts: as tokens if the tokenizers agree, else as text."""
        if self._texts is None:
            start, end = self._encode(before), self._encode(after)
            positions = range(len(start), len(start) + len(token_ids))
            return [*start, *token_ids, *end], _Reading(list(positions), None)
        text, spans = self._texts.spell(token_ids)
        return self._read(before + text + after, len(before), spans, special=False)

    def read_alone(self, token_ids: Sequence[int]) -> tuple[list[int], _Reading]:
        """Put an answer alone between the special tokens that the scorer wants around a text."""
        if self._texts is None:
            start, end = self._special_tokens()
            positions = range(len(start), len(start) + len(token_ids))
            return [*start, *token_ids, *end], _Reading(list(positions), None)
        text, spans = self._texts.spell(token_ids)
        return self._read(text, 0, spans, special=True)

    def carry(
        self,
        scorer: PreTrainedModel,
        gradient: torch.Tensor,
        token_ids: Sequence[int],
        read: _Reading,
    ) -> torch.Tensor:
        """Carry dS/d(embedding), (U, d), over to the model's tokens, (T, V)."""
        derivative = _by_token(scorer.get_input_embeddings(), gradient)
        derivative = _resize(derivative.cpu(), len(self._scorer_tokenizer))
        realised = torch.tensor(token_ids)
        if read.shares is None:
            return derivative - derivative.gather(1, realised[:, None])
        derivative = self._transfer.carry(read.shares.T @ derivative)
        derivative -= derivative.gather(1, realised[:, None])
        known = self._transfer.known
        return derivative * known * known[realised][:, None]

    def _read(
        self, text: str, offset: int, spans: list[tuple[int, int]], *, special: bool
    ) -> tuple[list[int], _Reading]:
        encoded = self._scorer_tokenizer(
            text, add_special_tokens=special, truncation=special, return_offsets_mapping=True
        )
        written = [(start + offset, end + offset) for start, end in spans]
        first, last = offset, offset + spans[-1][1]
        offsets = encoded["offset_mapping"]
        positions = [u for u, (a, b) in enumerate(offsets) if max(a, first) < min(b, last)]
        shares = overlaps(written, [offsets[u] for u in positions])
        return encoded["input_ids"], _Reading(positions, shares)

    def _encode(self, text: str) -> list[int]:
        return list(self._scorer_tokenizer(text, add_special_tokens=False)["input_ids"])

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Find the special tokens that the tokenizer puts before and after a text."""
        bare, around = self._encode("a"), list(self._scorer_tokenizer("a")["input_ids"])
        starts = range(len(around) - len(bare) + 1)
        start = next(at for at in starts if around[at : at + len(bare)] == bare)
        return around[:start], around[start + len(bare) :]


def _differentiate(
    scorer: PreTrainedModel, ids: Sequence[int], score: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """Compute a score and its gradient at the embeddings, (N, d) float32 for N tokens."""
    embedded: list[torch.Tensor] = []

    def capture(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_(True))
        return embedded[-1]

    handle = scorer.get_input_embeddings().register_forward_hook(capture)
    try:
        with torch.enable_grad():
            value = score(torch.tensor([ids], device=scorer.device))
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(value, embedded[:1])
    if not (value.isfinite() and gradient.isfinite().all()):
        raise SelectionError(
            f"{scorer.name_or_path}: expected a finite score and gradient, found others; load it "
            "in float32 or bfloat16"
        )
    return value.item(), gradient[0].float()


@torch.no_grad()
def _by_token(embedding: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Multiplie a gradient (U, d) with each token's embedding, (U, W)."""
    ids = torch.arange(embedding.get_parameter("weight").shape[0], device=gradient.device)
    return torch.cat([gradient @ embedding(chunk).float().T for chunk in ids.split(CHUNK)], 1)


def _resize(derivative: torch.Tensor, count: int) -> torch.Tensor:
    """Cut off embeddings without a token, or adds tokens without an embedding."""
    return nn.functional.pad(derivative, (0, count - derivative.shape[1]))
