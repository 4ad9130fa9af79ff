"""Tiny random checkpoints of every architecture that transformers builds as a causal LM.

`SIZES` shrinks any config by the names of its settings; `VARIANTS` holds what an architecture needs
beside them, and second forms of one. Nothing is downloaded.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from tests.tiny_models import COMMON, save_tiny_tokenizer

Options = dict[str, Any]

MAX_PARAMETERS = 3_000_000  # more than that is a size that SIZES missed
WINDOW = 24  # of sliding attention: shorter than the rows, so that a window that slips is seen

# Several to a line, each line a group.
SIZES: Options = {
    **COMMON,
    **{"head_dim": 8, "is_decoder": True, "use_mamba_kernels": False},
    # GPT-2 and its kin; OPT, BART and theirs
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 48, "n_ctx": 512},
    **{"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "rotary_dim": 4},
    **{"ffn_dim": 48, "word_embed_proj_dim": 32, "d_inner": 48, "dff": 48, "emb_dim": 32},
    **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
    **{"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "embedding_size": 32},
    # experts
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_shared_experts": 1},
    **{"shared_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    # latent attention
    **{"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8},
    # state space and linear attention
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64},
    **{"mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 16},
    **{"mamba_dt_rank": 4, "state_size": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": 8},
    **{"linear_num_heads": 4},
    # windows
    **{"sliding_window": WINDOW, "window_size": WINDOW, "attention_window_size": WINDOW},
    # images
    **{"image_size": 16, "patch_size": 4, "depth": 2, "num_heads": 4, "embed_dim": 32},
    **{"out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2},
    **{"num_position_embeddings": 16, "fullatt_block_indexes": [1], "projector_input_dim": 32},
    **{"deepstack_visual_indexes": [0], "projector_output_dim": 32, "vision_output_dim": 32},
}

SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
WHOLE_HEADS = {"num_key_value_heads": 4}
LATENT = {**WHOLE_HEADS, "head_dim": 4}  # rotary embeddings are of the rotated part alone
IMAGE_TOKENS = {
    **{"image_token_id": 250, "video_token_id": 251, "image_token_index": 250},
    **{"vision_start_token_id": 252, "vision_end_token_id": 253},
    **{"boi_token_id": 251, "eoi_token_id": 252, "boi_token_index": 251, "eoi_token_index": 252},
}
GEMMA3N = {
    **{
        "num_hidden_layers": 4,
        "layer_types": 2 * SLIDING["layer_types"],
        "num_kv_shared_layers": 2,
    },
    **{"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
GEMMA4 = {
    **{"num_hidden_layers": 4, "layer_types": 2 * SLIDING["layer_types"], "global_head_dim": 8},
    **{"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8},
}
GEMMA4_DENSE = {**GEMMA4, "num_experts": None, "moe_intermediate_size": None}
LLAMA4 = {"intermediate_size_mlp": 40, "attention_chunk_size": 128, "interleave_moe_layer_step": 2}
MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    "sliding_window": None,
}

# Options beside SIZES by name; the name is the model type where no `model_type` says another.
VARIANTS: dict[str, Options] = {
    "llama_tied_bias": {
        **{"model_type": "llama", "tie_word_embeddings": True},
        **{"attention_bias": True, "mlp_bias": True},
    },
    "qwen2_sliding": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": SLIDING,
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4_DENSE,
    "gemma4_text_moe": {
        **{**GEMMA4, "model_type": "gemma4_text"},
        **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "falcon": {"multi_query": True},
    "falcon_alibi": {"model_type": "falcon", "alibi": True},
    "falcon_new": {
        **{"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    },
    "cohere2": SLIDING,
    "olmo3": SLIDING,
    "deepseek_v2": {**LATENT, "n_group": None, "topk_group": None},
    "deepseek_v3": WHOLE_HEADS,
    "deepseek_v32": WHOLE_HEADS,
    "axk1": WHOLE_HEADS,
    "axk2": WHOLE_HEADS,
    "glm4_moe_lite": WHOLE_HEADS,
    "glm_moe_dsa": WHOLE_HEADS,
    "minicpm3": WHOLE_HEADS,
    "youtu": WHOLE_HEADS,
    "dots1": WHOLE_HEADS,
    "dots3_note_text": WHOLE_HEADS,
    "llama4_text": LLAMA4,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            **{"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "minimax": {**LINEAR, "block_size": 16},
    "jetmoe": {"kv_channels": 8},
    "longcat_flash": {
        **{**LATENT, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24},
        **{"zero_expert_num": 2, "moe_topk": 2},
    },
    "afmoe": {"num_shared_experts": 1, "global_attn_every_n_layers": 2},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"time_step_rank": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "qwen3_next": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention", "moe", "mlp"], "num_hidden_layers": 4},
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
        **{"chunk_size": 16, "moe_shared_expert_intermediate_size": 24},
    },
    "kimi_linear": {**LINEAR, **WHOLE_HEADS, "q_lora_rank": None},
    "olmo_hybrid": LINEAR,
    "bailing_hybrid": {**LINEAR, **WHOLE_HEADS},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1},
    "rwkv": {"context_length": 512, "intermediate_size": 64},
    "zamba": {"layers_block_type": 2 * ["mamba", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {
        **SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING["layer_types"]
        },
    },
    "reformer": {
        **{"attn_layers": ["local", "lsh"], "attention_head_size": 8, "feed_forward_size": 48},
        "axial_pos_embds": False,
    },
    "roc_bert": {
        **{"pronunciation_vocab_size": 259, "pronunciation_embed_dim": 32},
        **{"shape_vocab_size": 259, "shape_embed_dim": 32},
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "gemma3": {
        **IMAGE_TOKENS,
        **{"text_config": SLIDING, "vision_config": {"vision_use_head": False}},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        **{**IMAGE_TOKENS, "text_config": GEMMA4_DENSE, "audio_config": None},
        "vision_config": {**WHOLE_HEADS, "position_embedding_size": 64},
    },
    "llama4": {
        **{**IMAGE_TOKENS, "text_config": LLAMA4},
        "vision_config": {"intermediate_size": 128, "pixel_shuffle_ratio": 0.5},
    },
    "got_ocr2": {
        **{**IMAGE_TOKENS, "text_config": {}},
        "vision_config": {"output_channels": 32, "mlp_dim": 48, "global_attn_indexes": [1]},
    },
    "mllama": {"text_config": {"cross_attention_layers": [1]}, **IMAGE_TOKENS},
    "qwen2_vl": {**IMAGE_TOKENS, "text_config": MROPE},
    "qwen2_5_vl": {**IMAGE_TOKENS, "text_config": MROPE, "vision_config": {"window_size": 16}},
    "qwen3_vl": {**IMAGE_TOKENS, "text_config": MROPE},
    "qwen3_5_moe": {**IMAGE_TOKENS, "text_config": LINEAR},
    "qwen3_5": {**IMAGE_TOKENS, "text_config": LINEAR},
    "blt": {
        **{"encoder_hash_byte_group_vocab": 64, "encoder_config": {"hidden_size_global": 32}},
        "decoder_config": {"hidden_size_global": 32},
    },
    "dots3_note": {
        **{**IMAGE_TOKENS, "audio_token_id": 249, "text_config": WHOLE_HEADS},
        "vision_config": {
            **{"adapter_in_dim": 32, "adapter_out_dim": 32, "rope_parameters": None},
            "mlp_layer_types": ["dense", "sparse"],
        },
        "audio_config": {
            **{"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
            "feature_size": 16,
        },
    },
    "phi4_multimodal": {
        "audio_config": {
            **{"num_blocks": 2, "ext_pw_out_channel": 32, "nemo_conv_channels": 16},
            "depthwise_separable_out_channel": 32,
        },
    },
}
AUDIO = "transformers maps it to a model of audio codes, and that to another config"
DRAFTS = "it drafts for another model, reads that one's keys and values, and takes no text"
NO_TEXT = {
    **{"gemma4_assistant": DRAFTS, "gemma4_unified_assistant": DRAFTS},
    **{"musicgen": AUDIO, "musicgen_melody": AUDIO},
}
# What transformers can't run in bfloat16.
FLOAT32 = ("xlnet",)
# Saved with their vision towers, as they are published; AutoModelForCausalLM may leave those out.
VISION = ("gemma3", "gemma4", "llama4", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


def list_architectures() -> list[str]:
    """Name every architecture: the variants, and the other model types that transformers maps."""
    return [*VARIANTS, *sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(VARIANTS))]


def build_config(name: str) -> PreTrainedConfig:
    """Build the smallest config of an architecture."""
    options = dict(VARIANTS.get(name, {}))
    return _shrink(CONFIG_MAPPING[options.pop("model_type", name)], options)


def save_checkpoint(name: str, path: Path) -> PreTrainedModel:
    """Save a random model of an architecture with the tiny tokenizer, and load it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _build(name)
        with torch.no_grad():  # so that norms and biases aren't constants
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = SIZES["eos_token_id"]
    model.generation_config.pad_token_id = SIZES["pad_token_id"]
    dtype = torch.float32 if name in FLOAT32 else torch.bfloat16
    model.to(dtype).save_pretrained(path)
    # Once more as loaded: what transformers keeps in float32, as routers' biases, is so on disk
    # where models are published.
    model = load_as_saved(path)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(path)
    save_tiny_tokenizer(path)
    return model


