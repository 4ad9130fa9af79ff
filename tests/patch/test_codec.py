"""Codings: what goes in comes out, and means what `docs/format.md` says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES, add_rounded, bits_differ, index_dtype
from safeweights_peft.patch.codec import (
    Coded,
    decode_gaps,
    decode_steps,
    decompress,
    encode_content,
    encode_indices,
    encode_steps,
    join,
    take_steps,
    value_of,
)
from safeweights_peft.patch.codec import _encode_gaps as encode_gaps
from safeweights_peft.patch.codec import _encode_steps as encode_some_steps
from safeweights_peft.patch.placement import GAPS, STEPS, Coding


def planes_of(coded: Coded, count: int, itemsize: int = 0) -> list[np.ndarray]:
    stream, stored = coded
    return decompress("here", stored, stream.sizes, stream.frames(count, itemsize))


def numbers(planes: list[np.ndarray]) -> list[int]:
    """Put byte planes together, number by number: the slow, obvious way."""
    return [
        sum(int(byte) << (8 * place) for place, byte in enumerate(bytes_))
        for bytes_ in zip(*planes, strict=True)
    ]


def walk_gaps(symbols: list[int], width: int) -> list[int]:
    """Read gaps symbol by symbol."""
    indices, at = [], -1
    for symbol in symbols:
        at += symbol
        if symbol < 256**width - 1:
            at += 1
            indices.append(at)
    return indices


def walk_steps(planes: list[np.ndarray], width: int, itemsize: int) -> list[int]:
    """Read steps number by number, as signed ones."""
    narrow, wide = numbers(planes[:width]), iter(numbers(planes[width:]))
    escape = 256**width // 2
    steps = []
    for step in narrow:
        bits = 8 * width
        if width < itemsize and step == escape:
            step, bits = next(wide), 8 * itemsize
        steps.append(step - (1 << bits) if step >> (bits - 1) else step)
    assert next(wide, None) is None
    return steps


def neighbours(dtype: str) -> list[int]:
    """All numbers of a dtype by bits, from the most negative to the most positive."""
    bits = 8 * WEIGHT_DTYPES[dtype].itemsize
    half = 1 << (bits - 1)
    return [half + magnitude for magnitude in reversed(range(half))] + list(range(half))


@st.composite
def selections(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Ascending indices with gaps of every size, and the numel of their tensor."""
    gaps = st.integers(0, 3) | st.integers(250, 520) | st.integers(65000, 70000)
    gaps |= st.integers(2**31 - 9, 2**33)
    taken = np.cumsum(np.array(draw(st.lists(gaps, max_size=40)), np.int64) + 1) - 1
    numel = int(taken[-1]) + draw(st.integers(1, 9)) if taken.size else 5
    return taken.astype(index_dtype(numel)), numel


@settings(deadline=None)
@given(selections())
def test_indices_survive_every_coding(selection: tuple[np.ndarray, int]) -> None:
    indices, numel = selection
    coded = encode_indices(indices, numel)
    if coded.stream.coding is Coding.PLAIN:
        np.testing.assert_array_equal(coded.stored, indices)
    gaps = np.diff(indices.astype(np.int64), prepend=-1) - 1
    for coding in GAPS if indices.size else ():
        found = encode_gaps(gaps, coding)
        if found is None:
            continue
        planes = planes_of(found, indices.size)
        decoded = decode_gaps("here", planes, indices.size, numel)
        assert decoded.dtype == index_dtype(numel)
        np.testing.assert_array_equal(decoded, indices)
        assert walk_gaps(numbers(planes), coding.width) == indices.tolist()
        assert coded.stored.nbytes <= found.stored.nbytes


