"""One LoRA layer is corrected at frozen entries, and nothing as large as its weight is made."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from safeweights_peft.freeze import FrozenEntries
from safeweights_peft.training.lora import (
    FrozenLayer,
    FrozenPattern,
    LoraCorrection,
    find_frozen_layers,
)
from tests.training.twins import config, masked_delta


@contextmanager
def corrected(layer: LoraLinear, indices: Tensor) -> Iterator[None]:
    """Correct a layer by itself."""
    pattern = FrozenPattern.build(indices, tuple(layer.base_layer.weight.shape))
    correction = LoraCorrection(FrozenLayer("layer", layer, pattern))
    correction.attach()
    yield
    correction.detach()


@pytest.fixture(params=[torch.int32, torch.int64])
def indices(request: pytest.FixtureRequest) -> Tensor:
    """The first and the last entry of 40 x 60, and some rows and columns without any."""
    return torch.tensor([0, 1, 59, 60, 777, 1200, 1201, 2399], dtype=request.param)


@pytest.fixture
def layer() -> LoraLinear:
    torch.manual_seed(0)
    return LoraLinear(nn.Linear(60, 40), "default", config(), r=3)


@pytest.mark.parametrize("shape", [(60,), (1, 60), (7, 60), (2, 3, 60), (0, 60)])
def test_inputs_of_any_shape_and_rows_without_entries_are_no_exception(
    shape: tuple[int, ...], indices: Tensor, layer: LoraLinear
) -> None:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask.view(-1)[indices.long()] = True
    input = torch.randn(shape)
    expected = layer.base_layer(input) + F.linear(input, masked_delta(layer, "default", mask))
    with corrected(layer, indices):
        torch.testing.assert_close(layer(input), expected)


def test_a_weight_that_is_stored_the_other_way_round_is_corrected_alike(
    indices: Tensor, layer: LoraLinear
) -> None:
    base = Conv1D(40, 60)  # as in GPT-2
    base.weight.data, base.bias.data = layer.base_layer.weight.data.T, layer.base_layer.bias.data
    turned = LoraLinear(base, "default", config(fan_in_fan_out=True), r=3, fan_in_fan_out=True)
    turned.load_state_dict(
        {name: tensor for name, tensor in layer.state_dict().items() if "lora" in name},
        strict=False,
    )
    rows, columns = indices.long() // 60, indices.long() % 60
    stored = (columns * 40 + rows).sort().values.to(indices.dtype)
    model = nn.Sequential(turned)
    (frozen,) = find_frozen_layers(model, [FrozenEntries("0.weight", base.weight, stored)])
    with corrected(layer, indices):
        expected = layer(torch.eye(60))
    correction = LoraCorrection(frozen)
    correction.attach()
    torch.testing.assert_close(turned(torch.eye(60)), expected)
    correction.detach()
    moved = turned.get_delta_weight("default").reshape(-1)[stored.long()]
    torch.testing.assert_close(frozen.part_of("default"), moved)


class LargestResult(TorchDispatchMode):
    """Note the size of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_sparse_csr:
            self.largest = max(self.largest, result.numel())
        return result


def test_no_operation_makes_a_tensor_as_large_as_the_weight(
    indices: Tensor, layer: LoraLinear
) -> None:
    input = torch.randn(2, 60, requires_grad=True)
    with corrected(layer, indices), LargestResult() as seen:
        layer.lora_B["default"](layer.lora_A["default"](input)).sum().backward()
    assert input.grad is not None
    assert 0 < seen.largest < 40 * 60 / 4


@pytest.mark.parametrize(("dtype", "expected"), [(torch.int32, 8), (torch.int64, 16)])
def test_a_correction_holds_eight_bytes_per_entry_and_four_per_row_and_column(
    dtype: torch.dtype, expected: int
) -> None:
    indices = torch.arange(0, 1_000_000, 100, dtype=dtype)
    pattern = FrozenPattern.build(indices, (500, 2000))
    parts = [
        part
        for matrix in (pattern.by_row, pattern.by_column)
        for part in (matrix.crow_indices(), matrix.col_indices(), matrix.values())
    ]
    storages = [part.untyped_storage() for part in parts]
    size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert size <= expected * len(indices) + expected / 2 * (500 + 2000 + 2) + 2 * 4
