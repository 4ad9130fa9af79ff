"""LoRA that leaves safety weights alone: trained so, or corrected later; in parts, or merged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from safeweights_peft import BaseMismatchError, read_map
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import ModelError, SafeWeightsError, UnsupportedFeatureError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs.evaluate import evaluate
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import load_patched
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.protect import protect_lora
from safeweights_peft.jobs.score import score
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.merging.verify import verify
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.patch.io import write_map
from safeweights_peft.settings import Method, PreserveMethod, PreserveSettings
from tests.tiny_jobs import Interrupted, Recorder, Requests, content
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer
from tests.training.maps import make_map
from tests.zoo.architectures import save_checkpoint

LINEAR = r".*\.(q|k|v|o|up|down|gate)_proj"


def by_lora(requests: Requests) -> PreserveSettings:
    return requests.preserve(method=PreserveMethod.LORA, rank=2)


def plain(base: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return load_model(resolve_base(str(base)), dtype)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_llama_bf16"])
def base(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def map_dir(base: Path, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("maps") / "map"
    score(Job(base), out, requests.score())
    return out


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of some other training, which has moved every linear layer."""
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=LINEAR, init_lora_weights=False)
    model = get_peft_model(plain(base, torch.float32), config)
    for name, each in model.named_parameters():
        if "lora_" in name:
            each.data *= 0.1
    out = tmp_path_factory.mktemp("loras") / "lora"
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(out))
    return out


