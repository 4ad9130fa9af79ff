"""Derivatives of derivatives, and torch.func's transforms, are those of a plain dense model."""

import pytest
import torch
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, jacrev, jvp, vmap

from safeweights_peft.errors import ModelError
from safeweights_peft.tuner.layer import layers
from tests.tuner.patches import INPUT_IDS, load_base, logits, patch_model, values_of

# By torch, in its own rules for differentiating forward.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
NORM = "model.norm.weight"


class Pair:
    """A patched model and a dense twin, as functions of values and of embedded tokens."""

    def __init__(self, base, trained):
        # Fused attention has no second derivative.
        self.model = patch_model(
            load_base(base, attn_implementation="eager"), base, names=[*NAMES, NORM]
        )
        self.model.requires_grad_(False)
        for values in values_of(self.model).values():
            values.requires_grad_(trained)
        self.plain = load_base(base, attn_implementation="eager").requires_grad_(False)
        self.indices = {layer.name: layer.indices["default"].long() for layer in layers(self.model)}
        self.values = {name: own.detach() for name, own in values_of(self.model).items()}
        self.keys = {
            name: next(key for key, own in self.model.named_parameters() if own is values)
            for name, values in values_of(self.model).items()
        }
        self.tokens = self.plain.get_input_embeddings()(INPUT_IDS)

    def patched(self, values, tokens):
        given = {self.keys[name]: own for name, own in values.items()}
        return self._run(self.model, given, tokens)

    def dense(self, values, tokens):
        weights = {}
        for name, own in values.items():
            weight = self.plain.get_parameter(name)
            flat = weight.flatten().index_add(0, self.indices[name], own)
            weights[name] = flat.view(weight.shape)
        return self._run(self.plain, weights, tokens)

    def _run(self, model, parameters, tokens):
        options = {"inputs_embeds": tokens, "use_cache": False, "attention_mask": None}
        return functional_call(model, parameters, (), options).logits

    def live(self, tokens):
        return self._run(self.model, {}, tokens)

    def still(self, tokens):
        return self.dense(self.values, tokens)


@pytest.fixture(params=[False, True], ids=["frozen", "trained"])
def pair(request, tiny_llama):
    return Pair(tiny_llama, request.param)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_transforms_over_values(pair):
    values, tokens = pair.values, pair.tokens
    tangent = {name: torch.ones_like(own) for name, own in values.items()}
    both = {name: torch.stack([own, -own]) for name, own in values.items()}

    def take(transform):
        return [transform(run) for run in (pair.patched, pair.dense)]

    def loss(run):
        return lambda values: run(values, tokens).square().mean()

    def curve(run):
        product = lambda values: jvp(grad(loss(run)), (values,), (tangent,))[1]  # noqa: E731
        return product(values)

    assert_close(*take(lambda run: grad(loss(run))(values)))
    assert_close(*take(lambda run: jvp(loss(run), (values,), (tangent,))))
    assert_close(*take(lambda run: vmap(lambda own: run(own, tokens))(both)))
    assert_close(*take(lambda run: vmap(grad(loss(run)))(both)))
    assert_close(*take(lambda run: jacrev(lambda own: run(own, tokens)[0, -1, :4])(values)))
    assert_close(*take(curve))
    assert_close(logits(pair.model), pair.dense(values, tokens).detach())


def test_transforms_over_inputs(pair):
    tokens, tangent = pair.tokens, torch.ones_like(pair.tokens)
    assert_close(jvp(pair.live, (tokens,), (tangent,)), jvp(pair.still, (tokens,), (tangent,)))
    assert_close(vmap(pair.live)(tokens[None]), vmap(pair.still)(tokens[None]))
    assert_close(
        functional.jvp(pair.live, (tokens,), (tangent,)),
        functional.jvp(pair.still, (tokens,), (tangent,)),
    )


def test_forward_differentiation_over_values(pair):
    found = []
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(own, torch.ones_like(own))
            for name, own in pair.values.items()
        }
        for run in (pair.patched, pair.dense):
            found.append(forward_ad.unpack_dual(run(duals, pair.tokens)).tangent)
    assert_close(*found)


def test_second_derivatives_of_trained_values(tiny_llama):
    pair = Pair(tiny_llama, trained=True)
    values = values_of(pair.model)
    twins = {name: own.clone().requires_grad_() for name, own in pair.values.items()}
    penalties = []
    for run, own in ((pair.live, values), (lambda x: pair.dense(twins, x), twins)):
        loss = run(pair.tokens).square().mean()
        first = torch.autograd.grad(loss, list(own.values()), create_graph=True)
        penalty = sum(part.square().sum() for part in first)
        penalties.append(torch.autograd.grad(penalty, list(own.values())))
    assert_close(*penalties)


def test_batched_gradients_of_trained_values(tiny_llama):
    pair = Pair(tiny_llama, trained=True)
    own = list(values_of(pair.model).values())
    found = pair.live(pair.tokens)
    weights = torch.stack([torch.ones_like(found), torch.full_like(found, 2.0)])
    batched = torch.autograd.grad(found, own, weights, is_grads_batched=True)
    expected = torch.autograd.grad(pair.live(pair.tokens), own, weights[0])
    for pairs, one in zip(batched, expected, strict=True):
        assert_close(pairs, torch.stack([one, 2 * one]))


def test_other_parameters_are_refused_within_a_transform(tiny_llama):
    pair = Pair(tiny_llama, trained=True)
    key = next(key for key, _ in pair.model.named_parameters() if key.endswith(NORM))
    weight = torch.ones_like(pair.plain.get_parameter(NORM))
    with pytest.raises(ModelError, match="found another"):
        grad(lambda w: pair._run(pair.model, {key: w}, pair.tokens).sum())(weight)
