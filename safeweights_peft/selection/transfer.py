"""From one tokenizer to another: which characters a token stands for, and in whose vocabulary.

A guard with a tokenizer of its own reads an answer in other tokens than the model wrote. Positions
are matched by the characters that both stand for; a model's token is matched with the guard's by
its text.
"""

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
_BLANK = "\u2581"
"""What SentencePiece writes for a space."""


class TokenTexts:
    """The text of each token of a byte-level or SentencePiece tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find out how the tokenizer writes bytes."""
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(each for each, token in added.items() if token.special)
        described = identity(tokenizer)
        self._is_byte_level = '"ByteLevel"' in described
        if not self._is_byte_level and json.dumps(_BLANK) not in described:
            raise SelectionError(
                f"{tokenizer.name_or_path}: expected a byte-level or SentencePiece tokenizer, "
                "found another kind; use a guard with the model's own tokenizer"
            )
        self._byte_of = {char: byte for byte, char in bytes_to_unicode().items()}

    def bytes_of(self, token_id: int) -> bytes:
        """Decode one token."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._is_byte_level and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        if not self._is_byte_level and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return str(token).replace(_BLANK, " ").encode()

    def spell(self, token_ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """Decode a sequence, and tells which characters each token stands for.

        A character whose bytes are spread over several tokens belongs to the last of them.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, spans = "", []
        for token_id in token_ids:
            start = len(text)
            text += decoder.decode(self.bytes_of(token_id))
            spans.append((start, len(text)))
        return text, spans


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe a tokenizer so that two that do the same are described alike."""
    if not tokenizer.is_fast:
        raise SelectionError(
            f"{tokenizer.name_or_path}: expected a fast tokenizer, found a slow one; save it as "
            "tokenizer.json"
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for passing in ("truncation", "padding"):  # of its last call
        described.pop(passing, None)
    return json.dumps(described)


def overlaps(written: Sequence[tuple[int, int]], read: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Tell how far each token that is read stands for the text of each that was written."""
    ours = torch.tensor(written, dtype=torch.float32).reshape(-1, 2)
    theirs = torch.tensor(read, dtype=torch.float32).reshape(-1, 2)
    ends = torch.minimum(theirs[:, None, 1], ours[None, :, 1])
    starts = torch.maximum(theirs[:, None, 0], ours[None, :, 0])
    lengths = (theirs[:, 1] - theirs[:, 0]).clamp_min(1)
    return (ends - starts).clamp_min(0) / lengths[:, None]


@dataclass(frozen=True, eq=False)
class VocabularyTransfer:
    """For each token of a model, the guard's tokens that its text is read as.

    Tokens without a text of their own (special ones, parts of a character) have no pieces.

    Attributes:
        counts: (V,) int64: how many different pieces each token has.
        pieces: int64: ids of the guard, token by token.
        weights: float32: of a token's pieces; they sum to 1.
    """

    counts: torch.Tensor
    pieces: torch.Tensor
    weights: torch.Tensor

    @property
    def known(self) -> torch.Tensor:
        """(V,) bool: which tokens have a text of their own."""
        return self.counts > 0

    def carry(self, derivative: torch.Tensor) -> torch.Tensor:
        """Carry a derivative over from the guard's vocabulary to the model's."""
        tokens = torch.arange(len(self.counts)).repeat_interleave(self.counts)
        carried = derivative.new_zeros(len(derivative), len(self.counts))
        return carried.index_add_(1, tokens, derivative[:, self.pieces] * self.weights)


def vocabulary_transfer(
    tokenizer: PreTrainedTokenizerBase, guard_tokenizer: PreTrainedTokenizerBase
) -> VocabularyTransfer:
    """Read each token of a model as the guard would; once for each pair, then from a cache."""
    both = identity(tokenizer) + identity(guard_tokenizer)
    path = CACHE_DIR / f"transfer-{hashlib.sha256(both.encode()).hexdigest()[:24]}.safetensors"
    shape = len(tokenizer), len(guard_tokenizer)
    cached = _read_cache(path, shape)
    if cached is None:
        cached = _build(TokenTexts(tokenizer), guard_tokenizer, shape[0])
        _write_cache(path, cached)
    return VocabularyTransfer(**cached)


def _build(
    texts: TokenTexts, guard_tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, torch.Tensor]:
    spelled = [_text_or_none(texts.bytes_of(token_id)) for token_id in range(count)]
    known = [text for text in spelled if text]
    read = iter(guard_tokenizer(known, add_special_tokens=False)["input_ids"] if known else ())
    rows = [Counter(next(read)) if text else Counter() for text in spelled]
    pieces = [(piece, row[piece] / row.total()) for row in rows for piece in sorted(row)]
    return {
        "counts": torch.tensor([len(row) for row in rows], dtype=torch.int64),
        "pieces": torch.tensor([piece for piece, _ in pieces], dtype=torch.int64),
        "weights": torch.tensor([weight for _, weight in pieces], dtype=torch.float32),
    }


def _text_or_none(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _write_cache(path: Path, built: dict[str, torch.Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(built, str(draft))
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s: expected to keep a table there, could not (%s)", path, error)


def _read_cache(path: Path, shape: tuple[int, int]) -> dict[str, torch.Tensor] | None:
    """Read a transfer that was built before; none if it isn't there or isn't whole."""
    try:
        cached = load_file(str(path))
    except (OSError, SafetensorError):
        return None
    return cached if _is_sound(cached, shape) else None


def _is_sound(cached: dict[str, Any], shape: tuple[int, int]) -> bool:
    if set(cached) != {"counts", "pieces", "weights"}:
        return False
    counts, pieces, weights = cached["counts"], cached["pieces"], cached["weights"]
    return bool(
        counts.shape == (shape[0],)
        and (counts >= 0).all()
        and pieces.shape == weights.shape == (int(counts.sum()),)
        and (pieces >= 0).all()
        and (pieces < shape[1]).all()
        and weights.isfinite().all()
    )
