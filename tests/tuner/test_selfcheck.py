"""At its first use, an adapter that a model ignores, or gives no gradient, is refused by name."""

import re

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import RwkvConfig, RwkvForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from safeweights_peft import ModelError, check_adapter, load_model, merge
from safeweights_peft.cli import main
from safeweights_peft.freeze import FrozenEntries
from safeweights_peft.jobs.evaluate import evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.tuner import selfcheck
from safeweights_peft.tuner.selfcheck import check_in_place
from tests.tiny_jobs import Requests
from tests.tiny_kinds import KINDS, build
from tests.tiny_models import COMMON, save_tiny_llama, save_tiny_tokenizer
from tests.tuner.patches import (
    INPUT_IDS,
    load_base,
    load_by_peft,
    load_by_transformers,
    logits,
    patch_model,
    random_content,
    save_patch,
    twin,
    values_of,
)
from tests.tuner.test_faults import patch_all

DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"


class Fused(torch.autograd.Function):
    """A linear layer as a kernel of someone's own computes it: right for a weight of autograd's."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class WithoutWeight(Fused):
    """A kernel for inference, which knows no gradient of the weight."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[1], None


class FusedLinear(nn.Linear):
    kernel = Fused

    def forward(self, x):
        return self.kernel.apply(x, self.weight)


class InferenceLinear(FusedLinear):
    kernel = WithoutWeight


class PartlyFusedLinear(FusedLinear):
    part = 0.5

    def forward(self, x):
        return self.part * super().forward(x) + (1 - self.part) * F.linear(x, self.weight)


class FusedLookup(torch.autograd.Function):
    """An embedding as a kernel of someone's own computes it."""

    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, gradient):
        ids, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return None, torch.zeros_like(weight).index_add_(0, ids.flatten(), flat)


class FusedEmbedding(nn.Embedding):
    def forward(self, ids):
        return FusedLookup.apply(ids, self.weight)


class StaleLinear(nn.Linear):
    """Computes with a transposed copy that was made before there was an adapter."""

    def forward(self, x):
        return x @ self.kept


class LazyLinear(nn.Linear):
    """Computes with a copy that is made at the first forward."""

    kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = [self.weight.detach().clone()]
        return F.linear(x, self.kept[0])


class KeyedLinear(nn.Linear):
    """Keeps a copy of another layout for each tensor that it has met."""

    key = None

    def forward(self, x):
        if self.key != id(self.weight):
            self.key, self.kept = id(self.weight), self.weight.detach()[:, ::2].clone()
        return F.linear(x[..., ::2], self.kept)


def change(model, name, kind):
    module = model.get_submodule(name.removesuffix(".weight"))
    module.__class__ = kind
    if kind is StaleLinear:
        module.register_buffer("kept", module.weight.detach().t().contiguous(), persistent=False)
    return model


@pytest.fixture(params=["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral"])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("route", [load_by_peft, load_by_transformers])
def test_a_patch_that_is_loaded_passes(base, route, tmp_path):
    patch = save_patch(base, tmp_path / "patch")
    model = route(base, patch)
    check_adapter(model)
    assert torch.equal(logits(model), logits(twin(base, patch)))


def test_an_adapter_in_training_passes_and_is_left_as_it_was(base):
    model = patch_model(load_base(base), base).train()
    model.get_base_model().model.norm.eval()
    modes = [module.training for module in model.modules()]
    values = {name: tensor.clone() for name, tensor in values_of(model).items()}
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    state = torch.get_rng_state()
    check_adapter(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, values[name]) for name, tensor in values_of(model).items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    assert all(tensor.grad is None for tensor in model.parameters())
    assert not any(layer.selection.is_waited_for() for layer in selfcheck_layers(model))


def selfcheck_layers(model):
    return next(m for m in model.modules() if isinstance(m, selfcheck.Root)).layers


def test_float16_and_a_cast_model_pass(tmp_path):
    base = save_tiny_llama(tmp_path, dtype=torch.float16)
    check_adapter(patch_model(load_base(base), base))
    check_adapter(patch_model(load_base(base), base).to(torch.float32))


