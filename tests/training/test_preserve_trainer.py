"""SPA in trainers: a map's entries keep their bits, and a run can be broken off and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from safeweights_peft import BaseMismatchError, SafetyPreservingCallback, UnsupportedFeatureError
from tests.training.maps import BATCHES, hooks, kept, load, make_map, make_sft_trainer, moved, same
from tests.training.twins import adapted

ROWS = [{"input_ids": row, "labels": row} for row in BATCHES.flatten(0, 1)]


def arguments(out: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 6,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(out), **defaults | options)


def make_trainer(
    model: nn.Module, callback: SafetyPreservingCallback, out: Path, **options: Any
) -> Trainer:
    trainer = Trainer(
        model=model, args=arguments(out, **options), train_dataset=ROWS, callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_a_trainer_moves_no_entry_of_the_map(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    before = hooks(model)
    make_trainer(model, SafetyPreservingCallback(safety_map), tmp_path).train()
    assert kept(model, tiny_llama, safety_map)
    assert kept(load(tmp_path / "checkpoint-3"), tiny_llama, safety_map)
    assert moved(model, tiny_llama)
    assert hooks(model) == before


def test_after_a_training_by_lora_a_warning_says_that_the_adapter_needs_a_correction(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SafetyPreservingCallback(make_map(tiny_llama))
    make_trainer(adapted(tiny_llama), callback, tmp_path).train()
    assert "runs as plain LoRA again, which moves frozen entries" in caplog.text
    caplog.clear()
    make_trainer(load(tiny_llama), callback, tmp_path / "full").train()
    assert "plain LoRA" not in caplog.text


def test_a_resumed_training_ends_bitwise_like_a_straight_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map, straight, resumed = make_map(tiny_llama), load(tiny_llama), load(tiny_llama)
    make_trainer(straight, SafetyPreservingCallback(safety_map), tmp_path).train()
    trainer = make_trainer(resumed, SafetyPreservingCallback(safety_map), tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(resumed.state_dict(), straight.state_dict())
    assert kept(resumed, tiny_llama, safety_map)


def test_momentum_in_a_checkpoint_moves_no_entry_of_the_map(
    tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    make_trainer(load(tiny_llama), SafetyPreservingCallback(safety_map), tmp_path).train()
    checkpoint = tmp_path / "checkpoint-3"
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for state in stored["state"].values():
        state["exp_avg"] += 1.0
    torch.save(stored, checkpoint / "optimizer.pt")
    trainer = make_trainer(model, SafetyPreservingCallback(safety_map), tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert kept(model, tiny_llama, safety_map)
    assert kept(load(tmp_path / "checkpoint-6"), tiny_llama, safety_map)


def test_after_a_broken_training_the_next_one_replaces_the_hooks(
    tiny_llama: Path, tmp_path: Path
) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    before, callback = hooks(model), SafetyPreservingCallback(safety_map)
    broken = make_trainer(model, callback, tmp_path)
    broken.data_collator = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.train()
    assert hooks(model) > before
    make_trainer(model, callback, tmp_path).train()
    assert kept(model, tiny_llama, safety_map)
    assert hooks(model) == before


def test_detaching_after_a_broken_training_removes_the_hooks(tiny_llama: Path) -> None:
    model, callback = load(tiny_llama), SafetyPreservingCallback(make_map(tiny_llama))
    before = hooks(model)
    callback.on_train_begin(arguments(tiny_llama), TrainerState(), TrainerControl(), model=model)
    assert hooks(model) > before
    callback.detach()
    assert hooks(model) == before


@pytest.mark.slow
def test_a_trl_trainer_moves_no_entry_of_the_map(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    trainer = make_sft_trainer(model, tmp_path, [SafetyPreservingCallback(safety_map)])
    trainer.train()
    assert kept(model, tiny_llama, safety_map)
    assert moved(model, tiny_llama)


def test_a_trainer_with_deepspeed_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    args, model = arguments(tmp_path), load(tiny_llama)
    args.deepspeed_plugin = object()
    before, callback = hooks(model), SafetyPreservingCallback(make_map(tiny_llama))
    with pytest.raises(UnsupportedFeatureError, match=r"found DeepSpeed, .*; train it whole"):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    assert hooks(model) == before


def test_resuming_a_run_that_moved_the_entries_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    callback = SafetyPreservingCallback(make_map(tiny_llama))
    unprotected = make_trainer(load(tiny_llama), callback, tmp_path)
    unprotected.remove_callback(callback)
    unprotected.train()
    trainer = make_trainer(load(tiny_llama), callback, tmp_path)
    with pytest.raises(
        BaseMismatchError, match="expected the base that the safety map was made for"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
