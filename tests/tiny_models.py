"""Tiny language models and a tokenizer, built from configs and saved to disk.

Every builder writes a complete Hugging Face checkpoint directory with random (seeded) weights, so
that tests cross the same files and loaders as real models do. Nothing is downloaded.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 256 + 3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Small enough to build in milliseconds; a large initializer range, so that outputs are not flat.
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}


def save_tiny_llama(
    path: Path | str,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a two-layer Llama of 32,000 weights; ``tied`` shares lm_head with the embeddings.

    Args:
        path: directory to write, made if missing.
        tied: whether lm_head is the embedding matrix, as in small real models.
        dtype: dtype of every weight.
        seed: another seed gives another base.
        max_shard_size: for instance ``"20KB"`` to get a sharded checkpoint.

    Returns:
        The directory.
    """
    config = LlamaConfig(**COMMON, tie_word_embeddings=tied)
    return _save(LlamaForCausalLM, config, path, dtype, seed, max_shard_size)


def save_tiny_mixtral(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a two-layer Mixtral of four experts: fused in memory, one matrix each on disk.

    Args:
        path: directory to write, made if missing.
        dtype: dtype of every weight.
        seed: another seed gives another base.
        max_shard_size: for instance ``"20KB"`` to get a sharded checkpoint.

    Returns:
        The directory.
    """
    config = MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    return _save(MixtralForCausalLM, config, path, dtype, seed, max_shard_size)


def save_tiny_qwen3_moe(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a two-layer Qwen3-MoE of four experts, with q_norm and k_norm.

    Args:
        path: directory to write, made if missing.
        dtype: dtype of every weight.
        seed: another seed gives another base.
        max_shard_size: for instance ``"20KB"`` to get a sharded checkpoint.

    Returns:
        The directory.
    """
    config = Qwen3MoeConfig(
        **COMMON, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    )
    return _save(Qwen3MoeForCausalLM, config, path, dtype, seed, max_shard_size)


def save_tiny_vlm(path: Path | str, model_type: str) -> Path:
    """Save a model with eyes as it is published: ``qwen2_vl``, ``qwen3_5`` or ``llama4``."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
    vision = small | {"depth": 1, "out_hidden_size": 32, "num_position_embeddings": 16}
    text = dict(COMMON)
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 32}
        text["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
        }  # fmt: skip
    elif model_type == "qwen3_5":
        linear = {f"linear_{what}_head_dim": 8 for what in ("key", "value")}
        heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 8}
        text |= {"layer_types": ["linear_attention", "full_attention"], **linear, **heads}
    else:
        vision = small | {
            "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
            "intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32,
            "vision_output_dim": 32,
        }  # fmt: skip
        experts = {"num_local_experts": 2, "intermediate_size_mlp": 40, "head_dim": 8}
        text |= {**experts, "interleave_moe_layer_step": 2, "attention_chunk_size": 128}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    model_class = AutoModelForImageTextToText._model_mapping[type(config)]
    return _save(model_class, config, path, torch.float32, 0, "5GB")


def save_tiny_tokenizer(path: Path | str) -> Path:
    """Save a byte-level tokenizer (one token per byte, no merges) with a ChatML template.

    Args:
        path: directory to write, made if missing; may hold a model already.

    Returns:
        The directory.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=START, eos_token=END
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return Path(path)


def _save(
    model_class: type[PreTrainedModel],
    config: object,
    path: Path | str,
    dtype: torch.dtype,
    seed: int,
    max_shard_size: str,
) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    if dtype != model.dtype:  # a cast that does nothing warns of Llama 4's complex buffers
        model.to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)
