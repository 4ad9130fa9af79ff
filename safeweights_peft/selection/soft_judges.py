"""Judges that can be differentiated: how an answer's safety changes with the answer's tokens.

A guard reads the whole conversation and says a label; a classifier reads the answer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection.guards import GuardProfile
from safeweights_peft.selection.transfer import (
    TokenTexts,
    compute_overlaps,
    describe_tokenizer,
    load_transfer,
)

CHUNK = 8192  # tokens of a vocabulary whose embeddings are looked up at a time


class SoftJudge(Protocol):
    """Give the probability that an answer is safe, and its derivative by the answer's tokens."""

    def differentiate(self, request: str, token_ids: Sequence[int]) -> tuple[float, Tensor]:
        """Return J, and dJ/dp of T tokens over the model's vocabulary, (T, V) on the CPU."""
        ...


class GuardJudge:
    """A causal language model that says a label such as "safe" or "unsafe"."""

    # J = sum of p(label) over the safe labels / the same over all labels, at the position where
    # the label comes, after the whole conversation in the guard's own template.

    def __init__(
        self,
        guard_model: PreTrainedModel,
        guard_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        profile: GuardProfile,
    ) -> None:
        self._guard, self._tokenizer = guard_model.requires_grad_(False), guard_tokenizer
        self._profile = profile
        self._bridge = _Bridge(tokenizer, guard_tokenizer)
        self._safe = profile.label_ids(guard_tokenizer, profile.safe)
        self._labels = self._safe + profile.label_ids(guard_tokenizer, profile.unsafe)

    def differentiate(self, request: str, token_ids: Sequence[int]) -> tuple[float, Tensor]:
        """Let the guard read the conversation."""
        before, after = self._profile.render(self._tokenizer, request)
        ids, reading = self._bridge.splice(before, token_ids, after)
        safety, gradient = _differentiate(self._guard, ids, self._probability_of_safe)
        return safety, self._bridge.carry(self._guard, gradient, token_ids, reading)

    def _probability_of_safe(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._guard(input_ids=ids, logits_to_keep=1).logits[0, -1].float()
        return (logits[self._safe].logsumexp(0) - logits[self._labels].logsumexp(0)).exp()


class ClassifierJudge:
    """A sequence classifier that reads the answer alone; J is its probability of a label."""

    def __init__(
        self,
        classifier: PreTrainedModel,
        classifier_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        label: str,
        is_safe: bool,
    ) -> None:
        self._classifier = classifier.requires_grad_(False)
        labels = classifier.config.label2id or {}
        self._label = find_label(labels, label, classifier.name_or_path)
        self._is_safe = is_safe
        self._bridge = _Bridge(tokenizer, classifier_tokenizer)

    def differentiate(self, request: str, token_ids: Sequence[int]) -> tuple[float, Tensor]:
        """Let the classifier read the answer."""
        ids, reading = self._bridge.read_alone(token_ids)
        safety, gradient = _differentiate(self._classifier, ids, self._probability_of_safe)
        return safety, self._bridge.carry(self._classifier, gradient, token_ids, reading)

    def _probability_of_safe(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._classifier(input_ids=ids).logits[0]
        probability = read_probability(self._classifier, logits, self._label)
        return probability if self._is_safe else 1 - probability


def find_label(labels: Mapping[str, int], label: str, classifier: str) -> int:
    """Find a label's place among a classifier's logits."""
    if label not in labels:
        raise SelectionError(
            f"{classifier}: expected one of its labels "
            f"{', '.join(sorted(labels))}, found {label!r}; name one of them"
        )
    return int(labels[label])


def read_probability(classifier: PreTrainedModel, logits: Tensor, label: int) -> Tensor:
    """Read a label's probability off logits, (..., L): (...)."""
    problem, logits = classifier.config.problem_type, logits.float()
    is_exclusive = problem != "multi_label_classification" and logits.shape[-1] > 1
    return (logits.softmax(-1) if is_exclusive else logits.sigmoid())[..., label]


@dataclass(frozen=True, eq=False)
class _Reading:
    """Where a judge's input holds the answer."""

    positions: list[int]  # of the U tokens that hold it
    # (U, T) float32, see `compute_overlaps`; None where the tokens are the model's own.
    overlaps: Tensor | None


class _Bridge:
    """The way from a model's tokens to a judge's, and of derivatives back."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, judge_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._judge_tokenizer, self._count = judge_tokenizer, len(judge_tokenizer)
        self._texts: TokenTexts | None = None
        if describe_tokenizer(tokenizer) != describe_tokenizer(judge_tokenizer):
            self._texts = TokenTexts(tokenizer)
            self._transfer = load_transfer(tokenizer, judge_tokenizer)

    def splice(
        self, before: str, token_ids: Sequence[int], after: str
    ) -> tuple[list[int], _Reading]:
        """Put an answer between two texts: as tokens if the tokenizers agree, else as text."""
        if self._texts is None:
            return _surround(self._encode(before), token_ids, self._encode(after))
        text, spans = self._texts.spell(token_ids)
        return self._read(before + text + after, len(before), spans, special=False)

    def read_alone(self, token_ids: Sequence[int]) -> tuple[list[int], _Reading]:
        """Put an answer between the special tokens that the judge's tokenizer adds to a text."""
        if self._texts is None:
            start, end = self._special_tokens()
            return _surround(start, token_ids, end)
        text, spans = self._texts.spell(token_ids)
        return self._read(text, 0, spans, special=True)

    def carry(
        self, judge: PreTrainedModel, gradient: Tensor, token_ids: Sequence[int], reading: _Reading
    ) -> Tensor:
        """Carry dJ/d(embedding), (N, d) for the judge's input, over to the model's tokens."""
        embeddings = judge.get_input_embeddings()
        derivative = _by_token(embeddings, gradient[reading.positions]).cpu()
        # Cut off embeddings without a token, or add tokens without an embedding.
        derivative = nn.functional.pad(derivative, (0, self._count - derivative.shape[1]))
        ids = torch.tensor(token_ids)
        if reading.overlaps is None:
            return derivative - derivative.gather(1, ids[:, None])
        derivative = self._transfer.carry(reading.overlaps.T @ derivative)
        derivative -= derivative.gather(1, ids[:, None])
        has_text = self._transfer.has_text
        return derivative * has_text * has_text[ids][:, None]

    def _read(
        self, text: str, offset: int, spans: list[tuple[int, int]], *, special: bool
    ) -> tuple[list[int], _Reading]:
        encoded = self._judge_tokenizer(
            text, add_special_tokens=special, truncation=special, return_offsets_mapping=True
        )
        written = [(start + offset, end + offset) for start, end in spans]
        first, last = offset, offset + spans[-1][1]
        offsets = encoded["offset_mapping"]
        positions = [u for u, (a, b) in enumerate(offsets) if max(a, first) < min(b, last)]
        overlaps = compute_overlaps(written, [offsets[u] for u in positions])
        return encoded["input_ids"], _Reading(positions, overlaps)

    def _encode(self, text: str) -> list[int]:
        return list(self._judge_tokenizer(text, add_special_tokens=False)["input_ids"])

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        # Found by example: tokenizers don't tell which tokens they put before and after a text.
        bare, around = self._encode("a"), list(self._judge_tokenizer("a")["input_ids"])
        starts = range(len(around) - len(bare) + 1)
        start = next(at for at in starts if around[at : at + len(bare)] == bare)
        return around[:start], around[start + len(bare) :]


def _surround(
    start: list[int], token_ids: Sequence[int], end: list[int]
) -> tuple[list[int], _Reading]:
    positions = range(len(start), len(start) + len(token_ids))
    return [*start, *token_ids, *end], _Reading(list(positions), None)


def _differentiate(
    judge: PreTrainedModel, ids: Sequence[int], score: Callable[[Tensor], Tensor]
) -> tuple[float, Tensor]:
    """Compute a judge's J and its gradient at the embeddings, (N, d) float32 for N tokens."""
    embeddings: list[Tensor] = []

    # A hook, not `inputs_embeds`: classifiers look in `input_ids` for the last token of a text.
    def capture(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_(True))
        return embeddings[-1]

    handle = judge.get_input_embeddings().register_forward_hook(capture)
    try:
        with torch.enable_grad():
            value = score(torch.tensor([ids], device=judge.device))
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(value, embeddings[:1])
    if not (value.isfinite() and gradient.isfinite().all()):
        raise SelectionError(
            f"{judge.name_or_path}: expected a finite score and gradient, found others; load it "
            "in float32 or bfloat16"
        )
    return value.item(), gradient[0].float()


@torch.no_grad()
def _by_token(embedding: nn.Module, gradient: Tensor) -> Tensor:
    """Multiply a gradient, (U, d), by each token's embedding: (U, W)."""
    ids = torch.arange(embedding.get_parameter("weight").shape[0], device=gradient.device)
    return torch.cat([gradient @ embedding(chunk).float().T for chunk in ids.split(CHUNK)], 1)