def load_checkpoint_model(path: Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint as the package does: a causal LM, or else the class that saved it."""
    if type(AutoConfig.from_pretrained(path)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return load_as_saved(path, **options)
    model = AutoModelForCausalLM.from_pretrained(path, **{"dtype": "auto", **options})
    return model.eval()


def load_as_saved(path: Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint into the class that saved it."""
    loader = getattr(transformers, AutoConfig.from_pretrained(path).architectures[0])
    return loader.from_pretrained(path, **{"dtype": "auto", **options}).eval()


def find_kind(name: str, model: PreTrainedModel) -> str:
    """Say in which table of the page a reader looks for a model."""
    if name in VISION or getattr(model.config, "vision_config", None):
        return "With images"
    types = {type(module).__name__.lower() for module in model.modules()}
    recurrent = ("mamba", "delta", "recurrent", "rwkv", "xlstm", "shortconv", "linearattention")
    if any(word in name for name in types for word in recurrent):
        return "State space and hybrid"
    experts = any("expert" in name for name, _ in model.named_parameters())
    return "Mixture of experts" if experts else "Dense"


def _build(name: str) -> PreTrainedModel:
    if name in NO_TEXT:
        raise ValueError(NO_TEXT[name])
    config = build_config(name)
    with torch.device("meta"):  # the size of what SIZES missed may be any
        size = sum(parameter.numel() for parameter in _from_config(name, config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{name}: {size:,} parameters, more than {MAX_PARAMETERS:,}")
    return _from_config(name, config)


def _from_config(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    loader = AutoModelForImageTextToText if name in VISION else AutoModelForCausalLM
    model: PreTrainedModel = loader.from_config(config)
    assert isinstance(model, nn.Module)
    return model


def _shrink(config_class: type[PreTrainedConfig], options: Options) -> PreTrainedConfig:
    """Build a config with all sizes that it knows made small, those of its parts too."""
    known = set(inspect.signature(config_class.__init__).parameters)
    small = {key: value for key, value in SIZES.items() if key in known}
    options = dict(options)
    default = config_class() if config_class.sub_configs else None
    for key, declared in config_class.sub_configs.items():
        # Declared may be AutoConfig alone; absent by default, such as an audio tower, unless given.
        default_part, part = getattr(default, key, None), options.get(key, {})
        part_class = declared if default_part is None else type(default_part)
        if part is not None and (part or default_part is not None):
            options[key] = _shrink(part_class, part).to_dict()
    return config_class(**{**small, **options})
