"""How far the published code's gradient agrees with ours: cosine, and the weights they select.

    python benchmarks/published_gradient.py demo/base --guard DIR --guard-profile llama-guard-3
    python benchmarks/published_gradient.py ... --label unsafe --examples 16 --density 0.01

The code published with arXiv 2604.08297 differs from the paper's formula: the guard sees the
answer as a user's message and never the request; the score is the raw logit of a label, not a
probability; its derivative is taken at saturated logits; token texts are not decoded; positions of
the two tokenizers are matched by their numbers; the noise is drawn without regard to the answer;
the last token is left out. Here it has the guard's own chat template, where the published code has
one guard's written out, and its gradients are summed in float32. Both read the same greedy answers.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.chat import Chat
from safeweights_peft.data import Batching, Example, Layout, collate
from safeweights_peft.evaluation.generate import find_end_tokens, generate_answers
from safeweights_peft.fetching import resolve_base
from safeweights_peft.modeling.answers import answer_logits
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.modeling.loading import load_model, load_tokenizer
from safeweights_peft.selection.guards import read_profile
from safeweights_peft.selection.objective import Answered, JudgedObjective
from safeweights_peft.selection.scores import SCORES, score_entries, sum_gradients
from safeweights_peft.selection.soft_judges import CHUNK, GuardJudge
from safeweights_peft.selection.topk import select
from safeweights_peft.settings import Method
from safeweights_peft.sources import read_rows

SATURATED = -17.0  # logit of all tokens but the answer's own, which have 0
TEMPERATURE = 0.3
PLACEHOLDER = "ANSWER"


class PublishedObjective:
    """The published estimate of how the logit of a guard's label moves with the model's weights."""

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
        self._guard, self._guard_tokenizer = guard_model.requires_grad_(False), guard_tokenizer
        self._tokenizer, self._answers, self._seed = tokenizer, answers, seed
        self._label = guard_tokenizer(label, add_special_tokens=False)["input_ids"][0]
        message = {"role": "user", "content": PLACEHOLDER}
        prompt = guard_tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        self._around = [
            torch.tensor(guard_tokenizer(part, add_special_tokens=False)["input_ids"]).long()
            for part in prompt.split(PLACEHOLDER)
        ]
        strings = guard_tokenizer.convert_ids_to_tokens(list(range(len(guard_tokenizer))))
        texts = [(string or "").replace("_", " ") for string in strings]
        cuts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        counts = torch.tensor([len(pieces) for pieces in cuts])
        self._tokens = torch.arange(len(cuts)).repeat_interleave(counts)
        self._pieces = torch.tensor([piece for pieces in cuts for piece in pieces])
        self._weights = 1 / counts[self._tokens]

    def __len__(self) -> int:
        """Return how many answers there are."""
        return len(self._answers)

    def terms(self, model: PreTrainedModel, start: int = 0) -> Iterator[Tensor]:
        """Yield one scalar per answer, whose gradient is the published code's."""
        for position, answered in enumerate(self._answers[start:], start):
            layout = Layout(Batching.ALONE)
            batch = collate([answered.example], self._tokenizer.pad_token_id, layout)
            logits = answer_logits(model, batch.to(model.device))[0, :-1]
            derivative = self._carry(self._derivative(answered)).to(logits.device)
            with torch.random.fork_rng():
                torch.manual_seed(self._seed + position)
                soft_tokens = F.gumbel_softmax(logits, tau=TEMPERATURE)
            both = min(len(derivative), len(soft_tokens))
            width = derivative.shape[1]
            yield -(derivative[:both] * soft_tokens[:both, :width]).sum()

    def _derivative(self, answered: Answered) -> Tensor:
        """d(-logit of the label) / d(saturated logits), (U, W) float32 on the CPU."""
        text = self._tokenizer.decode(answered.example.answer_ids, skip_special_tokens=True)
        ids = torch.tensor(self._guard_tokenizer(text.strip())["input_ids"])
        before, after = self._around
        embeddings = self._embed_all()
        saturated = torch.full((len(ids), len(embeddings)), SATURATED)
        saturated.scatter_(1, ids[:, None], 0.0).requires_grad_(True)
        rows = [embeddings[before], saturated.softmax(-1) @ embeddings, embeddings[after]]
        device, dtype = self._guard.device, self._guard.dtype
        with torch.enable_grad():
            inputs = torch.cat(rows).unsqueeze(0).to(device, dtype)
            logits = self._guard(inputs_embeds=inputs, logits_to_keep=1).logits[0, -1]
            (derivative,) = torch.autograd.grad(-logits[self._label].float(), saturated)
        return derivative

    @torch.no_grad()
    def _embed_all(self) -> Tensor:
        embedding, count = self._guard.get_input_embeddings(), len(self._guard_tokenizer)
        chunks = torch.arange(count, device=embedding.weight.device).split(CHUNK)
        return torch.cat([embedding(chunk).float().cpu() for chunk in chunks])

    def _carry(self, derivative: Tensor) -> Tensor:
        """(U, W) over the guard's tokens as (U, V) over the model's: 1/n of each for n pieces."""
        carried = torch.zeros(len(derivative), len(self._tokenizer))
        weighted = derivative[:, self._tokens] * self._weights
        return carried.index_add_(1, self._pieces, weighted)


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[str], tokens: int
) -> list[Answered]:
    """Let the model answer requests, and cut off the tokens that end a turn."""
    ends = find_end_tokens(model, tokenizer)
    examples = generate_answers(
        model, Chat(tokenizer), requests, max_new_tokens=tokens, batch_size=8
    )
    answers = []
    for request, example in zip(requests, examples, strict=True):
        ids = tuple(token for token in example.answer_ids if token not in ends)
        answers.append(Answered(request, Example(example.prompt_ids, ids)))
    return [answered for answered in answers if answered.example.answer_ids]


