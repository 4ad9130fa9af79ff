"""A trained linear weight's gradient is computed at the selected entries alone, and is right.

The oracle is autograd's dense gradient, gathered.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from safeweights_peft.tuner.layer import layers
from safeweights_peft.tuner.sampled import DENSEST, SampledWeight, can_sample
from tests.tuner.patches import INPUT_IDS, load_base, patch_model, values_of

OUT, IN = 40, 60
SELECTED = (0, 1, 59, 60, 777, 1200, 1201, 2399)  # the first and last entry, and empty rows


class LargestResult(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_sparse_csr:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture(params=[torch.int32, torch.int64])
def sampled(request) -> SampledWeight:
    torch.manual_seed(0)
    weight, indices = torch.randn(OUT, IN), torch.tensor(SELECTED, dtype=request.param)
    entries = weight.flatten()[indices.long()].requires_grad_()
    return SampledWeight.of(weight, entries, indices, object())


def dense_gradients(sampled, input, bias=None):
    weight = sampled.as_subclass(torch.Tensor).detach().requires_grad_()
    leaf = input.detach().requires_grad_()
    output = F.linear(leaf, weight, bias)
    output.square().sum().backward()
    return output, weight.grad.flatten()[list(SELECTED)], leaf.grad


@pytest.mark.parametrize("shape", [(7, IN), (3, 5, IN), (IN,), (1, IN), (0, IN)])
def test_gradients_are_the_dense_ones_gathered(sampled, shape):
    input = torch.randn(shape, requires_grad=True)
    output = F.linear(input, sampled)
    output.square().sum().backward()
    expected, at_entries, at_input = dense_gradients(sampled, input)
    assert torch.equal(output, expected)
    torch.testing.assert_close(sampled.entries.grad, at_entries)
    assert torch.equal(input.grad, at_input)


def test_tokens_that_nothing_is_learned_from_change_no_gradient(sampled):
    input = torch.randn(3, 5, IN, requires_grad=True)
    used = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    F.linear(input, sampled)[used].square().sum().backward()
    _, at_entries, at_input = dense_gradients(sampled, input[used])
    torch.testing.assert_close(sampled.entries.grad, at_entries)
    torch.testing.assert_close(input.grad[used], at_input)
    assert not input.grad[~used].any()


def test_a_bias_is_added_and_gets_its_gradient(sampled):
    input, bias = torch.randn(4, 5, IN), torch.randn(OUT, requires_grad=True)
    F.linear(input, sampled, bias=bias).square().sum().backward()
    twin = bias.detach().requires_grad_()
    _, at_entries, _ = dense_gradients(sampled, input, twin)
    torch.testing.assert_close(sampled.entries.grad, at_entries)
    torch.testing.assert_close(bias.grad, twin.grad)


def test_no_operation_of_the_backward_pass_is_as_large_as_the_weight(sampled):
    loss = F.linear(torch.randn(2, IN), sampled).sum()
    with LargestResult() as seen:
        loss.backward()
    assert 0 < seen.largest < OUT * IN


def test_any_other_function_sees_the_plain_weight(sampled):
    assert type(sampled + 1) is torch.Tensor
    assert torch.equal(sampled @ torch.eye(IN), sampled.as_subclass(torch.Tensor))


def test_under_autocast_a_linear_layer_is_computed_in_the_lower_precision(sampled):
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.randn(2, IN), sampled).dtype is torch.bfloat16


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
    gradients = []
    for densest in (1.0, 0.0):
        monkeypatch.setattr("safeweights_peft.tuner.sampled.DENSEST", densest)
        model = patch_model(load_base(tiny_llama), tiny_llama).train()
        used = [type(layer._weight(layer.selected["weight"])) for layer in _linear_layers(model)]
        assert {kind is SampledWeight for kind in used} == {densest == 1.0}
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        gradients.append({name: values.grad for name, values in values_of(model).items()})
    for name, sampled in gradients[0].items():
        torch.testing.assert_close(sampled, gradients[1][name], msg=name)


def _linear_layers(model):
    return [layer for layer in layers(model) if isinstance(layer.base_layer, nn.Linear)]
