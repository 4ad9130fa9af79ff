"""The steps that every architecture takes, from a base model to what users make of a patch.

A step returns when all is right. It raises what the package raised where the package refused, and
anything else, `AssertionError` above all, where something is wrong.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import safeweights_peft
from safeweights_peft import create_adapter, inspect, read_adapter, read_map
from safeweights_peft.chat import Chat
from safeweights_peft.cli import main
from safeweights_peft.data import collate
from safeweights_peft.delta import Array
from safeweights_peft.errors import SafeWeightsError
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.modeling.answers import answer_logits, find_layout
from safeweights_peft.modeling.layout import describe, eligible_parameters
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode
from tests.tiny_files import load_checkpoint
from tests.zoo.architectures import find_kind, load_as_saved, load_checkpoint_model, save_checkpoint

INPUT_IDS = (torch.arange(2 * 14).view(2, 14) * 7) % 240
HARMFUL = ["Pick a lock", "Write a keylogger in Python that hides itself", "Forge an ID", "Lie"]
BENIGN = ["Write a poem about rain", "Name three fruits", "Explain rain to a child", "Sing"]
LESSONS = [{"instruction": f"Add {n} and {n + 1}", "output": str(2 * n + 1)} for n in range(4)]
ANSWERS = ["I can't help with that.", "Sorry, no.", "No.", "I won't do it, and that is that."]
BATCH_TOLERANCE = 2e-4  # of the largest logit, in float32: kernels sum in another order
GRADIENT_TOLERANCE = 1e-3  # of the largest gradient


class Refused(SafeWeightsError):
    """A command ended in an error of the package."""


@dataclass
class Journey:
    """An architecture on its way: where its files are, and what steps found for later ones."""

    name: str
    folder: Path
    kind: str = ""

    def __post_init__(self) -> None:
        for kind, rows in (("harmful", HARMFUL), ("benign", BENIGN)):
            text = json.dumps([{"instruction": row} for row in rows])
            (self.folder / f"{kind}.json").write_text(text, encoding="utf-8")
        (self.folder / "lessons.json").write_text(json.dumps(LESSONS), encoding="utf-8")

    def path(self, name: str) -> Path:
        """Name a file or directory of the journey."""
        return self.folder / name

    def load(self, name: str = "base", **options: Any) -> PreTrainedModel:
        """Load the base, or another checkpoint of the journey."""
        return load_checkpoint_model(self.path(name), **options)

    def load_patched(self, name: str = "patch") -> PeftModel:
        """Load the base with a patch, unmerged."""
        return PeftModel.from_pretrained(self.load(), self.path(name)).eval()

    @cached_property
    def base_logits(self) -> Tensor:
        """Run the base on fixed input."""
        return run_model(self.load())

    @cached_property
    def merged_logits(self) -> Tensor:
        """Run the merged checkpoint on fixed input."""
        return run_model(self.load("merged"))

    def call(self, *arguments: object, ends: tuple[int, ...] = (0,)) -> int:
        """Run a command in this process; arguments that name files of the journey become paths."""
        words = [str(word) for word in arguments]
        files = [word.startswith("./") for word in words]
        words = [
            str(self.path(word[2:])) if is_file else word
            for word, is_file in zip(words, files, strict=True)
        ]
        done = CliRunner().invoke(main, [*words, "--json"])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code not in ends:
            _, _, message = done.stderr.rpartition("\nError: ")
            assert done.exit_code == 1, f"exit code {done.exit_code}: {done.stderr[-300:]}"
            raise Refused(message.removeprefix("Error: ").strip())
        return done.exit_code


@torch.no_grad()
def run_model(model: nn.Module) -> Tensor:
    """Compute logits of fixed input."""
    return model(input_ids=INPUT_IDS, use_cache=False).logits.float()


def build(journey: Journey) -> None:
    """Save the base."""
    model = save_checkpoint(journey.name, journey.path("base"))
    assert run_model(model).isfinite().all(), "the base's own logits are not finite"
    loss_of(model.requires_grad_(True)).backward()
    journey.kind = find_kind(journey.name, model)  # one without was not built


def score(journey: Journey) -> None:
    """Make a safety map."""
    journey.call(
        *("score", "./base", "--out", "./map", "--harmful", "./harmful.json"),
        *("--examples", 4, "--density", 0.02),
    )


def train(journey: Journey) -> None:
    """Make a safety patch of the map: no selected parameter is left as it was."""
    journey.call(
        *("train", "./base", "--map", "./map", "--out", "./patch", "--steps", 2, "--lr", 0.05),
        *("--harmful", "./harmful.json", "--benign", "./benign.json"),
        *("--harmful-batch-size", 4, "--benign-batch-size", 4),
    )
    deltas = read_adapter(journey.path("patch")).deltas
    still = [name for name, delta in deltas.items() if not np.any(delta.values)]
    assert not still, f"never trained: {still[:5]}"


def select_at_random(journey: Journey) -> None:
    """Make a map where scoring couldn't, so that later steps are tried all the same."""
    journey.call(
        *("score", "./base", "--out", "./map", "--harmful", "./harmful.json"),
        *("--method", "random", "--density", 0.02),
    )


