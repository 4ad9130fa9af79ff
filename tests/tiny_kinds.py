"""Tiny models of every kind of memory, and the layout that each needs."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from safeweights_peft.data import Batching
from tests.tiny_models import COMMON

WINDOW = 12
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
GEMMA3N = {
    **{"vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    **{"activation_sparsity_pattern": [0.95, 0.0], "num_kv_shared_layers": 0},
}
WHISPER = {
    **{"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "decoder_start_token_id": 257,
}
MOSS = {
    "text_config": COMMON | {"model_type": "qwen3", "head_dim": 8},
    "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 512}
KINDS: dict[str, tuple[Batching, dict[str, Any]]] = {
    "llama": (Batching.SHARED, {}),
    "gpt2": (
        Batching.SHARED,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 64},
    ),
    # ALiBi that counts columns, padding included
    "mpt": (Batching.LEFT, MPT),
    # windows shorter than the rows: known to the cache, and, the last, to the architecture alone
    "gemma3_text": (Batching.LEFT, SLIDING | {"sliding_window": WINDOW}),
    "gpt_oss": (Batching.LEFT, SLIDING | {"sliding_window": WINDOW, "num_local_experts": 4}),
    "gpt_neo": (
        Batching.LEFT,
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    # states, beside keys and values or instead of them
    "qwen3_5_text": (Batching.LEFT, HYBRID | LINEAR),
    "mamba": (Batching.LEFT, {"state_size": 8, "time_step_rank": 4}),
    # a state that is right after a padded prompt, but is read on wrongly
    "minimax": (Batching.ALONE, HYBRID | {"block_size": 16, "num_local_experts": 4}),
    # padding of which the gradient is not finite
    "gemma3n_text": (Batching.ALONE, SLIDING | GEMMA3N),
    # positions that start after that of padding, but for `generate`
    "roberta": (Batching.ALONE, {"is_decoder": True}),
    # positions that `generate` counts over columns: distances, which padding before all leaves,
    # and rows of a table
    "moss_transcribe_diarize": (Batching.LEFT, MOSS),
    "whisper": (Batching.ALONE, WHISPER),
    # ignores masks altogether
    "rwkv": (Batching.ALONE, {"context_length": 512}),
}


def build(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **COMMON | KINDS[kind][1] | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()