def compare(ours: dict[str, Tensor], published: dict[str, Tensor]) -> float:
    """Compute the cosine of two gradients, 1 where they point the same way."""
    products = [
        torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
        for a, b in ((ours[name].double(), published[name].double()) for name in ours)
    ]
    inner, first, second = torch.stack(products).sum(0).tolist()
    return inner / (first * second) ** 0.5


def main() -> None:
    """Print a table: the cosine, and the fraction of selected weights that both select."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="directory of a causal language model")
    parser.add_argument("--guard", required=True, help="directory of a guard model")
    parser.add_argument("--guard-profile", required=True, help="built-in profile, or a JSON file")
    parser.add_argument("--label", help="label of unsafe answers  [default: the profile's first]")
    parser.add_argument("--harmful", default="builtin:harmful_train")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.01)
    arguments = parser.parse_args()
    base, guard_base = resolve_base(arguments.model), resolve_base(arguments.guard)
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base)
    guard, guard_tokenizer = load_model(guard_base, torch.float32), load_tokenizer(guard_base)
    profile = read_profile(arguments.guard_profile)
    requests = [row.instruction for row in read_rows(arguments.harmful)[: arguments.examples]]
    answers = answer(model, tokenizer, requests, arguments.answer_tokens)
    judge = GuardJudge(guard, guard_tokenizer, tokenizer, profile)
    label = arguments.label or profile.unsafe[0]
    parameters = eligible_parameters(model)
    objectives = (
        JudgedObjective(judge, answers, tokenizer.pad_token_id, temperature=TEMPERATURE),
        PublishedObjective(guard, guard_tokenizer, tokenizer, label, answers),
    )
    ours, published = (sum_gradients(model, parameters, objective) for objective in objectives)
    k = round(arguments.density * sum(parameter.numel() for parameter in parameters.values()))
    first, second = (
        select(score_entries(SCORES[Method.ESI], parameters, gradients), k)
        for gradients in (ours, published)
    )
    common = sum(
        np.intersect1d(first[name].indices, second[name].indices).size
        for name in first.keys() & second.keys()
    )
    print("| answers | cosine of the gradients | weights that both select | by chance |")
    print("|---|---|---|---|")
    cosine = compare(ours, published)
    print(f"| {len(answers)} | {cosine:.3f} | {common / k:.1%} | {arguments.density:.1%} |")


if __name__ == "__main__":
    main()