@st.composite
def changes(draw: st.DrawFn, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Any entries of a base, and any others; some of them near."""
    bits = np.dtype(f"u{WEIGHT_DTYPES[dtype].itemsize}")
    base = np.frombuffer(draw(st.binary(min_size=80, max_size=80)), bits)
    far = np.frombuffer(draw(st.binary(min_size=80, max_size=80)), bits)
    near = np.frombuffer(draw(st.binary(min_size=80, max_size=80)), np.int16)[: base.size]
    near = base[: near.size] + (near // draw(st.sampled_from([1, 100, 10_000]))).astype(bits)
    merged = np.where(np.arange(base.size) % 3 == 0, far, np.resize(near, base.size))
    return base.view(WEIGHT_DTYPES[dtype]), merged.view(WEIGHT_DTYPES[dtype])


@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
@settings(deadline=None)
@given(data=st.data())
def test_steps_lead_from_any_bits_to_any_bits(dtype: str, data: st.DataObject) -> None:
    base, merged = data.draw(changes(dtype))
    steps = join([*_split_steps(base, merged)])
    itemsize = base.itemsize
    for coding in STEPS:
        if coding.width > itemsize:
            continue
        found = encode_some_steps(steps, coding)
        planes = planes_of(found, base.size, itemsize)
        decoded = decode_steps("here", found.stream, planes, itemsize)
        assert not bits_differ(take_steps(base, decoded), merged).any()
        signed = decoded.view(f"i{itemsize}").tolist()
        assert walk_steps(planes, coding.width, itemsize) == signed


def _split_steps(base: np.ndarray, merged: np.ndarray) -> list[np.ndarray]:
    from safeweights_peft.patch.codec import _ordinals, split

    return split(_ordinals(merged) - _ordinals(base))


@pytest.mark.parametrize("dtype", [name for name in WEIGHT_DTYPES if name != "float32"])
def test_a_step_goes_to_the_neighbouring_number(dtype: str) -> None:
    order = np.array(neighbours(dtype), f"u{WEIGHT_DTYPES[dtype].itemsize}")
    entries = order.view(WEIGHT_DTYPES[dtype])
    ones = np.ones(order.size - 1, order.dtype)
    np.testing.assert_array_equal(take_steps(entries[:-1], ones).view(order.dtype), order[1:])
    finite = entries[np.isfinite(entries.astype(np.float32))].astype(np.float32)
    assert (np.diff(finite) >= 0).all()
    assert (np.diff(finite) == 0).sum() == 1  # the two zeros


@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
@pytest.mark.parametrize("values_dtype", list(DTYPES))
@settings(deadline=None)
@given(data=st.data())
def test_values_as_steps_give_the_same_merged_bits(
    dtype: str, values_dtype: str, data: st.DataObject
) -> None:
    base, _ = data.draw(changes(dtype))
    drawn = np.frombuffer(data.draw(st.binary(min_size=80, max_size=80)), np.int16).astype(float)
    values = np.resize(drawn, base.size) * data.draw(st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]))
    values = values.astype(DTYPES[values_dtype])
    merged = add_rounded(base, values)
    for coded in encode_steps(base, values):
        planes = planes_of(coded, base.size, base.itemsize)
        steps = decode_steps("here", coded.stream, planes, base.itemsize)
        decoded = value_of(base, take_steps(base, steps))
        assert np.isfinite(decoded).all()
        assert not bits_differ(add_rounded(base, decoded), merged).any()


@pytest.mark.parametrize("dtype", [name for name in WEIGHT_DTYPES if name != "float32"])
def test_ordinary_values_can_be_stored_as_steps(dtype: str) -> None:
    random = np.random.default_rng(0)
    base = random.normal(scale=0.1, size=500).astype(WEIGHT_DTYPES[dtype])
    assert encode_steps(base, random.normal(scale=0.02, size=500).astype(np.float32))


@pytest.mark.parametrize("dtype", [name for name in WEIGHT_DTYPES if name != "float32"])
def test_steps_lead_to_zeros_of_both_signs(dtype: str) -> None:
    base = np.array([0.0, -0.0, 0.0, -0.0, 0.0625, 0.0625], np.float32)
    values = np.array([-1e-45, -0.0, 0.0, 0.0, -0.0625, -0.0625 - 1e-8], np.float32)
    merged = add_rounded(base.astype(WEIGHT_DTYPES[dtype]), values)
    signs = np.signbit(merged.astype(np.float32)).tolist()
    assert signs == [True, True, False, False, False, True]
    assert (merged == 0).tolist() == [True] * 5 + [dtype != "bfloat16"]
    assert encode_steps(base.astype(WEIGHT_DTYPES[dtype]), values)


def test_values_whose_result_no_difference_gives_are_not_stored_as_steps() -> None:
    base = np.array([1e30], np.float32).astype(DTYPES["bfloat16"])
    merged = np.array([1.0], np.float32).astype(DTYPES["bfloat16"])
    assert (add_rounded(base, value_of(base, merged)) != merged).any()
    assert encode_steps(np.array([60000.0], np.float16), np.array([60000.0], np.float32)) == []


@pytest.mark.parametrize("values_dtype", list(DTYPES))
@settings(deadline=None)
@given(data=st.data())
def test_floats_keep_every_bit(values_dtype: str, data: st.DataObject) -> None:
    bits = np.dtype(f"u{DTYPES[values_dtype].itemsize}")
    count = data.draw(st.integers(0, 100))
    drawn = data.draw(st.binary(min_size=count * bits.itemsize, max_size=count * bits.itemsize))
    values = np.frombuffer(drawn, DTYPES[values_dtype])
    coded = encode_content(values)
    decoded = coded.stored
    if coded.stream.coding is not Coding.PLAIN:
        decoded = join(planes_of(coded, values.size, bits.itemsize)).view(values.dtype)
    assert decoded.tobytes() == values.tobytes()
