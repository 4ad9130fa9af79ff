"""From one tokenizer to another, held to slow and obvious twins."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection import transfer
from safeweights_peft.selection.transfer import (
    TokenTexts,
    VocabularyTransfer,
    compute_overlaps,
    load_transfer,
)
from tests.tiny_guards import save_byte_level_tokenizer, save_piece_tokenizer
from tests.tiny_models import END, save_tiny_tokenizer

TEXTS = ["the safe cheque", " I can't", "naïve – 日本 🙂", "a_b  c\n\n", ""]
KINDS = {"bytes": save_byte_level_tokenizer, "pieces": save_piece_tokenizer}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transfer, "CACHE_DIR", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(KINDS[request.param](tmp_path / "tokenizer"))


@pytest.fixture
def other(tmp_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path / "other"))


def dense(built: VocabularyTransfer, other: PreTrainedTokenizerBase) -> torch.Tensor:
    matrix, at = torch.zeros(len(built.counts), len(other)), 0
    for token, count in enumerate(built.counts.tolist()):
        for entry in range(at, at + count):
            matrix[token, built.pieces[entry]] += built.weights[entry]
        at += count
    return matrix


@pytest.mark.parametrize("text", TEXTS)
def test_a_sequence_spells_the_text_that_it_came_from(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled, spans = TokenTexts(tokenizer).spell(ids)
    assert spelled == text
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    assert "".join(spelled[start:end] for start, end in spans) == text


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(other) -> None:
    spelled, spans = TokenTexts(other).spell(other("é!", add_special_tokens=False)["input_ids"])
    assert (spelled, spans) == ("é!", [(0, 0), (0, 1), (1, 2)])


def test_a_special_token_stands_for_no_character(tokenizer) -> None:
    assert TokenTexts(tokenizer).bytes_of(tokenizer.convert_tokens_to_ids(END)) == b""


def test_an_answer_cut_within_a_character_can_be_spelled(other) -> None:
    ids = other("a🙂", add_special_tokens=False)["input_ids"][:-1]
    spelled, spans = TokenTexts(other).spell(ids)
    assert spelled == "a"
    assert spans[-1] == (1, 1)


def test_overlaps_are_counted_character_by_character() -> None:
    written, read = [(0, 3), (3, 3), (3, 7), (7, 8)], [(0, 2), (2, 6), (7, 8), (9, 9)]
    actual = compute_overlaps(written, read)
    for u, (start, end) in enumerate(read):
        for t, (first, last) in enumerate(written):
            common = len(set(range(start, end)) & set(range(first, last)))
            assert actual[u, t] == pytest.approx(common / max(end - start, 1))


def test_each_token_is_read_as_the_other_tokenizer_cuts_its_text(tokenizer, other) -> None:
    texts, pieces = TokenTexts(tokenizer), dense(load_transfer(tokenizer, other), other)
    assert pieces.shape == (len(tokenizer), len(other))
    for token_id in range(len(tokenizer)):
        raw = texts.bytes_of(token_id)
        text = raw.decode(errors="replace")
        expected = torch.zeros(len(other))
        if raw and "\ufffd" not in text:
            cut = other(text, add_special_tokens=False)["input_ids"]
            for piece in cut:
                expected[piece] += 1 / len(cut)
        torch.testing.assert_close(pieces[token_id], expected)


def test_a_derivative_is_carried_as_the_mean_over_a_tokens_pieces(tokenizer, other) -> None:
    built = load_transfer(tokenizer, other)
    derivative = torch.randn(4, len(other))
    torch.testing.assert_close(built.carry(derivative), derivative @ dense(built, other).T)


def test_a_transfer_is_built_once(tokenizer, other, monkeypatch: pytest.MonkeyPatch) -> None:
    built = dense(load_transfer(tokenizer, other), other)
    monkeypatch.setattr(transfer, "_build", None)
    assert torch.equal(dense(load_transfer(tokenizer, other), other), built)


@pytest.mark.parametrize("spoil", [b"", b"not a tensor file"])
def test_a_spoilt_cache_is_built_anew(tokenizer, other, cache: Path, spoil: bytes) -> None:
    built = dense(load_transfer(tokenizer, other), other)
    (file,) = cache.iterdir()
    file.write_bytes(spoil)
    assert torch.equal(dense(load_transfer(tokenizer, other), other), built)


def test_an_index_in_the_cache_is_not_trusted(tokenizer, other, cache: Path) -> None:
    built = dense(load_transfer(tokenizer, other), other)
    (file,) = cache.iterdir()
    stored = transfer.load_file(str(file))
    stored["pieces"][0] = len(other)
    transfer.save_file(stored, str(file))
    assert torch.equal(dense(load_transfer(tokenizer, other), other), built)


def test_a_slow_tokenizer_is_refused(other) -> None:
    class Slow:
        is_fast, name_or_path = False, "slow"

    with pytest.raises(SelectionError, match="slow: expected a fast tokenizer"):
        load_transfer(Slow(), other)