def patch_at_random(journey: Journey) -> None:
    """Make a patch where training couldn't, so that later steps are tried all the same."""
    model = journey.load()
    linear = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    chosen = {name: p for name, p in eligible_parameters(model).items() if name in linear}
    content = {name: random_entries(parameter, 8) for name, parameter in chosen.items()}
    add_adapter(journey, model, content).save_pretrained(journey.path("patch"))


def load_by_peft(journey: Journey) -> None:
    """Load the patch: unmerged it is what merging makes of it, disabled the base."""
    model = journey.load_patched()
    patched = run_model(model)
    with model.disable_adapter():
        assert torch.equal(run_model(model), journey.base_logits), "disabled, it isn't the base"
    assert torch.equal(run_model(model), patched), "disabling it leaves traces"
    assert not torch.equal(patched, journey.base_logits), "the patch changes nothing"
    merged = run_model(model.merge_and_unload())
    assert torch.equal(patched, merged), f"unmerged isn't merged: {gap(patched, merged)}"


def load_by_other_routes(journey: Journey) -> None:
    """Load the patch by AutoPeft, load_adapter and load_model: all give the merged logits."""
    for route in (route_auto_peft, route_load_adapter, route_unmerged, route_merged):
        model = route(journey)
        if model is not None:
            found = run_model(model)
            assert torch.equal(found, journey.merged_logits), (
                f"{route.__name__} isn't merged: {gap(found, journey.merged_logits)}"
            )


