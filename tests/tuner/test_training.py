"""Values are ordinary parameters: the Trainer trains, saves and resumes them; compiling works."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from safeweights_peft import CorruptAdapterError, round_values, validate, verify
from safeweights_peft.tuner.adapter import saving_checkpoints
from tests.tuner.patches import (
    INPUT_IDS,
    load_base,
    load_by_peft,
    logits,
    patch_model,
    save_patch,
    twin,
    values_of,
)


class Rows(Dataset):
    """Eight rows of fixed tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        row = (INPUT_IDS[0] + number) % 250
        return {"input_ids": row, "labels": row}


def train(model, out, steps, resume=None):
    arguments = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_trains_the_values_and_leaves_the_base(tiny_tied_llama, tmp_path):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    before = {name: tensor.detach().clone() for name, tensor in values_of(model).items()}
    train(model, tmp_path, steps=3).save_model(tmp_path / "final")
    assert not any(torch.equal(tensor, before[name]) for name, tensor in values_of(model).items())
    model.eval()
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(tiny_tied_llama)))
    validate(tmp_path / "final")
    assert torch.equal(logits(load_by_peft(tiny_tied_llama, tmp_path / "final")), trained)


def test_a_resumed_training_is_the_uninterrupted_one(tiny_llama, tmp_path):
    straight = patch_model(load_base(tiny_llama), tiny_llama)
    train(straight, tmp_path / "straight", steps=4)
    resumed = patch_model(load_base(tiny_llama), tiny_llama)
    halfway = str(tmp_path / "straight" / "checkpoint-2")
    train(resumed, tmp_path / "resumed", steps=4, resume=halfway)
    for name, values in values_of(straight).items():
        assert torch.equal(values, values_of(resumed)[name]), name


def test_a_checkpoint_digests_nothing_and_a_patch_that_is_saved_later_is_right(
    tiny_llama, monkeypatch, tmp_path
):
    model = patch_model(load_base(tiny_llama), tiny_llama, values_dtype="bfloat16")
    hashed = []

    def sha256(*content):
        hashed.append(content)
        return hashlib.sha256(*content)

    monkeypatch.setattr("safeweights_peft.delta.hashlib", SimpleNamespace(sha256=sha256))
    with saving_checkpoints(model):
        train(model, tmp_path, steps=4)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    assert not hashed
    model.eval()
    round_values(model)
    model.save_pretrained(tmp_path / "patch")
    assert hashed
    assert verify(tmp_path / "patch", tiny_llama).ok
    assert torch.equal(logits(load_by_peft(tiny_llama, tmp_path / "patch")), logits(model))


def test_a_training_resumes_from_a_checkpoint_without_digests_bit_by_bit(tiny_llama, tmp_path):
    straight = patch_model(load_base(tiny_llama), tiny_llama, values_dtype="bfloat16")
    resumed = patch_model(load_base(tiny_llama), tiny_llama, values_dtype="bfloat16")
    with saving_checkpoints(straight):
        train(straight, tmp_path / "straight", steps=4)
    halfway = str(tmp_path / "straight" / "checkpoint-2")
    with saving_checkpoints(resumed):
        train(resumed, tmp_path / "resumed", steps=4, resume=halfway)
    for name, values in values_of(straight).items():
        assert torch.equal(values, values_of(resumed)[name]), name


def test_a_checkpoint_without_digests_is_not_taken_for_a_patch(tiny_llama, tmp_path):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with saving_checkpoints(model):
        model.save_pretrained(tmp_path)
    with pytest.raises(CorruptAdapterError, match="expected a digest and a base_digest, found nul"):
        load_by_peft(tiny_llama, tmp_path)


def test_accumulated_gradients_are_those_of_the_larger_batch(tiny_llama):
    whole = patch_model(load_base(tiny_llama), tiny_llama)
    parts = patch_model(load_base(tiny_llama), tiny_llama)
    whole(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    for row in INPUT_IDS.split(1):
        (parts(input_ids=row, labels=row).loss / 2).backward()
    for name, values in values_of(whole).items():
        assert torch.allclose(values.grad, values_of(parts)[name].grad, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache:UserWarning")
@pytest.mark.parametrize("name", ["tiny_tied_llama", "tiny_mixtral"])
def test_a_compiled_model_is_one_graph_with_the_same_output(name, request, tmp_path):
    base = request.getfixturevalue(name)
    patch = save_patch(base, tmp_path / "patch")
    model = load_by_peft(base, patch)
    logits(model)  # an eager forward overwrites the base; the compiled one must notice
    with torch.no_grad():
        compiled = torch.compile(model.get_base_model(), backend="aot_eager")
        compiled(input_ids=INPUT_IDS)
        found = compiled(input_ids=INPUT_IDS).logits
    # Compiled kernels may sum in another order, so the oracle is compiled too.
    with torch.no_grad():
        dense = torch.compile(twin(base, patch), backend="aot_eager")
        expected = dense(input_ids=INPUT_IDS).logits
    assert torch.equal(found, expected)
    explanation = torch._dynamo.explain(model.get_base_model())(input_ids=INPUT_IDS)
    assert explanation.graph_break_count == 0


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_gradients(tiny_llama):
    eager = patch_model(load_base(tiny_llama), tiny_llama)
    model = patch_model(load_base(tiny_llama), tiny_llama)
    compiled = torch.compile(model, backend="aot_eager")
    for network in (eager, compiled):
        network(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    for name, values in values_of(eager).items():
        assert torch.allclose(values.grad, values_of(model)[name].grad, atol=1e-6), name
