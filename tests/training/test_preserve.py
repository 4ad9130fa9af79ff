"""SPA in any loop: a safety map's entries keep their bits while everything else trains."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import AdamW

from safeweights_peft import SafetyMap, preserve, write_map
from tests.tiny_jobs import Interrupted
from tests.training.maps import (
    BATCHES,
    DOWN,
    UP,
    entries,
    hooks,
    kept,
    load,
    make_map,
    moved,
    same,
    train,
)
from tests.two_processes import run_in_two_processes


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama"])
def test_a_maps_entries_keep_their_bits_while_the_rest_trains(
    base: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(base)
    safety_map, model = make_map(path), load(path)
    with preserve(model, safety_map):
        train(model)
        assert kept(model, path, safety_map)
    assert kept(model, path, safety_map)
    assert moved(model, path)


def test_a_map_may_be_given_as_its_directory(tiny_llama: Path, tmp_path: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    write_map(tmp_path / "map", safety_map)
    with preserve(model, tmp_path / "map"):
        train(model)
    assert kept(model, tiny_llama, safety_map)


def test_a_base_in_float32_may_be_trained_under_a_map_of_its_bfloat16_checkpoint(
    tiny_llama_bf16: Path,
) -> None:
    safety_map, model = make_map(tiny_llama_bf16), load(tiny_llama_bf16, dtype=torch.float32)
    before = entries(model, safety_map)
    with preserve(model, safety_map):
        train(model)
    assert same(entries(model, safety_map), before)


def test_a_parameter_tied_in_memory_is_found_by_both_names(tiny_tied_llama: Path) -> None:
    safety_map, model = make_map(tiny_tied_llama), load(tiny_tied_llama)
    for part in (safety_map.indices, safety_map.scores, safety_map.metadata.tensors):
        part["lm_head.weight"] = part["model.embed_tokens.weight"]
    with preserve(model, safety_map):
        train(model)
    assert kept(model, tiny_tied_llama, safety_map)


@pytest.mark.parametrize("wrap", [DataParallel, compiled])
def test_parameters_are_found_under_a_wrapper(wrap: Any, tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    with preserve(wrap(model), safety_map):
        train(model)
        assert kept(model, tiny_llama, safety_map)


def test_parameters_are_found_where_single_layers_are_compiled(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    model.model.layers[0] = compiled(model.model.layers[0])
    with preserve(model, safety_map):
        optimizer = AdamW(model.parameters(), lr=0.01)
        model.get_parameter(UP.replace("0.", "0._orig_mod.")).grad = torch.ones(48, 32)
        optimizer.step()
    model.model.layers[0] = model.model.layers[0]._orig_mod
    assert kept(model, tiny_llama, safety_map)


def test_two_maps_on_one_model_keep_the_entries_of_both(tiny_llama: Path) -> None:
    outer, inner, model = make_map(tiny_llama), make_map(tiny_llama, seed=1), load(tiny_llama)
    with preserve(model, outer):
        with preserve(model, inner):
            train(model)
        assert kept(model, tiny_llama, inner)
        train(model)
    assert not kept(model, tiny_llama, inner)
    assert kept(model, tiny_llama, outer)


def test_an_accelerate_loop_moves_no_entry_of_the_map(tiny_llama: Path) -> None:
    safety_map, accelerator = make_map(tiny_llama), Accelerator(cpu=True)
    base = load(tiny_llama)
    model, optimizer = accelerator.prepare(base, AdamW(base.parameters(), lr=0.01))
    with preserve(model, safety_map):
        for rows in BATCHES[:5]:
            accelerator.backward(model(input_ids=rows, labels=rows).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert kept(base, tiny_llama, safety_map)
    assert moved(base, tiny_llama)


def test_all_hooks_are_gone_at_the_end(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    before = hooks(model)
    with preserve(model, make_map(tiny_llama)):
        assert hooks(model) > before
    assert hooks(model) == before


def break_off(model: nn.Module) -> None:
    """Fail in the middle of a step, when entries have moved already."""
    model.get_parameter(UP).data.zero_()
    raise Interrupted


def test_after_an_exception_the_entries_are_back_and_all_hooks_are_gone(tiny_llama: Path) -> None:
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    before = hooks(model)
    with pytest.raises(Interrupted), preserve(model, safety_map):
        break_off(model)
    assert hooks(model) == before
    assert kept(model, tiny_llama, safety_map)


def test_parameters_that_are_not_trained_are_counted_in_a_warning(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_llama)
    model.get_parameter(DOWN).requires_grad_(False)
    with caplog.at_level(logging.WARNING), preserve(model, make_map(tiny_llama, [UP, DOWN])):
        train(model)
    (record,) = caplog.records
    assert record.message.startswith(f"{DOWN}: expected a parameter that requires gradients")
    assert "1 of the safety map's 2 parameters" in record.message


def work(rank: int, base: Path, folder: Path, safety_map: SafetyMap) -> None:
    model = load(base)
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.1)
    with preserve(wrapped, safety_map):
        for rows in BATCHES[:5]:
            half = rows[rank : rank + 1]
            wrapped(input_ids=half, labels=half).loss.backward()
            for name, indices in safety_map.indices.items():
                gradient = model.get_parameter(name).grad.flatten()
                assert (gradient[torch.from_numpy(indices)] == 0).all(), name
            optimizer.step()
            optimizer.zero_grad()
    torch.save(model.state_dict(), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_move_no_entry_of_the_map_and_reduce_zeros_for_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    # A gradient cleared after the reduction would be back at the end of the backward pass.
    safety_map, model = make_map(tiny_llama), load(tiny_llama)
    run_in_two_processes(work, tmp_path, tiny_llama, tmp_path, safety_map)
    first, second = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (0, 1))
    assert same(first, second)
    model.load_state_dict(first)
    assert kept(model, tiny_llama, safety_map)
    assert moved(model, tiny_llama)
