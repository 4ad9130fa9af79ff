"""SET's losses, and the targets of two of them: what the base predicts at benign answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from safeweights_peft.data import IGNORED, Batch, Example, collate
from safeweights_peft.modeling.answers import answer_logits, find_layout, without_dropout
from safeweights_peft.settings import TrainSettings

# Tokens whose probabilities are kept at each position; the others' only in sum. 2 kB a position:
# 7 MB for 877 answers of 4 tokens, where whole rows of logits would take 700 MB. After a step
# toward refusals, 256 hold 95 % of SmolLM2-135M's KL on benign answers, 64 hold 88 %.
LIKELIEST = 256
MOST_OPENING = -1e-6  # the log-probability of an opener from where the hinge has no slope


class Losses(NamedTuple):
    """The terms of SET's loss, in nats, not weighted yet."""

    refusal: Tensor  # per token
    retain: Tensor  # per token
    hinge: Tensor | None  # per row; None where it has no weight

    def weigh(self, settings: TrainSettings) -> Tensor:
        """Add the terms, by their weights."""
        total = self.refusal + settings.retain_weight * self.retain
        return total if self.hinge is None else total + settings.hinge_weight * self.hinge


@dataclass(frozen=True)
class Targets:
    """What a model predicts at the answers of B rows; at padding, anything."""

    token_ids: Tensor  # (B, A, K) int32, the likeliest at each of the first answer tokens
    log_probs: Tensor  # (B, A, K + 1) float32, theirs, and at the end the rest's together
    openers: Tensor  # (O,) int64, tokens with which refusals begin
    silence: Tensor  # (B, H) float32, log-probabilities of no opener at the H tokens after

    def pick(self, rows: Sequence[int]) -> Targets:
        """Return the targets of some rows."""
        at = torch.tensor(rows)
        return Targets(self.token_ids[at], self.log_probs[at], self.openers, self.silence[at])

    def to(self, device: torch.device | str) -> Targets:
        """Return the targets on another device."""
        parts = (self.token_ids, self.log_probs, self.openers, self.silence)
        return Targets(*(part.to(device) for part in parts))


@torch.no_grad()
def compute_targets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: TrainSettings,
    refusals: Sequence[Example] = (),
    on_rows: Callable[[int], None] = lambda count: None,
    likeliest: int = LIKELIEST,
) -> Targets:
    """Compute what a model, as it is now, predicts at answers; refusals tell their openers."""
    layout, device = find_layout(model), next(model.parameters()).device
    openers = find_openers(tokenizer, refusals) if settings.hinge_weight else []
    opening = torch.tensor(openers, dtype=torch.int64, device=device)
    near, end = settings.answer_tokens, settings.benign_tokens
    # Sorted by length, so that little is padded; the same batches in every run, so that a resumed
    # one computes the same bits again.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].prompt_ids))
    parts = []
    with without_dropout(model):
        for start in range(0, len(order), settings.benign_batch_size):
            rows = [examples[row] for row in order[start : start + settings.benign_batch_size]]
            batch = collate(rows, tokenizer.pad_token_id, layout).to(device)
            logits = answer_logits(model, batch)
            ids = find_likeliest(logits[:, :near], likeliest)
            log_probs = sum_up(logits[:, :near], ids)
            silence = _find_silence(logits[:, near:end], opening)
            parts.append(
                (
                    _widen(ids.int(), near).cpu(),
                    _widen(log_probs, near).cpu(),
                    _widen(silence, end - near).cpu(),
                )
            )
            on_rows(len(rows))
    place = torch.tensor(order).argsort()
    token_ids, log_probs, silence = (torch.cat(part)[place] for part in zip(*parts, strict=True))
    return Targets(token_ids, log_probs, opening.cpu(), silence)


def _widen(tensor: Tensor, width: int) -> Tensor:
    """Fill columns up to a width, as a batch has those of its own longest answer."""
    missing = tensor.new_zeros(len(tensor), width - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, missing], 1)