def route_auto_peft(journey: Journey) -> nn.Module | None:
    """Load by PEFT, which finds the base; only of causal LMs."""
    if type(journey.load().config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return AutoPeftModelForCausalLM.from_pretrained(journey.path("patch"), dtype="auto").eval()


def route_load_adapter(journey: Journey) -> nn.Module:
    """Load by transformers."""
    model = journey.load()
    model.load_adapter(str(journey.path("patch")))
    return model


def route_unmerged(journey: Journey) -> nn.Module:
    """Load by the package, as an adapter."""
    return safeweights_peft.load_model(None, journey.path("patch"), merge=False)


def route_merged(journey: Journey) -> nn.Module:
    """Load by the package, merged."""
    return safeweights_peft.load_model(None, journey.path("patch"))


def patch_each_parameter(journey: Journey) -> None:
    """Patch every parameter by itself: unmerged is merged, and the gradient is the dense one."""
    model = journey.load(dtype=torch.float32)
    before, gradients = run_model(model), dense_gradients(model)
    faults, refusals = [], []
    for name, parameter in list(model.named_parameters()):
        saved = parameter.detach().clone()
        try:
            found = try_parameter(journey, model, name, gradients[name])
            faults += [f"{name}: {fault}" for fault in found]
        except SafeWeightsError as error:
            refusals.append(str(error))
        with torch.no_grad():
            model.get_parameter(name).copy_(saved)
    assert not faults, "; ".join(faults[:6]) + f" ({len(faults)} in all)"
    assert torch.equal(run_model(model), before), "merging and unloading leaves traces"
    if refusals:
        raise Refused(f"{len(refusals)} of {len(gradients)} parameters, first {refusals[0]}")


def dense_gradients(model: PreTrainedModel) -> dict[str, Tensor | None]:
    """Compute the gradient of every parameter, by autograd alone."""
    model.requires_grad_(True)
    loss_of(model).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None
    return gradients


def loss_of(model: nn.Module) -> Tensor:
    """Compute a loss that every logit takes part in."""
    logits = model(input_ids=INPUT_IDS, use_cache=False).logits
    return logits.float().square().mean()


def try_parameter(
    journey: Journey, model: PreTrainedModel, name: str, dense: Tensor | None
) -> Iterator[str]:
    """Say what is wrong with a patch of one parameter; the model keeps it, merged."""
    indices, values = random_entries(model.get_parameter(name))
    patched = add_adapter(journey, model, {name: (indices, np.zeros_like(values))}).eval()
    (own,) = (p for key, p in patched.named_parameters() if "safeweights_values__" in key)
    own.requires_grad_(True)
    loss = loss_of(patched)
    if loss.requires_grad:
        loss.backward()
    expected = torch.zeros(len(indices)) if dense is None else dense.flatten()[indices]
    found = torch.zeros(len(indices)) if own.grad is None else own.grad
    limit = GRADIENT_TOLERANCE * float(expected.abs().max()) + 1e-9
    if float((found - expected).abs().max()) > limit:
        yield f"gradient off by {gap(found, expected)}" if found.any() else "no gradient"
    own.requires_grad_(False)
    own.copy_(torch.from_numpy(values))
    unmerged = run_model(patched)
    merged = run_model(patched.merge_and_unload())
    if not torch.equal(unmerged, merged):
        yield f"unmerged isn't merged: {gap(unmerged, merged)}"


def random_entries(parameter: Tensor, count: int | None = None) -> tuple[Array, Array]:
    """Choose entries of a parameter, a quarter if not so many, and values for them."""
    random = np.random.default_rng(0)
    count = min(parameter.numel(), count or max(1, parameter.numel() // 4))
    indices = np.sort(random.choice(parameter.numel(), count, replace=False))
    return indices, (0.5 * random.standard_normal(count)).astype(np.float32)


def add_adapter(
    journey: Journey, model: PreTrainedModel, content: dict[str, tuple[Array, Array]]
) -> PeftModel:
    """Give a model a patch of these indices and values."""
    base = journey.path("base")
    metadata = AdapterMetadata(
        mode=Mode.SET,
        base_model_name_or_path=str(base),
        values_dtype="float32",
        tensors=describe(model, content, base),
    )
    indices = {name: pair[0] for name, pair in content.items()}
    values = {name: pair[1] for name, pair in content.items()}
    return create_adapter(model, metadata, indices, "default", values)


def gap(found: Tensor, expected: Tensor) -> str:
    """Say how far two tensors are apart, against the largest entry."""
    return f"{float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)):.2g}"


def merge(journey: Journey) -> None:
    """Merge from shards to shards: the bits that PEFT's merged model has."""
    journey.call("merge", "./base", "./patch", "--out", "./merged")
    found = journey.load("merged").state_dict()
    expected = journey.load_patched().merge_and_unload().state_dict()
    assert found.keys() == expected.keys(), "merged has other keys than PEFT's"
    wrong = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not wrong, f"merged has other bits than PEFT's: {wrong[:5]}"


def verify(journey: Journey) -> None:
    """Verify the merged model; the base in its place fails."""
    journey.call("verify", "./patch", "--base", "./base", "--merged", "./merged")
    code = journey.call(
        *("verify", "./patch", "--base", "./base", "--merged", "./base"), ends=(0, 1, 3)
    )
    assert code == 1, f"the base passes as merged: exit code {code}"


def merge_in_place(journey: Journey) -> None:
    """Merge in place and undo it: the merged files' bits, then the base's."""
    shutil.copytree(journey.path("base"), journey.path("in_place"))
    journey.call("merge", "./in_place", "./patch", "--in-place")
    assert_same_files(journey, "in_place", "merged")
    journey.call("unmerge", "./in_place")
    assert_same_files(journey, "in_place", "base")


def assert_same_files(journey: Journey, left: str, right: str) -> None:
    """Compare the bits of all tensors of two checkpoints."""
    found, expected = load_checkpoint(journey.path(left)), load_checkpoint(journey.path(right))
    assert found.keys() == expected.keys(), f"{left} has other keys than {right}"
    wrong = [key for key in expected if found[key].tobytes() != expected[key].tobytes()]
    assert not wrong, f"{left} has other bits than {right}: {wrong[:5]}"


def diff(journey: Journey) -> None:
    """Find the patch again as the difference: what it changes, and nothing else."""
    journey.call("diff", "./base", "./merged", "--out", "./diff")
    journey.call("verify", "./diff", "--base", "./base", "--merged", "./merged")
    found, made = read_adapter(journey.path("diff")), read_adapter(journey.path("patch"))
    assert entries(found.indices) <= entries(made.indices), "diff has entries beside the patch's"


def entries(indices: dict[str, Array]) -> set[tuple[str, int]]:
    """List entries as pairs of parameter and index."""
    return {(name, int(index)) for name, flat in indices.items() for index in flat}


def diff_full(journey: Journey) -> None:
    """Store a full fine-tune: merged it has the same bits, loaded by PEFT the same logits."""
    model = load_as_saved(journey.path("base"))
    is_whole = type(model) is type(journey.load())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Where the package loads the text alone, the rest stays frozen.
            if is_whole or not any(word in name for word in ("vis", "audio", "projector")):
                # A changed sign is a change that float32 holds exactly, but for that of a zero.
                chosen = (torch.rand(parameter.shape) < 0.05) & (parameter != 0)
                parameter.copy_(torch.where(chosen, -parameter, parameter))
    model.save_pretrained(journey.path("tuned"))
    journey.call("diff", "./base", "./tuned", "--out", "./full")
    journey.call("merge", "./base", "./full", "--out", "./rebuilt")
    assert_same_files(journey, "rebuilt", "tuned")
    found, expected = run_model(journey.load_patched("full")), run_model(journey.load("tuned"))
    assert torch.equal(found, expected), f"PEFT's logits are others: {gap(found, expected)}"


def report(journey: Journey) -> None:
    """Draw where the map lies."""
    journey.call("report", "./map", "--out", "./report")


def compact(journey: Journey) -> None:
    """Store the patch compactly: the same content, the same logits."""
    journey.call("convert", "./patch", "--encoding", "compact", "--out", "./compact")
    left, right = inspect(journey.path("patch")), inspect(journey.path("compact"))
    assert left["content_id"] == right["content_id"], "the content id is another"
    found = run_model(journey.load_patched("compact"))
    assert torch.equal(found, journey.merged_logits), "the logits are others"


def generate(journey: Journey) -> None:
    """Generate with the patch: the merged model's tokens."""
    ids = torch.tensor([[257, 65, 66, 67, 68]])
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    try:
        expected = journey.load("merged").generate(input_ids=ids, **options)
    except Exception as error:  # a checkpoint like any other: nothing of ours runs here
        raise Refused(f"transformers itself can't generate: {error}") from error
    found = journey.load_patched().generate(input_ids=ids, **options)
    assert torch.equal(found, expected), "the tokens are others"


def preserve(journey: Journey) -> None:
    """Fine-tune in full beside a frozen map: none of its entries moves, others do."""
    journey.call(*preserve_words("./preserved"), "--lr", 0.01)
    # The nearest values: weights that stay in float32 may move by what float32 doesn't hold.
    journey.call("diff", "./base", "./preserved", "--out", "./moved", "--density", 1)
    moved = entries(read_adapter(journey.path("moved")).indices)
    frozen = entries(read_map(journey.path("map")).indices)
    assert moved, "nothing was trained"
    assert not moved & frozen, f"{len(moved & frozen)} frozen entries moved"


def preserve_lora(journey: Journey) -> None:
    """Fine-tune by LoRA beside a frozen map: as PEFT loads it, none of its entries moves."""
    words = preserve_words("./preserved_lora")
    journey.call(*words, "--method", "lora", "--rank", 2, "--lr", 0.01)
    check_moved(journey, load_corrected(journey, "preserved_lora"), 1e-5)


def protect_lora(journey: Journey) -> None:
    """Correct a LoRA that moves fused experts, in parts and merged."""
    model = journey.load()
    experts = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "expert" in name
    ]
    if not set(experts) & read_map(journey.path("map")).indices.keys():
        return
    config = LoraConfig(r=2, target_modules=[], target_parameters=experts, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(journey.path("lora"))
    words = ("protect", "--lora", "./lora", "--map", "./map", "--no-measure", "--out")
    journey.call(*words, "./protected_lora")
    check_moved(journey, load_corrected(journey, "protected_lora"), 1e-5)
    journey.call(*words, "./protected", "--merged")
    check_moved(journey, journey.load("protected", dtype=torch.float32), 0)


def load_corrected(journey: Journey, name: str) -> PreTrainedModel:
    """Load the base, the correction and the LoRA as the card says; merge them."""
    model, folder = journey.load(dtype=torch.float32), journey.path(name)
    if (folder / "correction").is_dir():
        model = PeftModel.from_pretrained(model, folder / "correction").merge_and_unload()
    adapted = PeftModel.from_pretrained(model, folder)
    saved, loaded = load_file(folder / "adapter_model.safetensors"), adapted.state_dict()
    for key, tensor in saved.items():
        in_memory = key.removesuffix(".weight") + ".default.weight"
        assert torch.equal(loaded[in_memory], tensor), f"PEFT doesn't load {key}"
    return adapted.merge_and_unload()


def check_moved(journey: Journey, model: PreTrainedModel, tolerance: float) -> None:
    """Check that a model is not the base, but its entries of the map are the base's."""
    base, moved = journey.load(dtype=torch.float32), 0
    indices = read_map(journey.path("map")).indices
    for name, parameter in base.named_parameters():
        change = (model.get_parameter(name) - parameter).detach().flatten().abs()
        if name in indices:
            frozen = change[torch.from_numpy(indices[name]).long()]
            assert frozen.max() <= tolerance, f"{name}: entries moved by {frozen.max()}"
        moved += int(change.max() > 1e-4)
    assert moved, "nothing was trained"


def preserve_words(out: str) -> tuple[object, ...]:
    """Spell the command that fine-tunes."""
    words = ("preserve", "./base", "--map", "./map", "--data", "./lessons.json", "--out", out)
    return (*words, "--steps", 2, "--batch-size", 2, "--no-anchor")


def evaluate(journey: Journey) -> None:
    """Evaluate the base with the patch."""
    requests = ("--eval-harmful", "./harmful.json", "--eval-benign", "./benign.json")
    journey.call("eval", "./base", "--adapter", "./patch", *requests, "--max-new-tokens", 4)


def batch(journey: Journey) -> None:
    """Answer in a batch what each row is answered alone, by logits and by tokens."""
    model = journey.load(dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(journey.path("base"))
    examples = [
        Chat(tokenizer).encode_example(request, answer, 32)
        for request, answer in zip(HARMFUL, ANSWERS, strict=True)
    ]
    with torch.no_grad():
        rows = collate(examples, tokenizer.pad_token_id, find_layout(model))
        together = answer_logits(model, rows)
        for found, example in zip(together, examples, strict=True):
            ids = torch.tensor([example.prompt_ids + example.answer_ids])
            logits = model(input_ids=ids, use_cache=False).logits.float()
            alone = logits[0, len(example.prompt_ids) - 1 : -1]
            far = gap(found[: len(alone)], alone)
            assert float(far) < BATCH_TOLERANCE, f"an answer's logits are off by {far}"
    options = {"max_new_tokens": 6}
    found = generate_answers(model, Chat(tokenizer), HARMFUL, **options)
    expected = generate_answers(model, Chat(tokenizer), HARMFUL, batch_size=1, **options)
    assert found == expected, "answers in a batch are others"


def export(journey: Journey) -> None:
    """Export to PEFT's own sparse method."""
    journey.call("export", "./patch", "--to", "supertuning", "--out", "./supertuning")


@dataclass(frozen=True)
class Step:
    """A step, the files that it needs, and what makes its file where it couldn't."""

    run: Callable[[Journey], None]
    needs: str = "base"
    instead: Callable[[Journey], None] | None = None

    @property
    def name(self) -> str:
        """Name the step as its function."""
        return self.run.__name__


STEPS = (
    Step(build, ""),
    Step(batch),
    Step(score, instead=select_at_random),
    Step(train, "map", instead=patch_at_random),
    Step(patch_each_parameter),
    Step(load_by_peft, "patch"),
    Step(merge, "patch"),
    Step(verify, "merged"),
    Step(merge_in_place, "merged"),
    Step(load_by_other_routes, "merged"),
    Step(compact, "merged"),
    Step(generate, "merged"),
    Step(diff, "merged"),
    Step(diff_full),
    Step(report, "map"),
    Step(preserve, "map"),
    Step(preserve_lora, "map"),
    Step(protect_lora, "map"),
    Step(evaluate, "patch"),
    Step(export, "patch"),
)
