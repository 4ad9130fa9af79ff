"""Two processes train as one: DDP in place, FSDP2 functionally (gloo, CPU)."""

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from safeweights_peft import UnsupportedFeatureError
from tests.tuner.patches import (
    INPUT_IDS,
    load_base,
    load_by_peft,
    logits,
    patch_model,
    save_patch,
    values_of,
)
from tests.two_processes import run_in_two_processes

pytestmark = pytest.mark.slow

ROWS = torch.cat([INPUT_IDS, INPUT_IDS + 1])


def step(model, rows):
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    return loss


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank, kind, base, results):
    model = patch_model(load_base(base), base).train()
    wrapped = DistributedDataParallel(model) if kind == "ddp" else sharded(model)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        step(wrapped, ROWS.chunk(2)[rank])
        optimizer.step()
        optimizer.zero_grad()
    values = {name: whole(tensor.detach()) for name, tensor in values_of(model).items()}
    if kind == "fsdp2":
        with pytest.raises(UnsupportedFeatureError, match="found sharded ones; pass the gathered"):
            model.save_pretrained(results.parent / "sharded")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(values, results)
        model.save_pretrained(results.parent / "patch", state_dict=state)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(tiny_llama, kind, tmp_path):
    results = tmp_path / "values.pt"
    run_in_two_processes(work, tmp_path, kind, tiny_llama, results)
    model = patch_model(load_base(tiny_llama), tiny_llama).train()
    optimizer = torch.optim.SGD(values_of(model).values(), lr=0.1)
    for _ in range(2):
        step(model, ROWS)
        optimizer.step()
        optimizer.zero_grad()
    found = torch.load(results, weights_only=True)
    for name, values in values_of(model).items():
        assert torch.allclose(values, found[name], atol=1e-6), name
    loaded = load_by_peft(tiny_llama, tmp_path / "patch")
    assert torch.allclose(logits(loaded), logits(model.eval()), atol=1e-4)


def hold(rank, base, patch):
    plain, model = load_base(base), load_by_peft(base, patch)
    merged = logits(model)
    sharded(model)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=INPUT_IDS).logits, merged, atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(model(input_ids=INPUT_IDS).logits, logits(plain), atol=1e-5)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        for name, weight in plain.state_dict().items():
            assert torch.equal(state[f"base_model.model.{name}"], weight), name
    with pytest.raises(UnsupportedFeatureError, match="a whole parameter to merge into, found a"):
        model.merge_adapter()
    early = load_by_peft(base, patch)
    early.merge_adapter()
    with pytest.raises(UnsupportedFeatureError, match="that is not merged to shard, found a merg"):
        sharded(early)


def test_a_sharded_model_saves_its_base_and_is_merged_in_the_checkpoint_only(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    run_in_two_processes(hold, tmp_path, tiny_llama, patch)
