"""From a model's tokenizer to a judge's: tokens matched by their texts, positions by characters."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from safeweights_peft.errors import SelectionError

logger = logging.getLogger(__name__)

CACHE_DIR = Path(HF_HOME) / "safeweights_peft"
_BLANK = "\u2581"  # what SentencePiece writes for a space


class TokenTexts:
    """The text of each token of a byte-level or SentencePiece tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        description = describe_tokenizer(tokenizer)
        self._is_byte_level = '"ByteLevel"' in description
        if not self._is_byte_level and json.dumps(_BLANK) not in description:
            raise SelectionError(
                f"{tokenizer.name_or_path}: expected a byte-level or SentencePiece tokenizer, "
                "found another kind; use a guard with the model's own tokenizer"
            )
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

    def bytes_of(self, token_id: int) -> bytes:
        """Decode one token, which may be a part of a character; a special one has no text."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._is_byte_level and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        if not self._is_byte_level and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return str(token).replace(_BLANK, " ").encode()

    def spell(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """Decode a sequence; return its text and the span of characters of each token."""
        # A decoder that keeps incomplete bytes gives a character of several tokens to the last.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, spans = "", []
        for token_id in token_ids:
            start = len(text)
            text += decoder.decode(self.bytes_of(token_id))
            spans.append((start, len(text)))
        return text, spans


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe a tokenizer in JSON, the same for two that cut every text alike."""
    if not tokenizer.is_fast:
        raise SelectionError(
            f"{tokenizer.name_or_path}: expected a fast tokenizer, found a slow one; save it as "
            "tokenizer.json"
        )
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # left by the last call
        description.pop(state, None)
    return json.dumps(description)


def compute_overlaps(
    written: Sequence[tuple[int, int]], read: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Compute the fraction of each of U read spans that lies in each of T written ones, (U, T)."""
    ours = torch.tensor(written, dtype=torch.float32).reshape(-1, 2)
    theirs = torch.tensor(read, dtype=torch.float32).reshape(-1, 2)
    ends = torch.minimum(theirs[:, None, 1], ours[None, :, 1])
    starts = torch.maximum(theirs[:, None, 0], ours[None, :, 0])
    lengths = (theirs[:, 1] - theirs[:, 0]).clamp_min(1)
    return (ends - starts).clamp_min(0) / lengths[:, None]


@dataclass(frozen=True, eq=False)
class VocabularyTransfer:
    """For each of V tokens of a model, the judge's tokens that its text is read as."""

    # (V,) int64, the number of a token's pieces: 0 for special tokens and parts of a character.
    counts: torch.Tensor
    pieces: torch.Tensor  # int64, the judge's token ids, token by token
    weights: torch.Tensor  # float32, of the pieces; a token's sum to 1

    @property
    def has_text(self) -> torch.Tensor:
        """Which tokens have a text of their own, (V,) bool."""
        return self.counts > 0

    def carry(self, derivative: torch.Tensor) -> torch.Tensor:
        """Carry a derivative, (T, W), over from the judge's vocabulary to the model's, (T, V)."""
        tokens = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        carried = derivative.new_zeros(len(derivative), len(self.counts))
        return carried.index_add_(1, tokens, derivative[:, self.pieces] * self.weights)


def load_transfer(
    tokenizer: PreTrainedTokenizerBase, judge_tokenizer: PreTrainedTokenizerBase
) -> VocabularyTransfer:
    """Load the transfer between two tokenizers from a cache, or build it."""
    both = describe_tokenizer(tokenizer) + describe_tokenizer(judge_tokenizer)
    path = CACHE_DIR / f"transfer-{hashlib.sha256(both.encode()).hexdigest()[:24]}.safetensors"
    shape = len(tokenizer), len(judge_tokenizer)
    tensors = _read_cache(path, shape)
    if tensors is None:
        tensors = _build(TokenTexts(tokenizer), judge_tokenizer, shape[0])
        _write_cache(path, tensors)
    return VocabularyTransfer(**tensors)


def _build(
    texts: TokenTexts, judge_tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, torch.Tensor]:
    by_token = [_decode(texts.bytes_of(token_id)) for token_id in range(count)]
    # One batch: a call for each of 100,000 tokens would take far longer.
    words = [text for text in by_token if text]
    cuts = iter(judge_tokenizer(words, add_special_tokens=False)["input_ids"] if words else ())
    rows = [Counter(next(cuts)) if text else Counter() for text in by_token]
    pieces = [(piece, row[piece] / row.total()) for row in rows for piece in sorted(row)]
    return {
        "counts": torch.tensor([len(row) for row in rows], dtype=torch.int64),
        "pieces": torch.tensor([piece for piece, _ in pieces], dtype=torch.int64),
        "weights": torch.tensor([weight for _, weight in pieces], dtype=torch.float32),
    }


def _decode(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _write_cache(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, str(draft))
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s: expected to keep a table there, could not (%s)", path, error)


def _read_cache(path: Path, shape: tuple[int, int]) -> dict[str, torch.Tensor] | None:
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError):
        return None
    return tensors if _is_sound(tensors, shape) else None


def _is_sound(tensors: dict[str, Any], shape: tuple[int, int]) -> bool:
    # Checked because the ids index embeddings, and anybody's program may have written the file.
    if set(tensors) != {"counts", "pieces", "weights"}:
        return False
    counts, pieces, weights = tensors["counts"], tensors["pieces"], tensors["weights"]
    return bool(
        counts.shape == (shape[0],)
        and (counts >= 0).all()
        and pieces.shape == weights.shape == (int(counts.sum()),)
        and (pieces >= 0).all()
        and (pieces < shape[1]).all()
        and weights.isfinite().all()
    )