def test_several_adapters_merged_or_switched_off_pass(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    patch_model(model, tiny_llama, "other", seed=1, scale=0.5)
    model.base_model.set_adapter(["default", "other"])
    check_adapter(model)
    with model.disable_adapter():
        check_adapter(model)
    model.merge_adapter()
    expected = logits(model)
    check_adapter(model)
    assert torch.equal(logits(model), expected)


def test_copies_of_a_large_model_are_made_group_by_group(tiny_llama, monkeypatch):
    monkeypatch.setattr(selfcheck, "GROUP_BYTES", 10_000)
    model = patch_model(load_base(tiny_llama), tiny_llama)
    check_adapter(model)
    with pytest.raises(ModelError, match=rf"^{DOWN}: "):
        check_adapter(change(model.get_base_model(), DOWN, FusedLinear))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*is_decoder")
def test_every_kind_of_model_passes(kind):
    model, _ = patch_all(base := build(kind), [name for name, _ in build(kind).named_parameters()])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    check_adapter(model.train())
    after = base.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [DOWN, HEAD])
@pytest.mark.parametrize("kind", [FusedLinear, InferenceLinear])
def test_a_kernel_that_reads_its_weight_past_autograd_is_found(kind, name, base_dtype, tmp_path):
    base = save_tiny_llama(tmp_path, dtype=base_dtype)
    model = patch_model(change(load_base(base), name, kind), base)
    with pytest.raises(ModelError, match=rf"^{name}: expected a gradient, .* found none: .*kernel"):
        check_adapter(model)
    model.base_model.set_adapter("default", inference_mode=True)
    check_adapter(model)  # frozen, it needs no gradient


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("part", [0.5, 0.1])
def test_a_gradient_of_which_a_part_is_lost_is_found(part, base_dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(PartlyFusedLinear, "part", part)
    base = save_tiny_llama(tmp_path, dtype=base_dtype)
    model = patch_model(change(load_base(base), DOWN, PartlyFusedLinear), base)
    with pytest.raises(ModelError, match=rf"^{DOWN}: .* found one that is off by {part} of it"):
        check_adapter(model)


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("use", ["get_input_embeddings", "get_output_embeddings"])
def test_a_tied_weight_of_which_one_use_has_no_gradient_is_found(use, base_dtype, tmp_path):
    base = save_tiny_llama(tmp_path, tied=True, dtype=base_dtype)
    model = load_base(base)
    module = getattr(model, use)()
    module.__class__ = FusedEmbedding if isinstance(module, nn.Embedding) else FusedLinear
    with pytest.raises(ModelError, match=r"^model\.embed_tokens\.weight: .* is off by 0\.\d"):
        check_adapter(patch_model(model, base))


@pytest.mark.parametrize("name", [DOWN, HEAD])
@pytest.mark.parametrize("kind", [StaleLinear, LazyLinear])
@pytest.mark.parametrize("trained", [True, False])
def test_a_copy_that_does_not_follow_is_found(kind, name, trained, tiny_llama):
    model = patch_model(change(load_base(tiny_llama), name, kind), tiny_llama)
    if not trained:
        model.base_model.set_adapter("default", inference_mode=True)
    module = name.removesuffix(".weight")
    with pytest.raises(ModelError, match=rf"^{name}: .* computes with {module}\.kept, a copy"):
        check_adapter(model)


@pytest.mark.parametrize("name", [DOWN, HEAD])
def test_a_copy_for_each_tensor_is_found(name, tiny_llama):
    model = patch_model(change(load_base(tiny_llama), name, KeyedLinear), tiny_llama)
    with pytest.raises(ModelError, match=rf"^{name}: expected the logits of the merged weight"):
        check_adapter(model)


@pytest.mark.parametrize("kind", [StaleLinear, LazyLinear, KeyedLinear])
def test_entries_that_are_written_in_place_are_checked_too(kind, tiny_llama):
    model = load_base(tiny_llama)
    indices, _ = random_content(model)
    places = [
        FrozenEntries(name, model.get_parameter(name), torch.from_numpy(own))
        for name, own in indices.items()
    ]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_in_place(model, places)
    with pytest.raises(ModelError, match=rf"^{DOWN}: "):
        check_in_place(change(model, DOWN, kind), places)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class Noisy(nn.Linear):
    count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(x) * (1 + 1e-5 * (self.count % 3))


class Experts(nn.ModuleList):
    """Experts of which the last two are sent nothing, and one more parameter that nothing reads."""

    def __init__(self):
        super().__init__(nn.Linear(32, 32, bias=False) for _ in range(4))
        self.unused = nn.Parameter(torch.rand(4))

    def forward(self, x):
        return x + 0.1 * self[0](x) + 0.1 * self[1](x)


def with_experts(tiny_llama):
    model = load_base(tiny_llama)
    norm = model.model.norm
    model.model.norm = nn.Sequential(norm, Experts()).requires_grad_(False)
    return model


def test_parameters_that_the_row_has_nothing_to_do_with_pass(tiny_llama):
    model = with_experts(tiny_llama)
    names = [f"model.norm.1.{number}.weight" for number in range(4)]
    check_adapter(patch_all(model, names)[0])


SILENT = ["model.norm.1.2.weight", "model.norm.1.3.weight"]


def test_what_the_row_does_not_read_passes_where_nothing_is_the_same_twice(tiny_llama, monkeypatch):
    model, _ = patch_all(change(with_experts(tiny_llama), HEAD, Noisy), SILENT)
    check_adapter(model)
    monkeypatch.setattr(selfcheck, "GROUP_BYTES", 1)
    check_adapter(model)


def test_zeros_that_the_row_does_not_read_pass_beside_other_zeros(tiny_llama):
    model = with_experts(tiny_llama)
    experts = model.model.norm[1]
    nn.init.zeros_(experts[2].weight)
    experts.register_buffer("load", torch.zeros(32, 32))
    check_adapter(patch_all(model, SILENT)[0])


def test_dropout_and_the_statistics_of_batches_are_left_alone(tiny_llama):
    model = load_base(tiny_llama)

    class Norm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.batch, self.drop = norm, nn.BatchNorm1d(32), nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1  # in evaluation as well
            self.last = torch.rand(3)
            return self.drop(self.batch(self.norm(x).transpose(1, 2)).transpose(1, 2))

    model.model.norm = Norm(model.model.norm).requires_grad_(False)
    model, _ = patch_all(model, [DOWN, "model.norm.batch.weight"])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    check_adapter(model.train())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_model_that_is_never_the_same_twice_passes(tiny_llama):
    model = load_base(tiny_llama)
    check_adapter(patch_model(change(model, HEAD, Noisy), tiny_llama))


def test_under_ddp_it_passes(tiny_llama):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(patch_model(load_base(tiny_llama), tiny_llama))
        check_adapter(wrapped)
        assert all(tensor.grad is None for tensor in wrapped.parameters())
    finally:
        dist.destroy_process_group()


def test_a_model_without_a_patch_is_refused(tiny_llama):
    with pytest.raises(ModelError, match=r"^model: expected one with a safety patch, found none"):
        check_adapter(load_base(tiny_llama))


# RWKV divides weights of deeper blocks in place when it is first evaluated.


def save_rwkv(path):
    torch.manual_seed(0)
    config = RwkvConfig(
        **{key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
        attention_hidden_size=32,
        context_length=64,
        rescale_every=1,
    )
    RwkvForCausalLM(config).save_pretrained(path)
    return path


DIVIDED = "rwkv.blocks.1.feed_forward.value.weight"


@pytest.mark.parametrize("first", ["trained", "frozen", "the base", "in training"])
def test_a_forward_that_writes_weights_is_refused_by_name(first, tmp_path):
    base = save_rwkv(tmp_path)
    model = patch_model(load_base(base), base, names=[DIVIDED])
    message = rf"^{DIVIDED}: expected a forward that leaves weights alone.*rescale_every=0"
    model.base_model.set_adapter("default", inference_mode=first == "frozen")
    if first == "in training":
        logits(model.train())  # nothing is written yet
        model.eval()
    if first == "the base":
        model.base_model.disable_adapter_layers()
    for _ in range(2):  # later ones would compute with what the first has left
        with pytest.raises(ModelError, match=message):
            logits(model)


def test_a_model_that_the_check_has_changed_is_refused_from_then_on(tmp_path):
    base = save_rwkv(tmp_path)
    model = patch_model(load_base(base), base, names=[DIVIDED])
    for run in (check_adapter, logits, check_adapter):
        with pytest.raises(ModelError, match="of RWKV with rescale_every=0"):
            run(model)


def test_weights_that_are_written_in_another_mode_of_a_part_are_found(tmp_path):
    base = save_rwkv(tmp_path)
    model = patch_model(load_base(base), base, names=[DIVIDED])
    model.get_base_model().rwkv.train()
    logits(model)
    model.get_base_model().rwkv.eval()
    with pytest.raises(ModelError, match=DIVIDED):
        logits(model)


def write_once(model, name):
    """Let a model change a weight in its next forward."""

    def hook(module, *_):
        handle.remove()
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            model.get_parameter(name).detach().mul_(0.5)

    handle = model.model.norm.register_forward_hook(hook)


def test_a_layer_that_could_not_be_watched_is_watched_later(tiny_llama):
    name = "model.layers.0.mlp.up_proj.weight"
    model = patch_model(load_base(tiny_llama), tiny_llama, names=[name]).train()
    loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
    logits(model.eval())  # while a graph waits
    loss.backward()
    del loss
    write_once(model.get_base_model(), name)
    with pytest.raises(ModelError, match=f"^{name}: expected a forward that leaves weights alone"):
        logits(model)


def test_a_forward_that_calls_the_model_again_is_watched_to_its_end(tiny_llama):
    name = "model.layers.0.mlp.up_proj.weight"
    model = patch_model(load_base(tiny_llama), tiny_llama, names=[name])
    base = model.get_base_model()

    def call(*_):
        handle.remove()
        write_once(base, name)
        base.model.norm(torch.zeros(1, 1, base.config.hidden_size))
        logits(base)

    handle = base.model.layers[0].register_forward_hook(call)
    with pytest.raises(ModelError, match=f"^{name}: expected a forward that leaves weights alone"):
        logits(model)


def test_rwkv_is_right_without_rescaling_or_where_nothing_is_divided(tmp_path):
    base = save_rwkv(tmp_path / "base")
    model = patch_model(load_base(base, rescale_every=0), base)
    plain = logits(load_base(base, rescale_every=0))
    check_adapter(model)
    model.save_pretrained(tmp_path / "patch")
    expected = logits(load_model(base, tmp_path / "patch"))
    assert torch.equal(logits(load_model(base, tmp_path / "patch", merge=False)), expected)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        with model.disable_adapter():
            assert torch.equal(logits(model), plain)
        logits(model.train())
        model.eval()
    # Rescaled as its file says, the merged model is the same but for the eps of norms.
    merged = patch_model(load_base(base, rescale_every=0), base).merge_and_unload()
    merged.config.rescale_every = 1
    torch.testing.assert_close(logits(merged), expected, rtol=1e-2, atol=1e-2)
    names = ["rwkv.blocks.0.feed_forward.value.weight", "head.weight"]
    check_adapter(patch_model(load_base(base), base, names=names))


def test_rwkv_is_evaluated_as_its_merged_checkpoint(tmp_path):
    base = save_tiny_tokenizer(save_rwkv(tmp_path / "base"))
    patch_model(load_base(base, rescale_every=0), base).save_pretrained(tmp_path / "patch")
    merge(base, tmp_path / "patch", tmp_path / "merged")
    settings = Requests(tmp_path).evaluate(limit=2, keep_answers=True)
    found = evaluate(Job(base), tmp_path / "patch", settings)
    expected = evaluate(Job(tmp_path / "merged"), None, settings)
    assert found["harmful"] == expected["harmful"]
    assert found["benign"] == expected["benign"]


# The jobs.


def keep_copies(monkeypatch):
    """Let every MLP compute with a copy that it makes at its first forward."""

    def forward(self, x):
        if not hasattr(self, "kept"):
            self.kept = self.down_proj.weight.detach().t().contiguous()
        return (self.act_fn(self.gate_proj(x)) * self.up_proj(x)) @ self.kept

    monkeypatch.setattr(LlamaMLP, "forward", forward)


def fuse(monkeypatch):
    """Let every MLP compute by a kernel that reads its weight past autograd."""

    def forward(self, x):
        return Fused.apply(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)


@pytest.fixture
def call(tiny_llama, tmp_path):
    requests = Requests(tmp_path)
    save_patch(tiny_llama, tmp_path / "patch")
    score(Job(tiny_llama), tmp_path / "map", requests.score())
    sources = {
        "train": ("--map", tmp_path / "map", "--out", tmp_path / "out", "--steps", 1),
        "eval": ("--adapter", tmp_path / "patch", "--max-new-tokens", 2),
    }
    prefix = {"train": "--", "eval": "--eval-"}

    def run(command):
        harmful, benign = f"{prefix[command]}harmful", f"{prefix[command]}benign"
        words = (command, tiny_llama, *sources[command], harmful, requests.harmful)
        words = (*words, benign, requests.benign, "--json")
        done = CliRunner().invoke(main, [str(word) for word in words])
        return done.exit_code, done.stderr.rpartition("Error: ")[2].splitlines()

    return run


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_jobs_of_a_model_with_copies_end_in_one_line(command, call, monkeypatch, tmp_path):
    keep_copies(monkeypatch)
    code, lines = call(command)
    assert (code, len(lines)) == (1, 1)
    name = r"model\.layers\.\d\.mlp\.down_proj\.weight"
    assert re.match(rf"{name}: expected a model that computes with it, found .*\.kept", lines[0])
    assert not (tmp_path / "out").exists()


def test_training_by_a_kernel_past_autograd_ends_in_one_line(call, monkeypatch, tmp_path):
    fuse(monkeypatch)
    code, lines = call("train")
    assert (code, len(lines)) == (1, 1)
    assert re.match(r"model\.\S*\.down_proj\.weight: expected a gradient, .* found none", lines[0])
    assert not (tmp_path / "out").exists()
    assert call("eval")[0] == 0  # which needs no gradient


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_jobs_of_other_models_check_once_and_go_on(command, call, monkeypatch):
    runs = []
    plain = selfcheck._Check.run
    monkeypatch.setattr(selfcheck._Check, "run", lambda self: runs.append(plain(self)))
    assert call(command)[0] == 0
    assert len(runs) == 1


def test_a_forward_that_failed_is_not_compared_with_a_later_one(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama).train()
    with torch.no_grad():
        model(input_ids=INPUT_IDS)
        model.eval()
        with pytest.raises(IndexError):
            model(input_ids=INPUT_IDS + 10**6)
        model.train()
        for values in values_of(model).values():
            values.add_(1)
        assert model(input_ids=INPUT_IDS).logits.isfinite().all()


def test_adapters_that_are_chosen_within_a_forward_are_no_writing_of_the_models(tiny_llama):
    model = patch_model(load_base(tiny_llama), tiny_llama)
    patch_model(model, tiny_llama, "other", seed=1)

    def choose(*_):
        model.base_model.set_adapter("default", inference_mode=True)

    model.base_model.set_adapter("other", inference_mode=True)
    model.get_base_model().model.norm.register_forward_hook(choose)
    logits(model)
    assert torch.equal(logits(model), logits(patch_model(load_base(tiny_llama), tiny_llama)))


def test_training_a_parameter_that_another_reads_in_its_memory_is_refused(tiny_tied_llama):
    name = "model.embed_tokens.weight"
    model = load_base(tiny_tied_llama)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    peft_model = patch_model(model, tiny_tied_llama, names=[name])
    with pytest.raises(ModelError, match=rf"^{name}: .* found that of {HEAD}"):
        check_adapter(peft_model)
    peft_model.requires_grad_(False)
    check_adapter(peft_model)  # whoever reads it sees the entries
    peft_model.unload()
    model.tie_weights()
    check_adapter(patch_model(model, tiny_tied_llama, names=[name]))
