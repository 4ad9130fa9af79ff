"""Whole rows and columns are trained by a small dense product, in any dtype, and it is right.

The oracle is autograd's dense gradient, gathered.
"""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from safeweights_peft.patch.groups import spread_groups
from safeweights_peft.tuner import parameter as parameter_module
from safeweights_peft.tuner import sampled
from safeweights_peft.tuner.layer import layers
from safeweights_peft.tuner.sampled import Lines, find_lines, sampled_linear
from tests.tuner.patches import INPUT_IDS, load_base, patch_model, values_of

OUT, IN = 40, 60
NUMBERS = {"row": [0, 7, 39], "column": [3, 59]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=["row", "column"])
def group(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def make(group, dtype=torch.float32, device="cpu"):
    """Make a weight, the flat indices of some rows or columns, and their entries."""
    torch.manual_seed(0)
    numbers = np.array(NUMBERS[group], np.int32)
    indices = torch.from_numpy(spread_groups(numbers, group, (OUT, IN))).to(device)
    weight = torch.randn(OUT, IN, device=device).to(dtype)
    entries = weight.flatten()[indices.long()].requires_grad_()
    lines = find_lines(indices, (OUT, IN))
    assert lines is not None
    assert lines.group == group
    assert lines.numbers.tolist() == NUMBERS[group]
    return weight, indices, entries, lines


def dense(weight, indices, input, bias, gradient):
    """Go back through a dense layer; gather the weight's gradient."""
    leaves = [weight.detach().clone().requires_grad_(), input.detach().clone().requires_grad_()]
    twin = None if bias is None else bias.detach().clone().requires_grad_()
    F.linear(leaves[1], leaves[0], twin).backward(gradient)
    at_bias = None if twin is None else twin.grad
    return leaves[0].grad.flatten()[indices.long()], leaves[1].grad, at_bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, IN), (3, 5, IN), (IN,), (0, IN)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_are_the_dense_ones_gathered(group, dtype, shape, has_bias, device):
    weight, indices, entries, lines = make(group, dtype, device)
    input = torch.randn(shape, device=device).to(dtype).requires_grad_()
    bias = torch.randn(OUT, device=device).to(dtype).requires_grad_() if has_bias else None
    mark = torch.empty(0)
    output = sampled_linear(input, entries, bias, weight, indices, mark, lines)
    assert torch.equal(output, F.linear(input, weight, bias))
    gradient = torch.randn_like(output)
    output.backward(gradient)
    at_entries, at_input, at_bias = dense(weight, indices, input, bias, gradient)
    assert entries.grad.dtype is dtype
    torch.testing.assert_close(entries.grad, at_entries)
    torch.testing.assert_close(input.grad, at_input)
    if bias is not None:
        torch.testing.assert_close(bias.grad, at_bias)


def test_second_derivatives_are_right(group):
    weight, indices, entries, lines = make(group, torch.float64)
    input = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def run(input, entries):
        return sampled_linear(input, entries, None, weight, indices, torch.empty(0), lines).tanh()

    def run_densely(input, entries):
        whole = weight.flatten().index_copy(0, indices.long(), entries).view(OUT, IN)
        return F.linear(input, whole).tanh()

    def second(run):
        (first,) = torch.autograd.grad(run(input, entries).sum(), entries, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (input, entries))

    for found, expected in zip(second(run), second(run_densely), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_what_is_no_line_of_a_matrix_has_none(shape):
    scattered = torch.tensor([0, 1, 7, 11])
    assert find_lines(scattered, shape) is None
    assert find_lines(torch.arange(5), (2, 4, 5)) is None  # a tensor of matrices
    assert find_lines(torch.arange(5, device="meta"), (4, 5)) is None


class LargestProduct(TorchDispatchMode):
    """Notes the largest result of a matrix product."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.largest = max(self.largest, result.numel())
        return result


def gradients_of(model):
    loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
    loss.backward()
    return loss, {name: values.grad for name, values in values_of(model).items()}


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_bf16", "tiny_mixtral"])
def test_a_model_trains_as_by_dense_products(name, group, request, monkeypatch):
    base = request.getfixturevalue(name)
    model = patch_model(load_base(base), base, group=group)
    found = [layer.selection for layer in layers(model)]
    loss, gradients = gradients_of(model)
    lines = [selection._lines[1] for selection in found if selection._lines is not None]
    assert any(isinstance(own, Lines) for own in lines)
    monkeypatch.setattr(parameter_module, "find_lines", lambda *_: None)
    monkeypatch.setattr(sampled, "DENSEST", 0.0)
    other = patch_model(load_base(base), base, group=group)
    expected_loss, expected = gradients_of(other)
    assert torch.equal(loss, expected_loss)
    for key, gradient in gradients.items():
        # Of other roundings within a layer's backward, by the dtype that the base computes in.
        close = {"rtol": 0.1, "atol": 1e-3} if "bf16" in name else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(gradient, expected[key], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_gradient_of_the_weight_is_made(tiny_llama, group, dtype):
    model = patch_model(load_base(tiny_llama, dtype=dtype), tiny_llama, group=group)
    name = "model.layers.0.mlp.up_proj.weight"
    (layer,) = [layer for layer in layers(model) if layer.name == name]
    input = torch.randn(3, layer.parameter.shape[1], dtype=dtype, requires_grad=True)
    output = layer.module(input)
    with LargestProduct() as seen:
        output.sum().backward()
    assert seen.largest < layer.parameter.numel() / 2
    assert layer["default"].grad.abs().sum() > 0


def test_lines_are_found_once_and_again_after_a_copy(tiny_llama, group, monkeypatch):
    calls = []
    original = parameter_module.find_lines

    def counted(indices, shape):
        calls.append(shape)
        return original(indices, shape)

    monkeypatch.setattr(parameter_module, "find_lines", counted)
    model = patch_model(load_base(tiny_llama), tiny_llama, group=group)
    for _ in range(3):
        gradients_of(model)
    assert len(calls) == len(layers(model))
    twin = copy.deepcopy(model)
    for values in (*values_of(model).values(), *values_of(twin).values()):
        values.grad = None
    assert torch.equal(gradients_of(twin)[0], gradients_of(model)[0])


def test_autocast_gives_the_gradients_of_the_dense_product(tiny_llama, group, monkeypatch):
    def run():
        model = patch_model(load_base(tiny_llama), tiny_llama, group=group)
        with torch.autocast("cpu", torch.bfloat16):
            return gradients_of(model)

    loss, gradients = run()
    monkeypatch.setattr(parameter_module, "find_lines", lambda *_: None)
    expected_loss, expected = run()
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradient, expected[key]) for key, gradient in gradients.items())
