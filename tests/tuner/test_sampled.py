"""A trained linear weight's gradient is computed at the selected entries alone, and is right.

The oracle is autograd's dense gradient, gathered.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from safeweights_peft.tuner.layer import layers
from safeweights_peft.tuner.sampled import DENSEST, can_sample, sampled_linear
from tests.tuner.patches import INPUT_IDS, load_base, patch_model, values_of

OUT, IN = 40, 60
SELECTED = (0, 1, 59, 60, 777, 1200, 1201, 2399)  # the first and last entry, and empty rows


class Sampled(NamedTuple):
    """A weight, some of whose entries are trained."""

    weight: Tensor
    indices: Tensor
    entries: Tensor

    def linear(self, input, bias=None):
        mark = torch.empty(0)
        return sampled_linear(input, self.entries, bias, self.weight, self.indices, mark)


class LargestResult(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_sparse_csr:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture(params=[torch.int32, torch.int64])
def sampled(request) -> Sampled:
    torch.manual_seed(0)
    weight, indices = torch.randn(OUT, IN), torch.tensor(SELECTED, dtype=request.param)
    return Sampled(weight, indices, weight.flatten()[indices.long()].requires_grad_())


def dense_gradients(sampled, input, bias=None):
    weight = sampled.weight.detach().requires_grad_()
    leaf = input.detach().requires_grad_()
    output = F.linear(leaf, weight, bias)
    output.square().sum().backward()
    return output, weight.grad.flatten()[list(SELECTED)], leaf.grad


@pytest.mark.parametrize("shape", [(7, IN), (3, 5, IN), (IN,), (1, IN), (0, IN)])
def test_gradients_are_the_dense_ones_gathered(sampled, shape):
    input = torch.randn(shape, requires_grad=True)
    output = sampled.linear(input)
    output.square().sum().backward()
    expected, at_entries, at_input = dense_gradients(sampled, input)
    assert torch.equal(output, expected)
    torch.testing.assert_close(sampled.entries.grad, at_entries)
    assert torch.equal(input.grad, at_input)


def test_tokens_that_nothing_is_learned_from_change_no_gradient(sampled):
    input = torch.randn(3, 5, IN, requires_grad=True)
    used = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    sampled.linear(input)[used].square().sum().backward()
    _, at_entries, at_input = dense_gradients(sampled, input[used])
    torch.testing.assert_close(sampled.entries.grad, at_entries)
    torch.testing.assert_close(input.grad[used], at_input)
    assert not input.grad[~used].any()


def test_a_bias_is_added_and_gets_its_gradient(sampled):
    input, bias = torch.randn(4, 5, IN), torch.randn(OUT, requires_grad=True)
    sampled.linear(input, bias).square().sum().backward()
    twin = bias.detach().requires_grad_()
    _, at_entries, _ = dense_gradients(sampled, input, twin)
    torch.testing.assert_close(sampled.entries.grad, at_entries)
    torch.testing.assert_close(bias.grad, twin.grad)


def test_no_operation_of_the_backward_pass_is_as_large_as_the_weight(sampled):
    loss = sampled.linear(torch.randn(2, IN)).sum()
    with LargestResult() as seen:
        loss.backward()
    assert 0 < seen.largest < OUT * IN


def test_a_weight_that_was_written_since_is_refused(sampled):
    loss = sampled.linear(torch.randn(2, IN, requires_grad=True)).sum()
    sampled.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("weight", "count", "expected"),
    [
        (torch.zeros(10, 100), round(DENSEST * 1000), True),
        (torch.zeros(10, 100), round(DENSEST * 1000) + 1, False),
        (torch.zeros(1000), 1, False),
        (torch.zeros(10, 10, 10), 1, False),
        (torch.zeros(10, 100, dtype=torch.bfloat16), 1, False),
        (torch.zeros(10, 100, device="meta"), 1, False),
    ],
)
def test_only_few_entries_of_a_float32_matrix_on_the_cpu_are_sampled(weight, count, expected):
    assert can_sample(weight, count) is expected


def test_a_patch_of_few_entries_trains_as_one_whose_gradients_are_dense(tiny_llama, monkeypatch):
    gradients, calls = [], []

    def spy(*arguments):
        calls.append(arguments)
        return sampled_linear(*arguments)

    monkeypatch.setattr("safeweights_peft.tuner.patched.sampled_linear", spy)
    for densest, count in ((1.0, 15), (0.0, 0)):
        monkeypatch.setattr("safeweights_peft.tuner.sampled.DENSEST", densest)
        model = patch_model(load_base(tiny_llama), tiny_llama).train()
        calls.clear()
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        assert len(calls) == count
        gradients.append({name: values.grad for name, values in values_of(model).items()})
    for name, sampled in gradients[0].items():
        torch.testing.assert_close(sampled, gradients[1][name], msg=name)


@pytest.mark.parametrize("function", [torch.matmul, torch.add, torch.mul])
def test_any_other_function_gives_the_dense_gradient_gathered(tiny_llama, function):
    model = patch_model(load_base(tiny_llama), tiny_llama).train()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.weight
    layer = layers(model)[1]
    assert weight is layer.parameter
    function(weight, weight.T).square().sum().backward()
    leaf = weight.data.clone().requires_grad_()
    function(leaf, leaf.T).square().sum().backward()
    expected = leaf.grad.flatten()[layer.indices["default"].long()]
    torch.testing.assert_close(layer["default"].grad, expected)


def test_under_autocast_a_linear_layer_is_computed_in_the_lower_precision(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.get_base_model().lm_head(torch.randn(2, 32))
    assert output.dtype is torch.bfloat16
    output.sum().backward()
    assert values_of(model)["lm_head.weight"].grad is not None
