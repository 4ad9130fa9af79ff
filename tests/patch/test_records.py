"""Whose entries are these: the base's, the merged ones, or another model's?"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeweights_peft.delta import WEIGHT_DTYPES, Array, digest
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, FormatError
from safeweights_peft.patch.records import Mode, State, TensorRecord, check_state, state_of
from tests.tiny_files import dense

BASE, MERGED, OTHER = (np.array([number, 3], np.float32) for number in (1, 2, 4))
BYTES = st.binary(min_size=8, max_size=8)


def record_of(base: Array, merged: Array | None, dtype: str = "float32") -> TensorRecord:
    merged_digest = None if merged is None else digest(merged)
    record = dense("a.b", (4, 4), dtype, base_digest=digest(base))
    return replace(record, merged_digest=merged_digest)


@given(dtype=st.sampled_from([*WEIGHT_DTYPES]), base=BYTES, merged=BYTES | st.none(), other=BYTES)
def test_entries_are_told_apart_by_their_bits(
    dtype: str, base: bytes, merged: bytes | None, other: bytes
) -> None:
    def view(content: bytes) -> Array:
        return np.frombuffer(content, WEIGHT_DTYPES[dtype])

    record = record_of(view(base), None if merged is None else view(merged), dtype)
    for entries in filter(None, (base, merged, other)):
        expected = State.BASE if entries == base else State.OTHER
        expected |= State.MERGED if entries == merged else State.OTHER
        assert state_of(view(entries), record) is expected


def test_the_same_bytes_of_another_dtype_are_another_models() -> None:
    zeros = np.zeros(4, np.float16)
    assert state_of(zeros.view(WEIGHT_DTYPES["bfloat16"]), record_of(zeros, zeros, "float16")) is (
        State.OTHER
    )


def test_states_of_parameters_have_in_common_what_the_model_is() -> None:
    unmoved, moved = record_of(BASE, BASE), record_of(BASE, MERGED)
    assert state_of(BASE, unmoved) is State.EITHER
    assert state_of(BASE, unmoved) & state_of(MERGED, moved) is State.MERGED
    assert state_of(BASE, moved) & state_of(MERGED, moved) is State.OTHER


@pytest.mark.parametrize("mode", Mode)
def test_an_expected_state_is_returned(mode: Mode) -> None:
    record = record_of(BASE, MERGED)
    entries = {State.BASE: BASE, State.MERGED: MERGED}
    for expected in (mode.safe_state, State.EITHER):
        assert check_state("a", entries[mode.safe_state], record, expected) is mode.safe_state


@pytest.mark.parametrize(
    ("entries", "expected", "error", "message"),
    [
        (MERGED, State.BASE, AlreadyMergedError, "the base's entries, found the patch's merged"),
        (OTHER, State.BASE, BaseMismatchError, "the base that the patch was made for .*another"),
        (OTHER, State.EITHER, BaseMismatchError, "the base that the patch was made for .*another"),
        (BASE, State.MERGED, BaseMismatchError, ".*the base without it; merge the patch first$"),
        (
            OTHER,
            State.MERGED,
            BaseMismatchError,
            "the base with the safety patch merged in .*another",
        ),
    ],
)
def test_another_state_is_refused_by_name(
    entries: Array, expected: State, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^a.b: expected {message}") as caught:
        check_state("a.b", entries, record_of(BASE, MERGED), expected, artifact="patch", hint="!")
    assert type(caught.value) is error
    assert str(caught.value).endswith(f"({digest(OTHER)[7:19]}); !") == (entries is OTHER)


def test_a_patch_that_does_not_know_its_merged_entries_cannot_be_found_merged() -> None:
    with pytest.raises(FormatError, match=r"^a\.b: expected a merged_digest in the safety patch"):
        check_state("a.b", BASE, record_of(BASE, None), State.MERGED)
