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

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example
from safeweights_peft.errors import SelectionError
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.selection import transfer
from safeweights_peft.selection.guards import GuardProfile
from safeweights_peft.selection.objective import (
    Answered,
    JudgedObjective,
    carry_to_logits,
    draw_gumbel_noise,
)
from safeweights_peft.selection.scores import sum_gradients
from safeweights_peft.selection.soft_judges import ClassifierJudge, GuardJudge, SoftJudge
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
        Answered(
            request, Example(Chat(tokenizer).encode_prompt(request), encode(tokenizer, answer))
        )
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
        """Draw the noise, and note the probabilities at theta."""
        self.noise, self.at_theta = [], []
        for place, answered in enumerate(answers):
            logits = self.logits(answered.example).detach()
            generator = JudgedObjective(None, answers, 0, seed=SEED)._generator(place)
            chosen = torch.tensor(answered.example.answer_ids)
            noise = [draw_gumbel_noise(logits.float(), chosen, generator) for _ in range(SAMPLES)]
            self.noise.append(noise)
            self.at_theta.append(self.soft(logits, noise))

    def soft(self, logits: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([F.softmax((logits + draw) / TEMPERATURE, -1) for draw in noise]).mean(0)

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


def check(model, twin: Twin, judge: SoftJudge, answers, before, after, read) -> None:
    """Hold the estimate, along itself and something random, to a central difference."""
    objective = JudgedObjective(judge, answers, 256, 2, TEMPERATURE, SAMPLES, SEED)
    gradients = sum_gradients(model.float(), eligible_parameters(model), objective)
    twin.model.double()
    twin.freeze(answers)
    value = twin.value(answers, before, after, read)
    assert objective.mean_safety == pytest.approx(value, rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    aside = {
        name: torch.randn(gradient.shape, generator=generator)
        for name, gradient in gradients.items()
    }
    direction = {name: unit(gradients)[name] + unit(aside)[name] for name in gradients}
    values = []
    for step in (STEP, -2 * STEP):
        for name, move in direction.items():
            twin.model.get_parameter(name).data += step * move
        values.append(twin.value(answers, before, after, read))
    actual = sum((gradients[name] * move).sum().item() for name, move in direction.items())
    assert actual == pytest.approx((values[0] - values[1]) / (2 * STEP), rel=1e-3)


def unit(vector: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    length = sum(tensor.square().sum() for tensor in vector.values()).sqrt()
    return {name: tensor / length for name, tensor in vector.items()}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_guards_gradient_is_that_of_finite_differences(
    model, tokenizer, answers, tmp_path: Path, kind: str
) -> None:
    path = save_tiny_guard(OTHERS[kind](tmp_path / "guard"))
    guard, guard_tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    judge = GuardJudge(guard, guard_tokenizer, tokenizer, PROFILE)
    labels = [encode(guard_tokenizer, label)[0] for label in "sux"]
    before = [f"<|im_start|>user\n{r}<|im_end|>\n<|im_start|>assistant\n" for r, _ in CONVERSATIONS]
    after = ["<|im_end|>\n<|im_start|>assistant\n\n"] * len(CONVERSATIONS)
    after = [text.removesuffix("\n\n") + "\n" for text in after]

    def read(logits: torch.Tensor) -> float:
        return logits[-1, labels].softmax(0)[0].item()

    twin_guard = AutoModelForCausalLM.from_pretrained(path)
    twin = Twin(model, tokenizer, twin_guard, guard_tokenizer)
    check(model, twin, judge, answers, before, after, read)


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_classifiers_gradient_is_that_of_finite_differences(
    model, tokenizer, answers, tmp_path: Path, kind: str, is_safe: bool
) -> None:
    path = save_tiny_classifier(OTHERS[kind](tmp_path / "classifier"), ["good", "bad", "odd"])
    load = AutoModelForSequenceClassification.from_pretrained
    classifier_tokenizer = AutoTokenizer.from_pretrained(path)
    judge = ClassifierJudge(load(path), classifier_tokenizer, tokenizer, "bad", is_safe)

    def read(logits: torch.Tensor) -> float:
        labelled = logits.softmax(0)[1].item()
        return labelled if is_safe else 1 - labelled

    twin = Twin(model, tokenizer, load(path), classifier_tokenizer)
    nothing = [""] * len(answers)
    check(model, twin, judge, answers, nothing, nothing, read)


def test_noise_and_gradient_do_not_hang_on_the_batch_size(
    model, tokenizer, answers, tmp_path: Path
) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    judge = GuardJudge(guard, own, tokenizer, PROFILE)
    first, second = (
        sum_gradients(model, eligible_parameters(model), JudgedObjective(judge, answers, 256, size))
        for size in (1, 2)
    )
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_guard_reads_the_request_too(tokenizer, tmp_path: Path) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    judge, ids = GuardJudge(guard, own, tokenizer, PROFILE), encode(tokenizer, "sure")
    assert judge.differentiate("Bake a cake", ids)[0] != judge.differentiate("Break a safe", ids)[0]


def test_a_guard_that_gives_no_number_is_refused(tokenizer, tmp_path: Path) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    guard.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(SelectionError, match="expected a finite score and gradient"):
        GuardJudge(guard, own, tokenizer, PROFILE).differentiate("x", encode(tokenizer, "y"))


def test_a_request_without_an_answer_is_refused_by_name() -> None:
    answers = [Answered("Tell\nme", Example((1, 2), ()))]
    with pytest.raises(SelectionError, match="request 'Tell me': expected an answer of the model"):
        JudgedObjective(None, answers, 0)


# --- soft tokens --------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_with_the_noise_the_chosen_tokens_have_the_largest_logits() -> None:
    logits = 5 * torch.randn(500, 11, generator=seeded())
    chosen = torch.randint(11, (500,), generator=seeded(1))
    noise = draw_gumbel_noise(logits, chosen, seeded(2))
    assert torch.equal((logits + noise).argmax(-1), chosen)


def test_over_choices_made_by_their_own_probability_the_noise_is_plain_gumbel_noise() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0]).expand(100_000, 4)
    chosen = torch.multinomial(logits[0].softmax(0), 100_000, replacement=True, generator=seeded())
    noise = draw_gumbel_noise(logits, chosen, seeded(1))
    euler_gamma, variance = 0.5772, torch.pi**2 / 6
    torch.testing.assert_close(noise.mean(0), torch.full((4,), euler_gamma), atol=0.02, rtol=0)
    torch.testing.assert_close(noise.var(0), torch.full((4,), variance), atol=0.04, rtol=0)
    covariance = torch.cov(noise.T) - torch.diag(noise.var(0))
    assert covariance.abs().max() < 0.03


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_give_finite_noise(scale: float) -> None:
    logits = scale * torch.tensor([[1.0, -1.0, 0.0]] * 50)
    for token in range(3):
        noise = draw_gumbel_noise(logits, torch.full((50,), token), seeded())
        assert noise.isfinite().all()


def test_the_gradient_is_that_of_the_softmax_written_out() -> None:
    logits = torch.randn(3, 7, generator=seeded(), requires_grad=True)
    chosen, derivative = torch.tensor([2, 0, 6]), torch.randn(3, 7, generator=seeded(1))
    carry_to_logits(logits, chosen, derivative, 0.5, 2, seeded(2)).backward()
    generator, expected = seeded(2), torch.zeros(3, 7)
    for _ in range(2):
        noise = draw_gumbel_noise(logits.detach(), chosen, generator)
        for t in range(3):
            p = ((logits.detach()[t] + noise[t]) / 0.5).softmax(0)
            jacobian = (torch.diag(p) - torch.outer(p, p)) / 0.5
            expected[t] += jacobian @ derivative[t] / 2
    torch.testing.assert_close(logits.grad, expected)