def assembled(base: Path, folder: Path) -> PreTrainedModel:
    """Loads base, correction and LoRA by the plain steps of the card, in float32."""
    model = plain(base, torch.float32)
    model = PeftModel.from_pretrained(model, str(folder / "correction")).merge_and_unload()
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def frozen_and_free(
    model: PreTrainedModel, map_dir: Path, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    flat = model.get_parameter(name).detach().flatten()
    frozen = torch.zeros(flat.numel(), dtype=torch.bool)
    frozen[torch.from_numpy(read_map(map_dir).indices[name]).long()] = True
    return flat[frozen], flat[~frozen]


def check_parts(base: Path, folder: Path, map_dir: Path) -> None:
    """Frozen entries of the parts together are the base's up to rounding; the others have moved."""
    whole, before = assembled(base, folder), plain(base, torch.float32)
    for name in read_map(map_dir).indices:
        frozen, free = frozen_and_free(whole, map_dir, name)
        kept, moved = frozen_and_free(before, map_dir, name)
        torch.testing.assert_close(frozen, kept, rtol=0, atol=1e-7)
        assert (free - moved).abs().max() > 1e-4


def test_what_was_trained_by_lora_loads_in_parts_and_leaves_the_maps_weights_alone(
    base: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    preserve_model(Job(base), map_dir, requests.lessons, out, by_lora(requests))
    check_parts(base, out, map_dir)
    assert verify(out / "correction", base).ok


def test_a_lora_that_is_there_already_is_corrected_as_it_is(
    base: Path, map_dir: Path, lora: Path, tmp_path: Path
) -> None:
    protect_lora(str(lora), map_dir, tmp_path / "out")
    check_parts(base, tmp_path / "out", map_dir)
    before, after = (
        load_file(each / "adapter_model.safetensors") for each in (lora, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_merged_weights_are_those_of_a_dense_masked_twin_bit_for_bit(
    base: Path, map_dir: Path, lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    protect_lora(str(lora), map_dir, out, merged=True)
    parts, indices = load_file(lora / "adapter_model.safetensors"), read_map(map_dir).indices
    before, after = plain(base), plain(out)
    for name, weight in before.named_parameters():
        expected, prefix = weight.float(), f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in parts:
            delta = parts[f"{prefix}.lora_B.weight"] @ parts[f"{prefix}.lora_A.weight"] * (7 / 3)
            delta.flatten()[torch.from_numpy(indices.get(name, np.empty(0, np.int64))).long()] = 0
            expected = expected + delta
        assert torch.equal(after.get_parameter(name), expected.to(weight.dtype)), name


def test_merged_weights_of_the_map_are_the_bases_bit_for_bit(
    base: Path, map_dir: Path, lora: Path, tmp_path: Path
) -> None:
    record = protect_lora(str(lora), map_dir, tmp_path / "out", merged=True)
    assert verify(map_dir, tmp_path / "out").ok
    artifact, readers = read_map(map_dir), [CheckpointReader(p) for p in (base, tmp_path / "out")]
    for name, each in artifact.metadata.tensors.items():
        one, other = (gather_entries(r, name, each, artifact.indices[name]) for r in readers)
        assert one.tobytes() == other.tobytes()
    assert 0 < record["changed"] <= record["entries"]


def test_the_record_says_what_the_lora_did_before_and_does_now(
    base: Path, map_dir: Path, lora: Path, requests: Requests, tmp_path: Path
) -> None:
    settings, out = requests.evaluate(task=requests.lessons), tmp_path / "out"
    record = protect_lora(str(lora), map_dir, out, settings=settings)
    for stage, adapter in (("before", lora), ("after", out)):
        assert record[stage]["task_loss"] == evaluate(Job(base), adapter, settings)["task"]["loss"]
    assert record["before"]["task_loss"] != record["after"]["task_loss"]
    assert json.loads((out / "protecting.json").read_text()) == json.loads(json.dumps(record))


def test_an_interrupted_training_by_lora_gives_the_same_when_called_again(
    base: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    told = map_dir, requests.lessons
    preserve_model(Job(base), *told, tmp_path / "straight", by_lora(requests))
    job = Job(base, progress=Recorder("Fine-tune", 5))
    with pytest.raises(Interrupted):
        preserve_model(job, *told, tmp_path / "broken", by_lora(requests))
    assert not (tmp_path / "broken").exists()
    preserve_model(Job(base), *told, tmp_path / "broken", by_lora(requests))
    assert content(tmp_path / "broken") == content(tmp_path / "straight")
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "broken"}


def test_a_lora_that_touches_none_of_the_maps_tensors_needs_no_protection(
    base: Path, map_dir: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["lm_head"])
    model = get_peft_model(plain(base, torch.float32), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    with pytest.raises(ModelError, match="changes none of them; it needs no protection"):
        protect_lora(str(tmp_path / "lora"), map_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_map_of_another_base_is_refused(
    base: Path, map_dir: Path, lora: Path, tmp_path: Path
) -> None:
    other = save_tiny_tokenizer(save_tiny_llama(tmp_path / "other", seed=1))
    with pytest.raises(BaseMismatchError, match="that the safety map was made for"):
        protect_lora(str(lora), map_dir, tmp_path / "out", str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("nothing", "expected a LoRA's directory or Hub id"),
        ("no weights", "expected adapter_model.safetensors, found none"),
        ("another model", "one that PEFT can't load"),
        ("no base", "base_model_name_or_path: expected the name of its base, found none"),
    ],
)
def test_what_is_no_lora_for_the_base_is_refused_by_name(
    broken: str, message: str, map_dir: Path, lora: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lora"
    if broken != "nothing":
        shutil.copytree(lora, folder)
    if broken == "no weights":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    changes = {"another model": {"r": 5}, "no base": {"base_model_name_or_path": None}}
    if broken in changes:
        config = json.loads((folder / "adapter_config.json").read_text()) | changes[broken]
        (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SafeWeightsError, match=message) as error:
        protect_lora(str(folder), map_dir, tmp_path / "out")
    assert "lora" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_a_head_that_was_trained_apart_from_the_embeddings_is_not_dropped(
    requests: Requests, tmp_path: Path
) -> None:
    base = save_tiny_tokenizer(save_tiny_llama(tmp_path / "base", tied=True))
    score(Job(base), tmp_path / "map", requests.score())
    config = LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["lm_head"])
    model = get_peft_model(plain(base), config)
    model.get_output_embeddings().modules_to_save["default"].weight.data += 1
    model.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ModelError, match=r"lm_head.weight: .*tied.*found it trained apart"):
        protect_lora(str(tmp_path / "lora"), tmp_path / "map", tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()


def test_a_lora_with_added_tokens_goes_on_a_resized_base(
    base: Path, map_dir: Path, tmp_path: Path
) -> None:
    model = plain(base)
    tokens = model.config.vocab_size
    model.resize_token_embeddings(tokens + 3, mean_resizing=False)
    resized = shutil.copytree(base, tmp_path / "resized")
    model.save_pretrained(resized)
    config = LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=True)
    sizes = rf"\(.*weight of \[{tokens + 3}, 32\], not \[{tokens}, 32\]\); give --base"
    with pytest.raises(ModelError, match=sizes) as caught:
        protect_lora(str(tmp_path / "lora"), map_dir, tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=sizes):
        load_patched(resolve_base(str(base)), [tmp_path / "lora"], "auto", torch.device("cpu"))
    out = tmp_path / "out"
    protect_lora(str(tmp_path / "lora"), map_dir, out, str(resized), merged=True)
    assert verify(map_dir, out).ok


def save_tiny(path: Path, model_type: str) -> Path:
    """Save a tiny model of any type, with a tokenizer."""
    save_checkpoint(model_type, path)
    return path


@pytest.mark.parametrize(
    ("model_type", "left_out"),
    [
        ("gpt2", []),
        (
            "mixtral",
            ["model.layers.*.mlp.experts.down_proj", "model.layers.*.mlp.experts.gate_up_proj"],
        ),
        (
            "deepseek_v2",  # where PEFT takes any gate_proj for that of the experts
            [
                *(f"model.layers.*.mlp.{own}_proj.weight" for own in ("down", "gate", "up")),
                *(f"model.layers.*.mlp.experts.{own}_proj" for own in ("down", "gate_up")),
                *(
                    f"model.layers.*.mlp.shared_experts.{own}_proj.weight"
                    for own in ("down", "gate", "up")
                ),
            ],
        ),
    ],
)
def test_lora_goes_on_the_linear_layers_that_can_be_protected(
    model_type: str, left_out: list[str], requests: Requests, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", model_type)
    safety_map = score(Job(base), tmp_path / "map", requests.score(density=0.05))
    out = tmp_path / "out"
    record = preserve_model(Job(base), tmp_path / "map", requests.lessons, out, by_lora(requests))
    assert record["lora_left_out"] == sorted(left_out)
    before, after = dict(plain(base).named_parameters()), assembled(base, out)
    moved = 0
    for name, parameter in after.named_parameters():
        change = (parameter - before[name]).flatten().abs()
        frozen = torch.from_numpy(safety_map.indices.get(name, np.empty(0, np.int64))).long()
        assert change[frozen].sum() < 1e-5
        moved += int((change > 1e-5).sum())
    assert moved > 100


def save_lora(base: Path, names: list[str], folder: Path) -> Path:
    """Save a LoRA on parameters, which has moved each of them."""
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    get_peft_model(plain(base), config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_a_lora_on_fused_experts_is_corrected_in_parts_and_merged(
    model_type: str, requests: Requests, tmp_path: Path
) -> None:
    base, map_dir, lora = save_tiny(tmp_path / "base", model_type), tmp_path / "map", tmp_path / "l"
    score(Job(base), map_dir, requests.score(density=0.05))
    names = [name for name in read_map(map_dir).indices if ".experts." in name]
    assert {name.rpartition(".")[2] for name in names} >= {"gate_up_proj", "down_proj"}
    save_lora(base, names, lora)
    protect_lora(str(lora), map_dir, tmp_path / "parts")
    protect_lora(str(lora), map_dir, tmp_path / "merged", merged=True)
    assert verify(map_dir, tmp_path / "merged").ok
    parts, before = assembled(base, tmp_path / "parts"), plain(base, torch.float32)
    merged = plain(tmp_path / "merged", torch.float32)
    for name in names:
        kept, moved = frozen_and_free(before, map_dir, name)
        frozen, free = frozen_and_free(parts, map_dir, name)
        torch.testing.assert_close(frozen, kept, rtol=0, atol=1e-6)
        assert ((free - moved).abs() > 1e-4).float().mean() > 0.9
        written, others = frozen_and_free(merged, map_dir, name)
        assert torch.equal(written, kept)
        torch.testing.assert_close(others, free, rtol=2**-7, atol=1e-6)  # rounded to bfloat16


def test_a_map_of_experts_that_lora_leaves_alone_needs_no_correction(
    requests: Requests, tmp_path: Path
) -> None:
    base, out = save_tiny(tmp_path / "base", "mixtral"), tmp_path / "out"
    experts = [f"model.layers.{n}.mlp.experts.gate_up_proj" for n in range(2)]
    write_map(tmp_path / "map", make_map(base, experts))
    preserve_model(Job(base), tmp_path / "map", requests.lessons, out, by_lora(requests))
    assert not (out / "correction").exists()
    assert "correction" not in (out / "README.md").read_text()
    after = PeftModel.from_pretrained(plain(base), str(out)).merge_and_unload()
    for name in read_map(tmp_path / "map").indices:
        assert torch.equal(after.get_parameter(name), plain(base).get_parameter(name))


def test_what_peft_can_put_no_lora_on_is_refused_in_one_line(
    requests: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base", "mamba")
    score(Job(base), tmp_path / "map", requests.score(method=Method.RANDOM))
    job = Job(base), tmp_path / "map", requests.lessons, tmp_path / "out", by_lora(requests)
    # Some of its layers are none for LoRA; and what if all were?
    assert "backbone.layers.*.mixer.out_proj.weight" in preserve_model(*job)["lora_left_out"]
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("safeweights_peft.training.finetune._is_taken", lambda model, own: False)
    with pytest.raises(UnsupportedFeatureError, match=r"^model: .* a mamba: .*; choose") as caught:
        preserve_model(*job)
    assert "\n" not in str(caught.value)
