"""Judge-guided gradients, held to finite differences of the whole pipeline."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from safeweights_peft.data import Example, encode_prompt
from safeweights_peft.errors import SelectionError
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.selection import transfer
from safeweights_peft.selection.esi import accumulate_gradients
from safeweights_peft.selection.guards import GuardProfile
from safeweights_peft.selection.judged import Answered, JudgedObjective
from safeweights_peft.selection.published import PublishedObjective
from safeweights_peft.selection.scorers import AnswerScorer, ClassifierScorer, GuardScorer
from safeweights_peft.selection.soft_tokens import gumbel_noise
from tests.tiny_guards import (
    save_byte_level_tokenizer,
    save_piece_tokenizer,
    save_tiny_classifier,
    save_tiny_guard,
)
from tests.tiny_models import save_tiny_tokenizer

TEMPERATURE, SAMPLES, SEED = 0.7, 2, 3
STEP = 1e-3
CONVERSATIONS = [("Steal the car.", "the safe can"), ("Lie.", " no thanks, I can't")]
PROFILE = GuardProfile(safe=("s",), unsafe=("u", "x"), cue="\n")
OTHERS = {
    "same": save_tiny_tokenizer,
    "bytes": save_byte_level_tokenizer,
    "pieces": save_piece_tokenizer,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CACHE_DIR", tmp_path / "cache")


@pytest.fixture
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def answers(tokenizer) -> list[Answered]:
    return [
        Answered(request, Example(encode_prompt(tokenizer, request), encode(tokenizer, answer)))
        for request, answer in CONVERSATIONS
    ]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class Twin:
    """S as a function of theta, written out: where the answers stay, and their tokens move softly.

    At theta itself the tokens are hard; around it they move as the probabilities do, from one
    tokenizer to the other by their characters and texts, each looked up by itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reader: PreTrainedModel,
        reader_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.model, self.tokenizer = model.double(), tokenizer
        self.reader, self.reader_tokenizer = reader.double(), reader_tokenizer
        self.embeddings = reader.get_input_embeddings().weight.detach()
        self.same = tokenizer.get_vocab() == reader_tokenizer.get_vocab()

    def logits(self, example: Example) -> torch.Tensor:
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        return self.model(ids).logits[0, len(example.prompt_ids) - 1 : -1]

    def freeze(self, answers: Sequence[Answered]) -> None:
        """Draws the noise, and notes the probabilities at theta."""
        self.noise, self.at_theta = [], []
        for place, answered in enumerate(answers):
            logits = self.logits(answered.example).detach()
            generator = JudgedObjective(None, answers, 0, seed=SEED)._generator(place)
            chosen = torch.tensor(answered.example.answer_ids)
            noise = [gumbel_noise(logits.float(), chosen, generator) for _ in range(SAMPLES)]
            self.noise.append(noise)
            self.at_theta.append(self.soft(logits, noise))

    def soft(self, logits: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([F.softmax((logits + each) / TEMPERATURE, -1) for each in noise]).mean(0)

    @torch.no_grad()
    def value(
        self, answers: Sequence[Answered], before: list[str], after: list[str], read
    ) -> float:
        total = 0.0
        for place, answered in enumerate(answers):
            moved = self.soft(self.logits(answered.example), self.noise[place])
            moved = moved - self.at_theta[place]
            start, tokens, end = self.tokens(
                answered.example.answer_ids, moved, before, after, place
            )
            rows = [self.embeddings[start], tokens @ self.embeddings, self.embeddings[end]]
            total += read(self.reader(inputs_embeds=torch.cat(rows)[None]).logits[0])
        return total / len(answers)

    def tokens(self, ids, moved, before, after, place):
        """The reader's ids before and after, and the answer as soft tokens between them."""
        tokenizer, start = self.reader_tokenizer, encode(self.reader_tokenizer, before[place])
        end = encode(tokenizer, after[place])
        if self.same:
            return (
                list(start),
                F.one_hot(torch.tensor(ids), moved.shape[1]).double() + moved,
                list(end),
            )
        texts = [self.tokenizer.decode([token]) for token in ids]
        read = encode(tokenizer, "".join(texts))
        soft = F.one_hot(torch.tensor(read), len(tokenizer)).double()
        character_of = [t for t, text in enumerate(texts) for _ in text]
        at = 0
        for u, token in enumerate(read):
            length = len(tokenizer.convert_ids_to_tokens(token))  # of ASCII: one mark a character
            for character in range(at, at + length):
                t = character_of[character]
                soft[u] += self.carried(moved[t], ids[t]) / length
            at += length
        return list(start), soft, list(end)

    def carried(self, moved: torch.Tensor, realised: int) -> torch.Tensor:
        """Moves of the model's tokens as moves of the reader's; what has no text stays in place."""
        total = torch.zeros(len(self.reader_tokenizer), dtype=torch.double)
        for token in range(len(self.tokenizer)):
            text = self.tokenizer.decode([token], skip_special_tokens=True)
            if not text or "\ufffd" in text:
                text = self.tokenizer.decode([realised])
            pieces = encode(self.reader_tokenizer, text)
            for piece in pieces:
                total[piece] += moved[token] / len(pieces)
        return total


def check(model, twin: Twin, scorer: AnswerScorer, answers, before, after, read) -> None:
    """Holds the estimate, along itself and something random, to a central difference."""
    objective = JudgedObjective(scorer, answers, 256, 2, TEMPERATURE, SAMPLES, SEED)
    gradients = accumulate_gradients(model.float(), eligible_parameters(model), objective)
    twin.model.double()
    twin.freeze(answers)
    value = twin.value(answers, before, after, read)
    assert objective.mean_score == pytest.approx(value, rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    aside = {name: torch.randn(each.shape, generator=generator) for name, each in gradients.items()}
    direction = {name: unit(gradients)[name] + unit(aside)[name] for name in gradients}
    values = []
    for step in (STEP, -2 * STEP):
        for name, each in direction.items():
            twin.model.get_parameter(name).data += step * each
        values.append(twin.value(answers, before, after, read))
    found = sum((gradients[name] * each).sum().item() for name, each in direction.items())
    assert found == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-3)


def unit(vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length = sum(each.square().sum() for each in vector.values()).sqrt()
    return {name: each / length for name, each in vector.items()}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_guards_gradient_is_that_of_finite_differences(
    model, tokenizer, answers, tmp_path: Path, kind: str
) -> None:
    path = save_tiny_guard(OTHERS[kind](tmp_path / "guard"))
    guard, guard_tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    scorer = GuardScorer(guard, guard_tokenizer, tokenizer, PROFILE)
    labels = [encode(guard_tokenizer, label)[0] for label in "sux"]
    before = [f"<|im_start|>user\n{r}<|im_end|>\n<|im_start|>assistant\n" for r, _ in CONVERSATIONS]
    after = ["<|im_end|>\n<|im_start|>assistant\n\n"] * len(CONVERSATIONS)
    after = [text.removesuffix("\n\n") + "\n" for text in after]

    def read(logits: torch.Tensor) -> float:
        return logits[-1, labels].softmax(0)[0].item()

    twin_guard = AutoModelForCausalLM.from_pretrained(path)
    twin = Twin(model, tokenizer, twin_guard, guard_tokenizer)
    check(model, twin, scorer, answers, before, after, read)


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_classifiers_gradient_is_that_of_finite_differences(
    model, tokenizer, answers, tmp_path: Path, kind: str, is_safe: bool
) -> None:
    path = save_tiny_classifier(OTHERS[kind](tmp_path / "classifier"), ["good", "bad", "odd"])
    load = AutoModelForSequenceClassification.from_pretrained
    classifier_tokenizer = AutoTokenizer.from_pretrained(path)
    scorer = ClassifierScorer(load(path), classifier_tokenizer, tokenizer, "bad", is_safe)

    def read(logits: torch.Tensor) -> float:
        labelled = logits.softmax(0)[1].item()
        return labelled if is_safe else 1 - labelled

    twin = Twin(model, tokenizer, load(path), classifier_tokenizer)
    nothing = [""] * len(answers)
    check(model, twin, scorer, answers, nothing, nothing, read)


def test_noise_and_gradient_do_not_hang_on_the_batch_size(
    model, tokenizer, answers, tmp_path: Path
) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    scorer = GuardScorer(guard, own, tokenizer, PROFILE)
    first, second = (
        accumulate_gradients(
            model, eligible_parameters(model), JudgedObjective(scorer, answers, 256, size)
        )
        for size in (1, 2)
    )
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_guard_reads_the_request_too(tokenizer, tmp_path: Path) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    scorer, ids = GuardScorer(guard, own, tokenizer, PROFILE), encode(tokenizer, "sure")
    assert scorer.score("Bake a cake", ids)[0] != scorer.score("Break a safe", ids)[0]


def test_a_guard_that_gives_no_number_is_refused(tokenizer, tmp_path: Path) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    guard.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(SelectionError, match="expected a finite score and gradient"):
        GuardScorer(guard, own, tokenizer, PROFILE).score("x", encode(tokenizer, "y"))


@pytest.mark.parametrize("objective", [JudgedObjective, PublishedObjective])
def test_a_request_without_an_answer_is_refused_by_name(objective: type) -> None:
    answers = [Answered("Tell\nme", Example((1, 2), ()))]
    arguments = (None, answers, 0) if objective is JudgedObjective else (None,) * 4 + (answers,)
    with pytest.raises(SelectionError, match="request 'Tell me': expected an answer of the model"):
        objective(*arguments)


def test_the_published_arithmetic_is_that_written_out_step_by_step(
    model, tokenizer, answers, tmp_path: Path
) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    objective = PublishedObjective(guard, own, tokenizer, "s", answers, seed=5)
    found = accumulate_gradients(model, eligible_parameters(model), objective)
    embeddings = guard.get_input_embeddings().weight.detach()
    total = torch.zeros(())
    parameters = eligible_parameters(model)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for place, ((_, text), answered) in enumerate(zip(CONVERSATIONS, answers, strict=True)):
        read = encode(own, text.strip())
        saturated = torch.full((len(read), len(own)), -17.0)
        for u, token in enumerate(read):
            saturated[u, token] = 0
        saturated.requires_grad_(True)
        before = encode(own, "<|im_start|>user\n")
        after = encode(own, "<|im_end|>\n<|im_start|>assistant\n")
        rows = [embeddings[[*before]], saturated.softmax(-1) @ embeddings, embeddings[[*after]]]
        logits = guard(inputs_embeds=torch.cat(rows)[None]).logits[0, -1]
        (g,) = torch.autograd.grad(-logits[encode(own, "s")[0]], saturated)
        h = torch.zeros(len(read), len(tokenizer))
        for token, string in enumerate(own.convert_ids_to_tokens(list(range(len(own))))):
            pieces = encode(tokenizer, string.replace("_", " "))
            for piece in pieces:
                h[:, piece] += g[:, token] / len(pieces)
        ids = torch.tensor([answered.example.prompt_ids + answered.example.answer_ids])
        z = model(ids).logits[0, len(answered.example.prompt_ids) - 1 : -2]
        with torch.random.fork_rng():
            torch.manual_seed(5 + place)
            p = F.gumbel_softmax(z, tau=0.3)
        both = min(len(h), len(p))
        total = total - (h[:both] * p[:both]).sum()
    expected = torch.autograd.grad(total, list(parameters.values()))
    for (name, gradient), twin in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-3, atol=1e-9, msg=name)
