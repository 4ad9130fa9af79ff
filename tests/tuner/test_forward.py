"""A forward pass sees the base plus the values, and its gradient reaches the values alone.

The oracle is a plain dense model to which the same change was made, and autograd through an
ordinary scatter.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call

from safeweights_peft import check_adapter
from safeweights_peft.tuner.layer import layers
from tests.tuner.patches import (
    INPUT_IDS,
    load_base,
    logits,
    patch_model,
    random_content,
    save_patch,
    twin,
    values_of,
)

MODELS = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]


@pytest.fixture(params=MODELS)
def base(request):
    return request.getfixturevalue(request.param)


def loss_of(model):
    return model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss


def dense_loss_and_gradients(base):
    """The oracle: all weights dense, the change added by index_copy."""
    model = load_base(base)
    indices, values = random_content(model)
    leaves = {name: torch.from_numpy(array).requires_grad_() for name, array in values.items()}
    weights = {}
    for name, parameter in model.named_parameters():
        flat, at = parameter.detach().flatten(), torch.from_numpy(indices[name])
        new = (flat[at].float() + leaves[name]).to(flat.dtype)
        weights[name] = flat.index_copy(0, at, new).view_as(parameter)
    loss = functional_call(model, weights, (), {"input_ids": INPUT_IDS, "labels": INPUT_IDS}).loss
    loss.backward()
    return loss, {name: leaf.grad for name, leaf in leaves.items()}


def test_the_output_is_that_of_the_dense_twin(base, tmp_path):
    patch = save_patch(base, tmp_path / "patch")
    model = patch_model(load_base(base), base)
    assert torch.equal(logits(model), logits(twin(base, patch)))
    assert not torch.equal(logits(model), logits(load_base(base)))


def test_loss_and_gradients_are_those_of_the_dense_twin(base):
    model = patch_model(load_base(base), base).train()
    loss = loss_of(model)
    loss.backward()
    dense_loss, gradients = dense_loss_and_gradients(base)
    assert torch.equal(loss, dense_loss)
    for name, values in values_of(model).items():
        # A dense tied weight sums its two gradients in its own dtype, values do in float32.
        # Where few entries are trained, tokens are summed in another order.
        tied = "tied" in str(base) and name == "model.embed_tokens.weight"
        tolerance = 0.02 if tied else 1e-6
        assert torch.allclose(values.grad, gradients[name], rtol=tolerance, atol=tolerance), name


def test_only_values_get_gradients(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    loss_of(model).backward()
    values = {id(tensor) for tensor in values_of(model).values()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in values) == parameter.requires_grad


def test_the_entries_stand_in_the_parameter_without_a_forward(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    base = load_base(tiny_llama).model.layers[0].mlp.up_proj.weight
    live = model.get_base_model().model.layers[0].mlp.up_proj.weight
    assert not torch.equal(live, base)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_tied_llama, reentrant):
    plain = patch_model(load_base(tiny_tied_llama), tiny_tied_llama).train()
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for _ in range(2):
        for wrapped in (plain, model):
            loss_of(wrapped).backward()
            with torch.no_grad():
                for values in values_of(wrapped).values():
                    values -= 0.01 * values.grad
    for name, values in values_of(model).items():
        assert torch.equal(values, values_of(plain)[name]), name


def test_training_goes_the_way_of_the_dense_twin(base):
    model = patch_model(load_base(base), base).train()
    optimizer = torch.optim.SGD(values_of(model).values(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("trainable", [True, False])
def test_values_that_change_between_forwards_are_seen(tiny_llama, trainable):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    other = patch_model(load_base(tiny_llama), tiny_llama)
    for wrapped in (model, other):
        for values in values_of(wrapped).values():
            values.requires_grad_(trainable)
    before = logits(model)
    with torch.no_grad():
        for values in [*values_of(model).values(), *values_of(other).values()]:
            values.mul_(3)
    assert torch.equal(logits(model), logits(other))
    assert not torch.equal(logits(model), before)


def test_values_written_behind_autograds_back_are_seen(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    other = patch_model(load_base(tiny_llama), tiny_llama)
    logits(model)
    for values in [*values_of(model).values(), *values_of(other).values()]:
        values.data.mul_(3)  # as fused optimizers and moving averages do
    assert torch.equal(logits(model), logits(other))


def test_mixed_precision_gives_the_gradients_of_the_dense_twin(tiny_tied_llama):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
        dense_loss, gradients = dense_loss_and_gradients(tiny_tied_llama)
    loss.backward()
    assert torch.equal(loss, dense_loss)
    for name, values in values_of(model).items():
        assert torch.allclose(values.grad, gradients[name], atol=1e-3, rtol=0.02), name


def gradients_of(model, loss):
    values = values_of(model)
    return dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


def test_two_forwards_before_one_backward_give_the_sum(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    once = gradients_of(model, loss_of(model))
    twice = gradients_of(model, loss_of(model) + loss_of(model))
    assert all(torch.allclose(twice[name], 2 * once[name], rtol=1e-5) for name in once)


def test_running_the_base_between_forward_and_backward_changes_neither(tiny_tied_llama):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    expected = gradients_of(model, loss_of(model))
    loss = loss_of(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(tiny_tied_llama)))
    found = gradients_of(model, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_adapter_between_forward_and_backward_changes_neither(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama, "first")
    model = patch_model(model, tiny_llama, "second", seed=1)
    alone = logits(model)
    values = values_of(model, "first")
    model.set_adapter("first")
    loss_of(model).backward()
    expected = {name: tensor.grad for name, tensor in values.items()}
    model.zero_grad()
    loss = loss_of(model)
    model.set_adapter("second")
    assert torch.equal(logits(model), alone)
    model.set_adapter("first")
    loss.backward()
    assert all(torch.equal(tensor.grad, expected[name]) for name, tensor in values.items())


def test_values_that_change_between_forward_and_backward_do_not_change_the_gradient(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    expected = gradients_of(model, loss_of(model))
    loss = loss_of(model)
    with torch.no_grad():
        for values in values_of(model).values():
            values.mul_(3)
    changed = logits(model)
    found = gradients_of(model, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(model), changed)


def test_a_forward_that_fails_leaves_the_base_restorable(tiny_llama, monkeypatch):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    last = model.get_base_model().lm_head
    with monkeypatch.context() as patching:
        patching.setattr(last, "forward", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_of(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load_base(tiny_llama)))


def test_a_first_forward_in_inference_mode_does_not_spoil_training(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    with torch.inference_mode():
        before = model(input_ids=INPUT_IDS).logits.clone()
    loss_of(model).backward()
    assert torch.equal(logits(model), before)


def test_adapters_act_in_the_order_of_activation_and_are_rounded_once(tiny_llama_bf16, tmp_path):
    first = save_patch(tiny_llama_bf16, tmp_path / "first")
    second = save_patch(tiny_llama_bf16, tmp_path / "second", seed=1)
    model = patch_model(load_base(tiny_llama_bf16), tiny_llama_bf16, "first")
    model = patch_model(model, tiny_llama_bf16, "second", seed=1)
    for names, patches in [
        (["first", "second"], (first, second)),
        (["second", "first"], (second, first)),
        (["first"], (first,)),
    ]:
        model.base_model.set_adapter(names)
        assert torch.equal(logits(model), logits(twin(tiny_llama_bf16, *patches)))


def test_an_adapter_that_takes_a_deleted_ones_name_acts_at_its_own_entries(tiny_llama, tmp_path):
    patches = [save_patch(tiny_llama, tmp_path / str(seed), seed=seed) for seed in (0, 2)]
    model = patch_model(load_base(tiny_llama), tiny_llama, "first")
    for seed in (1, 2):
        model = patch_model(model, tiny_llama, "second", seed=seed)
        model.base_model.set_adapter(["first", "second"])
        found = logits(model)
        model.base_model.set_adapter("first")
        model.delete_adapter("second")
    assert torch.equal(found, logits(twin(tiny_llama, *patches)))


def test_adapters_of_different_parameters_act_together(tiny_llama, tmp_path):
    ups = ["model.layers.0.mlp.up_proj.weight"]
    both = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    first = save_patch(tiny_llama, tmp_path / "first", names=ups)
    second = save_patch(tiny_llama, tmp_path / "second", names=both, seed=1)
    model = patch_model(load_base(tiny_llama), tiny_llama, "first", names=ups)
    model = patch_model(model, tiny_llama, "second", names=both, seed=1)
    model.base_model.set_adapter(["first", "second"])
    assert torch.equal(logits(model), logits(twin(tiny_llama, first, second)))
    model.set_adapter("first")
    assert torch.equal(logits(model), logits(twin(tiny_llama, first)))


def test_what_is_evaluated_in_training_is_what_is_merged(tiny_llama_bf16, tmp_path):
    patch = save_patch(tiny_llama_bf16, tmp_path / "a", seed=1)
    other = save_patch(tiny_llama_bf16, tmp_path / "b", seed=2)
    model = PeftModel.from_pretrained(load_base(tiny_llama_bf16, dtype=torch.float32), patch)
    model.load_adapter(other, "b")
    model.set_adapter("b")  # to be trained, as PEFT has it
    expected = logits(twin(tiny_llama_bf16, other).float())
    assert torch.equal(logits(model), expected)
    # Steps keep updates that are less than half a unit of bfloat16.
    before = loss_of(model)
    held = before.detach()
    values = values_of(model, "b").values()
    (first, *_) = torch.autograd.grad(before, [*values], retain_graph=True)
    assert torch.equal(logits(model), expected)  # while a graph waits
    (again, *_) = torch.autograd.grad(before, [*values])
    assert torch.equal(first, again)
    with torch.no_grad():
        for own in values:
            own.mul_(1 + 2**-12)
    assert loss_of(model) != held
    assert torch.equal(loss_of(model), loss_of(model))
    check_adapter(model)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_layers_that_run_without_gradients_in_a_step_are_not_rounded(tiny_llama_bf16):
    losses = []
    for checkpointing in (False, True):
        base = load_base(tiny_llama_bf16, dtype=torch.float32)
        model = patch_model(base, tiny_llama_bf16).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
        loss = loss_of(model)
        loss.backward()
        losses.append((loss.detach(), *(own.grad for own in values_of(model).values())))
    for plain, checkpointed in zip(*losses, strict=True):
        assert torch.equal(plain, checkpointed)


def test_what_is_switched_off_and_on_is_trained_as_before(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    patch_model(model, tiny_llama, "other", seed=1)

    def trained():
        names = ("default", "other")
        return [all(own.requires_grad for own in values_of(model, name).values()) for name in names]

    for frozen in (False, True):
        model.base_model.set_adapter("default", inference_mode=frozen)
        for _ in range(2):
            with model.disable_adapter():
                assert trained() == [False, False]
            assert trained() == [not frozen, False]
    model.base_model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    model.set_adapter("other")  # to be trained from here on
    model.base_model.enable_adapter_layers()
    assert trained() == [False, True]


@pytest.mark.parametrize("trained", [True, False])
def test_a_changed_copy_is_the_merged_weight_and_has_its_gradient(base, trained):
    """What stands in for a parameter under torch.compile and where it is sharded."""
    model = patch_model(load_base(base), base)
    model.base_model.set_adapter("default", inference_mode=not trained)
    patch_model(merged := load_base(base), base).merge_and_unload()
    plain = load_base(base)
    for layer in layers(model):
        with torch._C.DisableTorchFunctionSubclass():
            held = layer.parameter.detach().clone()
        copy, indices = layer.selection.changed(layer.parameter), layer.indices["default"].long()
        assert torch.equal(copy, merged.get_parameter(layer.name)), layer.name
        assert copy.requires_grad is trained
        if trained:
            weights = torch.rand(copy.shape).to(copy.dtype)
            (gradient,) = torch.autograd.grad((copy * weights).sum(), layer["default"])
            assert torch.equal(gradient, weights.flatten()[indices].float())
        with torch._C.DisableTorchFunctionSubclass():
            assert torch.equal(layer.parameter, held)
        with model.disable_adapter():
            assert layer.selection.changed(layer.parameter) is None
            copy = layer.selection.changed(layer.parameter, needs_copy=True)
            assert torch.equal(copy, plain.get_parameter(layer.name))


def train_base(model, run):
    """Train the base alone beside its adapter; return the losses, and the logits at the end."""
    base = [weight for name, weight in model.named_parameters() if "safeweights" not in name]
    for weight in base:
        weight.requires_grad_(True)
    optimizer, losses = torch.optim.SGD(base, lr=1.0), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = run(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    check_adapter(model)
    for weight in base:
        weight.requires_grad_(False)
    return losses, logits(run)


# torch looks at each input's gradient, of tensors between two graphs as well.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("engine", "frozen"), [("compiled", False), ("compiled", True), ("sharded", False)]
)
def test_a_base_trains_beside_its_adapter_under_an_engine_as_without(engine, frozen, tiny_llama):
    model, plain = (patch_model(load_base(tiny_llama), tiny_llama) for _ in range(2))
    for one in (model, plain):
        one.base_model.set_adapter("default", inference_mode=frozen)
        logits(one)  # which leaves the adapter's entries in the base
    expected, left = train_base(plain, plain)
    assert expected[-1] < expected[0] - 0.5
    if engine == "compiled":
        torch.compiler.reset()
        found, right = train_base(model, torch.compile(model, backend="aot_eager"))
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            found, right = train_base(model, model)
        finally:
            dist.destroy_process_group()
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_sharded_in_one_process_the_output_and_gradients_are_those_of_the_dense_twin(base):
    model = patch_model(load_base(base), base)
    expected, (dense_loss, gradients) = logits(model), dense_loss_and_gradients(base)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        check_adapter(model)  # such copies are what its modules run on
        loss = loss_of(model)
        assert torch.equal(loss, dense_loss)
        loss.backward()
        for name, values in values_of(model).items():
            found = values.grad.full_tensor()
            limit = 2e-2 if model.dtype is torch.bfloat16 else 1e-5
            gap = (found - gradients[name]).norm() / gradients[name].norm().clamp_min(1e-9)
            assert gap <= limit, name
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(load_base(base)))
    finally:
        dist.destroy_process_group()


def test_the_scale_multiplies_the_values(tiny_llama_bf16, tmp_path):
    patch = save_patch(tiny_llama_bf16, tmp_path / "patch", scale=0.5)
    model = patch_model(load_base(tiny_llama_bf16), tiny_llama_bf16, scale=0.5)
    assert torch.equal(logits(model), logits(twin(tiny_llama_bf16, patch)))
    model.set_scale("default", 1.7)
    assert layers(model)[0].terms()[0].scale == 1.7 * 0.5
    assert torch.equal(logits(model), logits(twin(tiny_llama_bf16, patch, scale=1.7)))


def test_a_tied_head_uses_the_patched_embeddings_without_a_copy_of_their_state(tiny_tied_llama):
    model = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    head = model.get_base_model().lm_head
    assert not list(head.children())
    assert not [key for key in model.state_dict() if "lm_head.safeweights" in key]
    embedded = model.get_input_embeddings()(INPUT_IDS).detach()
    other = patch_model(load_base(tiny_tied_llama), tiny_tied_llama)
    by_embeddings = other(inputs_embeds=embedded).logits
    assert torch.equal(by_embeddings, model(input_ids=INPUT_IDS).logits)


def test_generation_uses_the_patch(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    options = {"max_new_tokens": 8, "do_sample": False, "input_ids": INPUT_IDS[:1]}
    expected = twin(tiny_llama, patch).generate(**options)
    model = patch_model(load_base(tiny_llama), tiny_llama).eval()
    assert torch.equal(model.generate(**options), expected)
    assert not torch.equal(load_base(tiny_llama).generate(**options), expected)


def test_no_module_is_replaced(base):
    plain, model = load_base(base), load_base(base)
    before = dict(model.named_modules())
    patch_model(model, base)
    after = dict(model.named_modules())
    assert all(after[path] is module for path, module in before.items())
    assert [type(after[path]) for path in before] == [type(m) for m in plain.modules()]


def test_threads_may_share_a_model(tiny_llama, tmp_path):
    patch = save_patch(tiny_llama, tmp_path / "patch")
    expected = logits(twin(tiny_llama, patch))
    for _ in range(5):
        model = patch_model(load_base(tiny_llama), tiny_llama)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(logits, [model] * 8))
        assert all(torch.equal(tensor, expected) for tensor in found)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(load_base(tiny_llama)))


# torch looks at each input's gradient, of tensors between two graphs as well.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_is_evaluated_as_it_is_merged_after_steps_of_training(
    tiny_llama_bf16, tmp_path
):
    patch = save_patch(tiny_llama_bf16, tmp_path / "patch")
    wide = load_base(tiny_llama_bf16, dtype=torch.float32)
    model = PeftModel.from_pretrained(wide, patch, is_trainable=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    expected = logits(twin(tiny_llama_bf16, patch).float())
    for run in (compiled, model):
        loss_of(run).backward()
        assert torch.equal(logits(compiled), expected)
