"""What a user of PEFT expects in Python: jobs as functions, and a config for any trainer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import safeweights_peft
from safeweights_peft import (
    BaseMismatchError,
    ModelError,
    SafeWeightsConfig,
    Verdict,
    read_adapter,
    read_map,
    verify,
)
from tests.tiny_jobs import Requests


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Requests:
    return Requests(tmp_path_factory.mktemp("requests"))


@pytest.fixture
def map_dir(tiny_llama: Path, requests: Requests, tmp_path: Path) -> str:
    safeweights_peft.score(str(tiny_llama), str(tmp_path / "map"), requests.score())
    return str(tmp_path / "map")


def load(base: Path) -> tuple[torch.nn.Module, object]:
    return AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)


def test_a_model_in_memory_gives_the_map_and_the_patch_that_its_directory_gives(
    tiny_llama: Path, requests: Requests, map_dir: str, tmp_path: Path
) -> None:
    model, tokenizer = load(tiny_llama)
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    safeweights_peft.score(model, tmp_path / "again", requests.score(), tokenizer=tokenizer)
    found, expected = read_map(tmp_path / "again"), read_map(map_dir)
    assert found.metadata.tensors == expected.metadata.tensors
    for base, out in ((model, "mine"), (str(tiny_llama), "plain")):
        safeweights_peft.train(
            *(base, map_dir, tmp_path / out, requests.train()),
            tokenizer=tokenizer if base is model else None,
        )
    mine, plain = (read_adapter(tmp_path / name) for name in ("mine", "plain"))
    assert mine.metadata.content_id == plain.metadata.content_id
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_in_memory_is_evaluated_with_a_judge_of_ones_own(
    tiny_llama: Path, requests: Requests
) -> None:
    def always(request: str, answer: str) -> Verdict:
        return Verdict.REFUSED

    model, tokenizer = load(tiny_llama)
    settings = requests.evaluate()
    found = safeweights_peft.evaluate(
        model, settings=settings, judges=[always], tokenizer=tokenizer
    )
    assert found["harmful"]["attack_success_rate"]["rate"] == 0
    assert found["benign"]["over_refusal_rate"]["rate"] == 1
    plain = safeweights_peft.evaluate(str(tiny_llama), settings=settings)
    assert found["utility"] == plain["utility"]


def test_a_run_of_a_model_in_memory_is_the_run_of_its_directory(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    model, tokenizer = load(tiny_llama)
    settings = requests.run(tiny_llama, steps=2)
    mine = safeweights_peft.enhance(model, str(tmp_path / "mine"), settings, tokenizer=tokenizer)
    plain = safeweights_peft.enhance(str(tiny_llama), tmp_path / "plain", settings)
    assert mine["content_id"] == plain["content_id"]
    assert mine["after"] == plain["after"]


@pytest.mark.parametrize("fault", ["no tokenizer", "no name", "other weights"])
def test_a_model_that_results_could_not_name_is_refused(
    fault: str, tiny_llama: Path, requests: Requests
) -> None:
    model, tokenizer = load(tiny_llama)
    expected = {
        "no tokenizer": "expected the tokenizer of a model in memory",
        "no name": "found one without a name; save_pretrained and load it",
        "other weights": "from where the model was loaded, found others; save it",
    }[fault]
    if fault == "no name":
        model.name_or_path = ""
    elif fault == "other weights":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += 1
    tokenizer = None if fault == "no tokenizer" else tokenizer
    with pytest.raises(ModelError, match=expected):
        safeweights_peft.evaluate(model, settings=requests.evaluate(), tokenizer=tokenizer)


# --- one's own trainer -------------------------------------------------------------------------


def check_saved(model: PeftModel, base: Path, map_dir: str, out: Path) -> None:
    """Checks that a trained patch changes the map's entries alone, loads and verifies."""
    model.save_pretrained(out)
    patch, safety_map = read_adapter(out), read_map(map_dir)
    assert patch.indices.keys() == safety_map.indices.keys()
    for name, indices in safety_map.indices.items():
        assert np.array_equal(patch.indices[name], indices)
    assert any(delta.values.any() for delta in patch.deltas.values())
    # Without the merged model nothing can be said of it; nothing else may be amiss.
    assert not [check for check in verify(out, base).checks if check.verdict == "failed"]
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def arguments(out: Path) -> dict[str, object]:
    return {
        "output_dir": str(out),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }


def test_a_map_becomes_a_trainable_patch_for_any_trainer(
    tiny_llama: Path, map_dir: str, tmp_path: Path
) -> None:
    base, tokenizer = load(tiny_llama)
    model = get_peft_model(base, SafeWeightsConfig(map=map_dir))
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_llama)
    ids = tokenizer("No.")["input_ids"]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 6)
    Trainer(model, TrainingArguments(**arguments(tmp_path / "work")), train_dataset=rows).train()
    check_saved(model, tiny_llama, map_dir, tmp_path / "patch")


def test_a_map_of_another_base_and_a_config_without_a_map_are_refused(
    tiny_llama: Path, map_dir: str
) -> None:
    other, _ = load(tiny_llama)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 1
    with pytest.raises(BaseMismatchError):
        get_peft_model(other, SafeWeightsConfig(map=map_dir))
    plain, _ = load(tiny_llama)
    with pytest.raises(ModelError, match=r"give SafeWeightsConfig\(map=DIRECTORY\), or load a pat"):
        get_peft_model(plain, SafeWeightsConfig())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trains_a_map(kind: str, tiny_llama: Path, map_dir: str, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    base, tokenizer = load(tiny_llama)
    inputs = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        before = base(**inputs).logits
    config = SafeWeightsConfig(map=map_dir)
    options = {**arguments(tmp_path / "work"), "gradient_checkpointing": False, "bf16": False}
    row = {"prompt": "Break in", "chosen": " No.", "rejected": " Yes.", "completion": " No."}
    if kind == "sft":
        rows = Dataset.from_list([{k: row[k] for k in ("prompt", "completion")}] * 6)
        trainer = SFTTrainer(
            base,
            SFTConfig(**options),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=config,
        )
    else:
        rows = Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")}] * 6)
        trainer = DPOTrainer(
            base,
            args=DPOConfig(
                **arguments(tmp_path / "work"), gradient_checkpointing=False, bf16=False
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=config,
        )
    trainer.train()
    model = trainer.model
    with torch.no_grad(), model.disable_adapter():  # what DPO refers to
        assert torch.equal(model.eval()(**inputs).logits, before)
    check_saved(model, tiny_llama, map_dir, tmp_path / "patch")
