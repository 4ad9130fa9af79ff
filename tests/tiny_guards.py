"""Tiny guards and classifiers with random weights, whose tokenizers cut text in their own ways."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.tiny_models import CHAT_TEMPLATE, COMMON, END, PAD, START

MERGES = [("t", "h"), ("th", "e"), ("o", "u"), ("Ġ", "c"), ("Ġ", "th"), ("a", "n"), ("s", "a")]
PIECES = ["▁", "▁th", "▁c", "▁I", "an", "ou", "the", "sa", "fe", "un", "ing"]


def save_byte_level_tokenizer(path: Path, merges: list[tuple[str, str]] = MERGES) -> Path:
    """Save a byte-level BPE tokenizer with some merges and a ChatML template."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _save_tokenizer(backend, path)


def save_piece_tokenizer(path: Path) -> Path:
    """Save a tokenizer as SentencePiece makes them: a mark for spaces, bytes for what is rare."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + letters + PIECES
    scores = [(piece, -float(10 if len(piece) == 6 else 4 - len(piece))) for piece in pieces]
    backend = Tokenizer(models.Unigram([("<unk>", -20.0), *scores], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _save_tokenizer(backend, path)


def save_tiny_guard(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a Llama for the tokenizer that is in the directory already."""
    return _save_model(LlamaForCausalLM, path, dtype)


def save_tiny_classifier(path: Path, labels: list[str], problem: str | None = None) -> Path:
    """Save a Llama that classifies, for the tokenizer that is in the directory already."""
    by_id = dict(enumerate(labels))
    by_label = {label: place for place, label in by_id.items()}
    options = {"id2label": by_id, "label2id": by_label, "problem_type": problem}
    return _save_model(LlamaForSequenceClassification, path, torch.float32, **options)


def _save_tokenizer(backend: Tokenizer, path: Path) -> Path:
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=START, eos_token=END
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def _save_model(kind: type, path: Path, dtype: torch.dtype, **options: object) -> Path:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos")}
    config = LlamaConfig(**{**COMMON, **ids, "vocab_size": len(tokenizer), **options})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        kind(config).to(dtype).save_pretrained(path)
    return path