def find_openers(tokenizer: PreTrainedTokenizerBase, refusals: Sequence[Example]) -> list[int]:
    """Find the tokens with which refusals begin, where a text begins and after others."""
    openers = {refusal.answer_ids[0] for refusal in refusals}
    for text in {str(tokenizer.decode([token])).strip() for token in openers} - {""}:
        for before in ("", " ", "\n"):
            last = tokenizer(before + text, add_special_tokens=False)["input_ids"][-1]
            if str(tokenizer.decode([last])).strip() == text:
                openers.add(last)
    return sorted(openers)


def compute_losses(
    model: nn.Module, whole: Batch, targets: Targets, settings: TrainSettings
) -> Losses:
    """Compute the terms of SET's loss, for a batch whose last rows are those of the targets."""
    logits, ids, near = answer_logits(model, whole), whole.answer_ids, settings.answer_tokens
    harmful = len(logits) - len(targets.token_ids)
    refusal = compute_refusal_loss(logits[:harmful], ids[:harmful], settings.token_decay)
    logits, ids = logits[harmful:], ids[harmful:]
    retain = compute_retain_loss(logits[:, :near], targets, ids[:, :near])
    hinge = None
    if settings.hinge_weight:
        end = settings.hinge_tokens
        hinge = compute_hinge_loss(logits[:, near:end], targets, ids[:, near:end])
    return Losses(refusal, retain, hinge)


def compute_refusal_loss(logits: Tensor, answer_ids: Tensor, decay: float) -> Tensor:
    """Compute the weighted negative log-likelihood of refusals."""
    losses = F.cross_entropy(
        logits.transpose(1, 2), answer_ids, ignore_index=IGNORED, reduction="none"
    )
    return (losses * weigh_tokens(answer_ids, decay)).sum()


def compute_retain_loss(logits: Tensor, targets: Targets, answer_ids: Tensor) -> Tensor:
    """Compute the mean KL(base || model) over the tokens of the base's own answers.

    Of the base's likeliest tokens and all others as one: at most the KL of all tokens.
    """
    scored, width = answer_ids != IGNORED, answer_ids.shape[1]
    base = targets.log_probs[:, :width][scored]
    tuned = sum_up(logits[scored], targets.token_ids[:, :width][scored].long())
    # All alike: an answer that begins as the base's is still another where later tokens differ, and
    # by a little they differ everywhere.
    divergence = F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1)
    return divergence.sum() / scored.sum().clamp(1)


def compute_hinge_loss(logits: Tensor, targets: Targets, answer_ids: Tensor) -> Tensor:
    """Compute the log-probability that benign answers lose to openers of refusals, per row."""
    # Of the base's own answers, token by token: what an answer that goes on as the base's loses.
    # Openers that the base itself finds likely there, such as "I" in a letter, cost nothing.
    scored = answer_ids != IGNORED
    base = targets.silence[:, : answer_ids.shape[1]][scored]
    lost = base - _find_silence(logits[scored], targets.openers)
    return lost.relu().sum() / len(answer_ids)


def weigh_tokens(answer_ids: Tensor, decay: float) -> Tensor:
    """Weight answer tokens so that each has `decay` times the weight of the one before; sum 1."""
    # The first answer tokens decide between refusing and helping.
    steps = torch.arange(answer_ids.shape[1], device=answer_ids.device)
    weights = decay**steps * (answer_ids != IGNORED)
    return weights / weights.sum()


def find_likeliest(logits: Tensor, count: int = LIKELIEST) -> Tensor:
    """Find the likeliest tokens, of which at least one is not among them; ``(..., K)``."""
    return logits.topk(min(count, logits.shape[-1] - 1), -1).indices


def sum_up(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Compute log-probabilities of tokens and of all others together; ``(..., K + 1)``."""
    top = logits.gather(-1, token_ids)
    # Not 1 less the others' sum, which is nothing but rounding where the rest is unlikely.
    rest = logits.scatter(-1, token_ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, rest], -1) - logits.logsumexp(-1, keepdim=True)


def _find_silence(logits: Tensor, openers: Tensor) -> Tensor:
    """Compute the log-probability of any token but the openers."""
    opening = logits[..., openers].logsumexp(-1) - logits.logsumexp(-1)
    return torch.log(-torch.expm1(opening.clamp(max=MOST_OPENING)))
