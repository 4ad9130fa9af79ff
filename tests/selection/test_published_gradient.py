"""The script that compares the published code's gradient with ours: its arithmetic, and a run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from safeweights_peft.chat import Chat
from safeweights_peft.data import Example
from safeweights_peft.modeling.layout import eligible_parameters
from safeweights_peft.selection import transfer
from safeweights_peft.selection.objective import Answered
from safeweights_peft.selection.scores import sum_gradients
from tests.tiny_guards import save_byte_level_tokenizer, save_tiny_guard

SOURCE = Path(__file__).parents[2] / "benchmarks" / "published_gradient.py"
CONVERSATIONS = [("Steal the car.", "the safe can"), ("Lie.", " no thanks, I can't")]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_gradient", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_script_prints_how_far_both_gradients_agree(
    script: ModuleType,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(transfer, "CACHE_DIR", tmp_path / "cache")
    guard = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"safe": ["s"], "unsafe": ["u"], "cue": "\n"}))
    options = ["--guard", str(guard), "--guard-profile", str(profile), "--examples", "3"]
    monkeypatch.setattr(sys, "argv", [str(SOURCE), str(tiny_llama), *options])
    script.main()
    answers, cosine, _, chance = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (answers, chance) == ("3", "1.0%")
    assert -1 <= float(cosine) <= 1


def test_the_published_arithmetic_is_that_written_out_step_by_step(
    script: ModuleType, tiny_llama: Path, tmp_path: Path
) -> None:
    path = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    guard, own = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    answers = [
        Answered(request, Example(Chat(tokenizer).encode_prompt(request), encode(tokenizer, text)))
        for request, text in CONVERSATIONS
    ]
    objective = script.PublishedObjective(guard, own, tokenizer, "s", answers, seed=5)
    actual = sum_gradients(model, eligible_parameters(model), objective)
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
    for (name, gradient), twin in zip(actual.items(), expected, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-3, atol=1e-9, msg=name)
