"""The published estimator's arithmetic, for comparison with `JudgedObjective`.

It follows the code published with arXiv 2604.08297, not its formula. The guard sees the answer as a
user's message and never the request; the score is the raw logit of its label, not a probability;
its derivative is taken at saturated logits; token texts are not decoded; positions of the two
tokenizers are matched by their numbers; the noise knows nothing of the answer; the last token is
left out. Two things are ours: the guard's own chat template, where the code has one guard's
written out, and sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.data import collate
from safeweights_peft.modeling.answers import answer_logits
from safeweights_peft.selection.guards import ANSWER, render_chat, split_at_answer
from safeweights_peft.selection.judged import Answered, check_answers
from safeweights_peft.selection.scorers import CHUNK

SATURATED = -17.0
"""Logit of all tokens but the answer's own, which have 0."""
TEMPERATURE = 0.3


class PublishedObjective:
    """The published estimate of how the guard's label moves with the model's weights."""

    def __init__(
        self,
        guard_model: PreTrainedModel,
        guard_tokenizer: PreTrainedTokenizerBase,
        tokenizer: PreTrainedTokenizerBase,
        label: str,
        answers: Sequence[Answered],
        seed: int = 0,
    ) -> None:
        """Find, for each token of the guard, the model's tokens that spell it."""
        check_answers(answers)
        self._guard, self._guard_tokenizer = guard_model.requires_grad_(False), guard_tokenizer
        self._tokenizer, self._answers, self._seed = tokenizer, answers, seed
        self._label = guard_tokenizer(label, add_special_tokens=False)["input_ids"][0]
        message = {"role": "user", "content": ANSWER}
        around = split_at_answer(guard_tokenizer, render_chat(guard_tokenizer, [message]))
        self._around = [
            torch.tensor(guard_tokenizer(part, add_special_tokens=False)["input_ids"]).long()
            for part in around
        ]
        strings = guard_tokenizer.convert_ids_to_tokens(list(range(len(guard_tokenizer))))
        texts = [(string or "").replace("_", " ") for string in strings]
        cut = tokenizer(texts, add_special_tokens=False)["input_ids"]
        counts = torch.tensor([len(pieces) for pieces in cut])
        self._tokens = torch.arange(len(cut)).repeat_interleave(counts)
        self._pieces = torch.tensor([piece for pieces in cut for piece in pieces])
        self._weights = 1 / counts[self._tokens]

    def __len__(self) -> int:
        """Count the answers."""
        return len(self._answers)

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[torch.Tensor]:
        """Yield one scalar per answer, whose gradient is the published code's."""
        for place, answered in enumerate(self._answers[start:], start):
            batch = collate([answered.example], self._tokenizer.pad_token_id).to(model.device)
            logits = answer_logits(model, batch)[0, :-1]
            derivative = self._carry(self._derivative(answered)).to(logits.device)
            with torch.random.fork_rng():
                torch.manual_seed(self._seed + place)
                soft_tokens = F.gumbel_softmax(logits, tau=TEMPERATURE)
            both = min(len(derivative), len(soft_tokens))
            width = derivative.shape[1]
            yield -(derivative[:both] * soft_tokens[:both, :width]).sum()

    def _derivative(self, answered: Answered) -> torch.Tensor:
        """d(-logit of the label) / d(saturated logits), (U, W) float32 on the CPU."""
        text = self._tokenizer.decode(answered.example.answer_ids, skip_special_tokens=True)
        ids = torch.tensor(self._guard_tokenizer(text.strip())["input_ids"])
        before, after = self._around
        embedding = self._guard.get_input_embeddings()
        every = _all_embeddings(embedding, len(self._guard_tokenizer))
        saturated = torch.full((len(ids), len(every)), SATURATED).scatter_(1, ids[:, None], 0.0)
        saturated.requires_grad_(True)
        rows = [every[before], saturated.softmax(-1) @ every, every[after]]
        device, dtype = self._guard.device, self._guard.dtype
        with torch.enable_grad():
            embeds = torch.cat(rows).unsqueeze(0).to(device, dtype)
            logits = self._guard(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1]
            (derivative,) = torch.autograd.grad(-logits[self._label].float(), saturated)
        return derivative

    def _carry(self, derivative: torch.Tensor) -> torch.Tensor:
        """(U, W) over the guard's tokens as (U, V) over the model's: 1/n of each for n pieces."""
        carried = torch.zeros(len(derivative), len(self._tokenizer))
        weighted = derivative[:, self._tokens] * self._weights
        return carried.index_add_(1, self._pieces, weighted)


@torch.no_grad()
def _all_embeddings(embedding: nn.Module, count: int) -> torch.Tensor:
    device = embedding.get_parameter("weight").device
    chunks = torch.arange(count, device=device).split(CHUNK)
    return torch.cat([embedding(chunk).float().cpu() for chunk in chunks])
