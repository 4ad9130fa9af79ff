"""Base models: loaded, named, and located on disk entry by entry."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MllamaForCausalLM,
    MllamaTextConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.data import Batch, Batching, Example, Layout, collate
from safeweights_peft.delta import DTYPES
from safeweights_peft.errors import ModelError
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.modeling.answers import answer_logits
from safeweights_peft.modeling.layout import describe, eligible_parameters, total_parameters
from safeweights_peft.modeling.loading import (
    build_empty,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from safeweights_peft.modeling.tensors import to_numpy
from safeweights_peft.patch.metadata import record_from_json, record_to_json
from safeweights_peft.settings import ComputeSettings
from tests.tiny_models import COMMON, save_tiny_llama, save_tiny_tokenizer, save_tiny_vlm
from tests.zoo.architectures import load_checkpoint_model, save_checkpoint

MODELS = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
UP = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def load(path: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return load_model(resolve_base(str(path)), dtype)


def change_checkpoint(path: Path, edit: Callable[[Tensors], object]) -> Path:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def rename(tensors: Tensors, new_name: Callable[[str], str]) -> None:
    for key in list(tensors):
        tensors[new_name(key)] = tensors.pop(key)


@pytest.fixture(params=MODELS)
def base(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


# --- device and dtype --------------------------------------------------------------------------


def test_a_named_device_is_taken() -> None:
    assert pick_device("cpu") == torch.device("cpu")


def test_without_a_name_the_accelerator_is_taken_or_the_cpu() -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert pick_device() == (accelerator or torch.device("cpu"))


@pytest.mark.parametrize("device", ["banana", "cpu:x", "cuda:63", "meta"])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(ModelError, match=f"--device {device}: expected a torch device"):
        pick_device(device)


def test_auto_computes_in_float32_on_a_cpu_and_in_the_checkpoints_dtype_elsewhere() -> None:
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == "auto"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_named_dtype_is_taken_on_every_device(device: str) -> None:
    for name in ("float32", "bfloat16", "float16"):
        assert pick_dtype(name, torch.device(device)) == getattr(torch, name)


@pytest.mark.parametrize("name", ["int8", "float64", "half", ""])
def test_another_dtype_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="--dtype: expected auto, float32, bfloat16, float16"):
        pick_dtype(name, torch.device("cpu"))


# --- loading -----------------------------------------------------------------------------------


def test_a_model_is_loaded_for_inference(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_is_loaded_in_the_dtype_asked_for(tiny_llama_bf16: Path) -> None:
    assert load(tiny_llama_bf16).dtype == torch.bfloat16
    assert load(tiny_llama_bf16, torch.float32).dtype == torch.float32


def test_a_directory_without_weights_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path}: expected a causal language model"):
        load(tmp_path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ModelError, match=f"{tmp_path}: expected a causal language model"):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ["t5", "vit", "florence2"])
def test_what_is_no_language_model_is_refused_in_one_line(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    for make in (load, lambda path: build_empty(resolve_base(str(path)))):
        with pytest.raises(ModelError, match=f"a {model_type}, which is none; give") as caught:
            make(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_text_tower_saved_by_itself_is_loaded_by_its_own_class(tmp_path: Path) -> None:
    config = MllamaTextConfig(**COMMON, cross_attention_layers=[])
    MllamaForCausalLM(config).save_pretrained(tmp_path)
    assert type(load(tmp_path)) is type(build_empty(resolve_base(str(tmp_path))))
    assert isinstance(load(tmp_path), MllamaForCausalLM)


def test_a_tokenizers_own_padding_token_is_kept(tiny_llama: Path) -> None:
    assert load_tokenizer(resolve_base(str(tiny_llama))).pad_token_id == 256


def edit_tokenizer(path: Path, **changes: str | None) -> BaseModel:
    (path / "config.json").write_text("{}")
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return resolve_base(str(path))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(edit_tokenizer(save_tiny_tokenizer(tmp_path), pad_token=None))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 258
    assert tokenizer(["a", "abc"], padding=True)["input_ids"][0].count(258) == 2


def test_a_tokenizer_that_cannot_pad_is_refused_by_name(tmp_path: Path) -> None:
    base = edit_tokenizer(save_tiny_tokenizer(tmp_path), pad_token=None, eos_token=None)
    with pytest.raises(ModelError, match=f"{tmp_path}: expected a padding or end token"):
        load_tokenizer(base)


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path}: expected a tokenizer, found none"):
        load_tokenizer(resolve_base(str(save_tiny_llama(tmp_path))))


# --- naming ------------------------------------------------------------------------------------


def short_names(model: PreTrainedModel) -> set[str]:
    """Names within one layer; a name outside the layers as it is."""
    return {name.split(".", 3)[-1] for name in eligible_parameters(model)}


ATTENTION = {f"self_attn.{part}_proj.weight" for part in "qkvo"}


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_tied_llama"])
def test_a_dense_models_matrices_are_eligible_but_not_embeddings_head_or_norms(
    model: str, request: pytest.FixtureRequest
) -> None:
    mlp = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert short_names(load(request.getfixturevalue(model))) == ATTENTION | mlp


@pytest.mark.parametrize("model", ["tiny_mixtral", "tiny_qwen3_moe"])
def test_fused_experts_are_eligible_but_not_their_router(
    model: str, request: pytest.FixtureRequest
) -> None:
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert short_names(load(request.getfixturevalue(model))) == ATTENTION | experts


def test_biases_of_fused_experts_are_not_eligible() -> None:
    config = GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert short_names(GptOssForCausalLM(config)) == ATTENTION | experts


def test_biases_and_position_embeddings_are_not_eligible() -> None:
    config = OPTConfig(
        vocab_size=99, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    attention = {f"self_attn.{part}_proj.weight" for part in ("q", "k", "v", "out")}
    names = {name.split(".", 4)[-1] for name in eligible_parameters(OPTForCausalLM(config))}
    assert names == attention | {"fc1.weight", "fc2.weight"}


MOE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 99}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
ZAMBA = {"model_type": "zamba", "attention_head_dim": 8, "num_hidden_layers": 13}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}


def build(model_type: str, **config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))


def tiny_gemma3() -> PreTrainedModel:
    vision = VISION | {"patch_size": 4, "num_attention_heads": 2}
    return build("gemma3", text_config=MOE | HEADS, vision_config=vision, mm_tokens_per_image=4)


@pytest.mark.parametrize(
    ("config", "excluded"),
    [
        ({"model_type": "hunyuan_v1_moe", "num_experts": 2, "head_dim": 8} | MOE | HEADS, ".wg."),
        ({"model_type": "jetmoe", "kv_channels": 8, "num_local_experts": 2} | MOE, ".router."),
        ({"model_type": "mamba", "state_size": 4} | MOE, "A_log"),
        (MOE | ZAMBA, "mamba.D"),
        ({"model_type": "rwkv", "attention_hidden_size": 16} | MOE, "time_mix"),
        ({"model_type": "modernbert-decoder", "pad_token_id": 0} | MOE | HEADS, "lm_head"),
    ],
)
def test_only_matrices_of_linear_maps_are_eligible(config: dict[str, Any], excluded: str) -> None:
    model = build(**config)
    assert any(excluded in f".{name}." for name in all_names(model))
    names = eligible_parameters(model)
    assert names
    assert not [name for name in names if excluded in f".{name}."]


def test_a_linear_map_that_is_no_module_is_eligible() -> None:
    names = eligible_parameters(build(**MOE | ZAMBA))
    assert "model.layers.0.mamba.x_proj_weight" in names


def test_what_text_does_not_reach_is_not_eligible() -> None:
    names = eligible_parameters(tiny_gemma3())
    assert names
    assert all(name.startswith("model.language_model.layers.") for name in names)


def test_layers_that_a_model_skips_without_images_are_not_eligible() -> None:
    config = MllamaTextConfig(**MOE | HEADS, cross_attention_layers=[0], pad_token_id=0)
    with torch.device("meta"):
        assert not eligible_parameters(MllamaForCausalLM(config))


def test_eligible_parameters_are_the_models_own(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    for name, parameter in eligible_parameters(model).items():
        assert parameter is model.get_parameter(name)


def test_density_counts_all_parameters_embeddings_too(tiny_llama: Path) -> None:
    on_disk = load_file(tiny_llama / "model.safetensors")
    expected = sum(tensor.numel() for tensor in on_disk.values())
    model = load(tiny_llama)
    assert total_parameters(model) == expected
    assert sum(tensor.numel() for tensor in eligible_parameters(model).values()) < expected


def test_tied_parameters_count_once(tiny_llama: Path, tiny_tied_llama: Path) -> None:
    head = COMMON["vocab_size"] * COMMON["hidden_size"]
    assert total_parameters(load(tiny_tied_llama)) == total_parameters(load(tiny_llama)) - head


# --- locating on disk --------------------------------------------------------------------------


def all_names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_each_checkpoint_tensor_is_the_strided_view_that_its_block_says(base: Path) -> None:
    model, reader = load(base), CheckpointReader(base)
    for name, record in describe(model, all_names(model), base).items():
        flat = model.get_parameter(name).reshape(-1)
        for block in record.blocks:
            view = torch.as_strided(flat, block.shape, block.strides, block.offset)
            on_disk = reader.read(block.key)
            assert on_disk.dtype == DTYPES[record.dtype]
            assert np.array_equal(on_disk.astype(np.float32), view.float().numpy()), block.key


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_5", "llama4"])
def test_the_text_tower_of_a_model_with_eyes_is_found_in_its_published_checkpoint(
    model_type: str, tmp_path: Path
) -> None:
    reader = CheckpointReader(save_tiny_vlm(tmp_path, model_type))
    model = load(tmp_path)
    empty = build_empty(resolve_base(str(tmp_path)), reader.keys())
    names = list(eligible_parameters(model))
    records = describe(model, names, tmp_path)
    assert describe(empty, names, tmp_path) == records
    for name, record in records.items():
        flat = model.get_parameter(name).reshape(-1)
        for block in record.blocks:
            view = torch.as_strided(flat, block.shape, block.strides, block.offset)
            assert np.array_equal(reader.read(block.key), view.numpy()), block.key


def test_blocks_name_every_checkpoint_tensor_once_and_hold_every_entry(base: Path) -> None:
    model = load(base)
    records = describe(model, all_names(model), base)
    keys = [block.key for record in records.values() for block in record.blocks]
    assert sorted(keys) == CheckpointReader(base).keys()
    for record in records.values():
        assert sum(int(np.prod(block.shape)) for block in record.blocks) == record.numel


def test_fused_experts_are_one_block_for_each_expert_matrix(tiny_mixtral: Path) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    record = describe(load(tiny_mixtral), [name], tiny_mixtral)[name]
    prefix = "model.layers.1.block_sparse_moe.experts"
    expected = {f"{prefix}.{expert}.{w}.weight" for expert in range(4) for w in ("w1", "w3")}
    assert {block.key for block in record.blocks} == expected


def test_records_are_fit_to_be_written(base: Path) -> None:
    model = load(base)
    for name, record in describe(model, all_names(model), base).items():
        assert record_from_json(record_to_json(record), name) == record


def test_a_dimension_of_one_entry_has_a_stride_that_the_format_allows(tmp_path: Path) -> None:
    """A single expert is a fused tensor of one slice."""
    config = GptOssConfig(**COMMON, num_local_experts=1, head_dim=8)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    names = list(eligible_parameters(model))
    for name, record in describe(model, names, tmp_path).items():
        assert record_from_json(record_to_json(record), name) == record


def test_the_dtype_recorded_is_the_checkpoints_whatever_was_loaded(tiny_mixtral: Path) -> None:
    model = load(tiny_mixtral, torch.float32)
    records = describe(model, eligible_parameters(model), tiny_mixtral)
    assert {record.dtype for record in records.values()} == {"bfloat16"}


def test_a_tied_head_is_recorded_beside_the_embeddings(tiny_tied_llama: Path) -> None:
    name = "model.embed_tokens.weight"
    model = load(tiny_tied_llama)
    assert describe(model, [name], tiny_tied_llama)[name].tied_keys == ("lm_head.weight",)


def test_a_tied_head_that_comes_first_is_found_as_the_embeddings_of_the_file(
    tmp_path: Path,
) -> None:
    save_checkpoint("camembert", tmp_path)
    model = load_checkpoint_model(tmp_path)
    name, key = "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"
    record = describe(model, [name], tmp_path)[name]
    assert ([block.key for block in record.blocks], record.tied_keys) == ([key], (name,))
    from_memory = describe(model, [name], None)[name]
    assert ([block.key for block in from_memory.blocks], from_memory.tied_keys) == ([name], (key,))
    expected = to_numpy(model.get_parameter(name).flatten()[:40])
    for place in (record, from_memory):
        found = gather_entries(CheckpointReader(tmp_path), name, place, np.arange(40))
        assert np.array_equal(found, expected)


def test_an_untied_model_has_no_tied_keys(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    records = describe(model, all_names(model), tiny_llama)
    assert {record.tied_keys for record in records.values()} == {()}


def test_a_model_that_was_never_on_disk_is_described_from_memory(base: Path) -> None:
    model = load(base)
    names = eligible_parameters(model)
    assert describe(model, names, None) == describe(model, names, base)


def test_a_checkpoint_without_the_models_prefix_is_found_under_its_own_keys(
    tmp_path: Path, tiny_llama: Path
) -> None:
    path = tmp_path / "bare"
    shutil.copytree(tiny_llama, path)
    change_checkpoint(path, lambda all_: rename(all_, lambda key: key.removeprefix("model.")))
    model = load(path)
    assert torch.equal(model.get_parameter(UP), load(tiny_llama).get_parameter(UP))
    bare, full = describe(model, [UP], path)[UP], describe(model, [UP], tiny_llama)[UP]
    assert [block.key for block in bare.blocks] == [UP.removeprefix("model.")]
    assert replace(bare, blocks=full.blocks) == full


def test_parameters_that_share_a_tensor_on_disk_are_refused_by_what_they_are(
    tmp_path: Path,
) -> None:
    config = AutoConfig.for_model("hrm_text", **COMMON, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(ModelError, match=r"gqkv_proj.weight: .* keeps several parameters in one"):
        describe(model, eligible_parameters(model), tmp_path)


def test_a_missing_key_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "lacking"
    shutil.copytree(tiny_llama, path)
    change_checkpoint(path, lambda tensors: tensors.pop(UP))
    with pytest.raises(ModelError, match=f"{UP}: expected .* in .*lacking, found none"):
        describe(load(tiny_llama), [UP], path)


def test_a_missing_experts_matrix_is_refused_by_its_own_key(
    tmp_path: Path, tiny_mixtral: Path
) -> None:
    path = tmp_path / "lacking"
    shutil.copytree(tiny_mixtral, path)
    key = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    change_checkpoint(path, lambda tensors: tensors.pop(key))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(ModelError, match=f"^{name}: {key}: expected "):
        describe(load(tiny_mixtral), [name], path)


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "wide"
    shutil.copytree(tiny_llama, path)
    change_checkpoint(path, lambda tensors: tensors.update({UP: torch.zeros(48, 33)}))
    with pytest.raises(
        ModelError, match=rf"{UP}: expected \[48, 32\] in .*, found float32 \[48, 33\]"
    ):
        describe(load(tiny_llama), [UP], path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_a_tensor_of_a_dtype_that_cannot_be_edited_is_refused_by_name(
    tmp_path: Path, tiny_llama: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "other"
    shutil.copytree(tiny_llama, path)
    change_checkpoint(path, lambda tensors: tensors.update({UP: torch.zeros(48, 32).to(dtype)}))
    with pytest.raises(ModelError, match=f"{UP}: expected one of the dtypes float32, bfloat16"):
        describe(load(tiny_llama), [UP], path)


@pytest.mark.parametrize("name", ["model.layers.9.mlp.up_proj.weight", "lm_head.weight"])
def test_a_name_that_the_model_does_not_have_is_refused(tiny_tied_llama: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"{name}: expected a parameter of the model, found none"):
        describe(load(tiny_tied_llama), [name], tiny_tied_llama)


# --- logits of answers -------------------------------------------------------------------------

START, REST = (257, 10, 11, 12), [(20, 21, 22, 13), (23, 13), (24, 25, 13)]
ANSWERS = [(30, 31), (32, 33, 34, 258), (35,)]
SHARED = Layout(Batching.SHARED)


def batch_of(prompts: list[tuple[int, ...]]) -> Batch:
    return collate([Example(*pair) for pair in zip(prompts, ANSWERS, strict=True)], 256, SHARED)


BATCHES = {
    "a common start": batch_of([START + rest for rest in REST]),
    "nothing in common": batch_of(REST),
    "one prompt begins another": batch_of([START[:3], START, START + REST[0]]),
    "the same prompt": batch_of([START] * 3),
    "one row": collate([Example(START, ANSWERS[1])], 256, SHARED),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_answer_logits_are_those_of_each_row_alone(kind: str, base: Path) -> None:
    """The twin knows no padding and no cache: one row, all logits, then a slice."""
    model, batch = load(base, torch.float32), BATCHES[kind]
    found = answer_logits(model, batch)
    assert found.dtype == torch.float32
    assert found.shape == (*batch.answer_ids.shape, COMMON["vocab_size"])
    for row, mask in enumerate(batch.attention_mask.bool()):
        ids = batch.input_ids[row][mask]
        length = int((batch.answer_ids[row] >= 0).sum())
        full = model(ids[None], use_cache=False).logits[0]
        expected = full[len(ids) - length - 1 : len(ids) - 1]
        torch.testing.assert_close(found[row, :length], expected, rtol=1e-4, atol=1e-5)


def test_answer_logits_of_a_bfloat16_model_are_float32(tiny_llama_bf16: Path) -> None:
    assert answer_logits(load(tiny_llama_bf16), BATCHES["a common start"]).dtype == torch.float32


def test_gradients_flow_through_the_common_start(tiny_llama: Path) -> None:
    model, batch = load(tiny_llama), BATCHES["a common start"]
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(answer_logits(model, batch).square().sum(), embeddings)
    full = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    ).logits[:, -batch.answer_ids.shape[1] - 1 : -1]
    (expected,) = torch.autograd.grad(full.square().sum(), embeddings)
    assert gradient[list(START)].abs().sum() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "a type that transformers doesn't know"])
@pytest.mark.parametrize("load", [load_model, build_empty, load_tokenizer])
def test_a_checkpoints_own_code_never_runs(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    load: Callable[[BaseModel], object],
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        content |= {"model_type": model_type, "auto_map": {name: "own.Own" for name in names}}
        (folder / file).write_text(json.dumps(content))
    # Whoever asks gets a yes, as in `yes | safeweights eval`.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(ModelError):
        load(resolve_base(str(folder)))
    assert not mark.exists()


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_checkpoints_own_code_runs_where_it_is_trusted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (folder / "own.py").write_text(OWN_CODE)
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(content))
    for module in ("dynamic_module_utils", "utils.hub"):
        monkeypatch.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = resolve_base(str(folder))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(base)
    trusted = replace(base, trust_remote_code=True)
    assert type(load_model(trusted)).__name__ == type(build_empty(trusted)).__name__ == "OwnModel"
    assert load_tokenizer(trusted).pad_token_id is not None
    job = Job(folder, ComputeSettings(trust_remote_code=True))
    assert type(job.model).__name__ == "OwnModel"
