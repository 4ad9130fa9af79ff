"""The arithmetic rule against torch, and the checks on sparse changes."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from safeweights_peft.delta import (
    DTYPES,
    WEIGHT_DTYPES,
    SparseDelta,
    add_rounded,
    bits_differ,
    check_finite,
    check_indices,
    digest,
    find_values,
    index_dtype,
    sum_rounded,
)
from safeweights_peft.errors import BaseMismatchError, CorruptAdapterError, UnsupportedFeatureError

EVERY_16_BITS = np.arange(2**16, dtype=np.uint16)
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLOAT8 = ["float8_e4m3fn", "float8_e5m2"]
SCALES = [1.0, -1.0, 0.5, 0.1, 1e-3, 3.0, 1e30, 0.0]
SINGLE_VALUES = [0.0, -0.0, 1e-45, 1e-40, 6e-8, 1e-3, 1 / 3, 1.0, 65504.0, 3.4e38]


def torch_rule(base: np.ndarray, values: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    bits = np.int16 if base.itemsize == 2 else np.int32
    torch_base = torch.from_numpy(base.view(bits).copy()).view(TORCH_DTYPES[dtype])
    torch_values = torch.from_numpy(values.astype(np.float32))
    new = (torch_base.float() + (scale * torch_values.float())).to(torch_base.dtype)
    return new.view(torch.int16 if bits is np.int16 else torch.int32).numpy().view(base.dtype)


def random_values(seed: int, count: int) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    values = bits.view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(0.01))


def nearby_values(base: np.ndarray, seed: int) -> np.ndarray:
    """Values of about an ulp of their base entry, where rounding decides."""
    factor = np.random.default_rng(seed).uniform(-0.02, 0.02, base.size)
    with np.errstate(invalid="ignore", over="ignore"):
        values = (base.astype(np.float64) * factor).astype(np.float32)
    return np.where(np.isfinite(values), values, np.float32(0.01))


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """NaN must be NaN; every other entry must agree in every bit."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    bits = np.uint16 if found.itemsize == 2 else np.uint32
    np.testing.assert_array_equal(found.view(bits)[~nan], expected.view(bits)[~nan])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_rule_equals_torch_over_every_16_bit_base(dtype: str, scale: float) -> None:
    base = EVERY_16_BITS.view(DTYPES[dtype])
    single = [np.full(base.size, value, np.float32) for value in SINGLE_VALUES]
    many = [random_values(seed, base.size) for seed in range(4)]
    near = [nearby_values(base, seed) for seed in range(4)]
    for values in single + many + near:
        for signed in (values, -values):
            found = add_rounded(base, signed, scale)
            assert_same_bits(found, torch_rule(base, signed, scale, dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("values_dtype", ["bfloat16", "float16"])
def test_the_rule_equals_torch_for_16_bit_values(dtype: str, values_dtype: str) -> None:
    base = EVERY_16_BITS.view(DTYPES[dtype])
    for seed in range(4):
        with np.errstate(over="ignore"):
            values = nearby_values(base, seed).astype(DTYPES[values_dtype])
        values = np.where(np.isfinite(values), values, DTYPES[values_dtype].type(0.5))
        found = add_rounded(base, values, 0.7)
        assert_same_bits(found, torch_rule(base, values, 0.7, dtype))


def test_the_rule_equals_torch_for_float32_bases() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    base = bits.view(np.float32)
    for seed, scale in itertools.product(range(1, 4), SCALES):
        values = random_values(seed, base.size)
        found = add_rounded(base, values, scale)
        assert_same_bits(found, torch_rule(base, values, scale, "float32"))


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("scale", SCALES)
def test_the_rule_equals_torch_over_every_float8_base_but_for_overflow(
    dtype: str, scale: float
) -> None:
    base = np.arange(256, dtype=np.uint8).view(WEIGHT_DTYPES[dtype])
    torch_dtype = getattr(torch, dtype)
    near = [nearby_values(base.astype(np.float32), seed) for seed in range(8)]
    for values in [np.full(256, value, np.float32) for value in SINGLE_VALUES] + near:
        torch_base = torch.from_numpy(base.view(np.uint8).copy()).view(torch_dtype)
        total = torch_base.float() + torch.from_numpy(values) * scale
        expected = total.to(torch_dtype).view(torch.uint8).numpy()
        found = add_rounded(base, values, scale)
        nan = np.isnan(found)
        assert (found.view(np.uint8) == expected)[~nan].all()
        # Where there is no infinity, torch saturates and this gives NaN, which no merge lets pass.
        assert (total.isnan() | (total.abs() > 448)).numpy()[nan].all()


@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
def test_several_patches_are_summed_from_left_to_right_and_rounded_once(dtype: str) -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=50).astype(WEIGHT_DTYPES[dtype])
    terms = [
        (np.sort(random.choice(50, 30, replace=False)), random.normal(size=30), scale)
        for scale in (1.0, -0.3, 1e-3)
    ]
    expected = base.copy()
    for at in range(50):
        total = np.float32(base[at])
        for where, values, scale in terms:
            for position, value in zip(where, values, strict=True):
                if position == at:
                    total = np.float32(total + np.float32(np.float32(scale) * np.float32(value)))
        expected[at] = total.astype(base.dtype)
    assert sum_rounded(base, terms).tobytes() == expected.tobytes()


def test_the_order_of_patches_may_decide_a_bit() -> None:
    base, one = np.array([2.0**24], np.float32), np.ones(1, np.float32)
    up, down = (..., one, 1.0), (..., one, -1.0)
    assert sum_rounded(base, [up, down])[0] == 2**24 - 1
    assert sum_rounded(base, [down, up])[0] == 2**24


def test_the_product_is_rounded_before_the_sum() -> None:
    third, scale = np.array([1 / 3], np.float32), 3.0
    base = np.array([-1.0], np.float32)
    assert add_rounded(base, third, scale)[0] == 0.0  # a fused multiply-add gives 2.98e-8


def test_ties_are_rounded_to_the_even_neighbour() -> None:
    bfloat16 = DTYPES["bfloat16"]
    base = np.array([1.0, 1.0078125], bfloat16)  # an ulp here is 2**-7
    half_ulp = np.full(2, 2**-8, np.float32)
    np.testing.assert_array_equal(add_rounded(base, half_ulp), np.array([1.0, 1.015625], bfloat16))


def test_overflow_gives_infinity_without_a_warning() -> None:
    base = np.array([65504], np.float16)
    assert add_rounded(base, np.array([1e5], np.float32))[0] == np.inf
    assert np.isnan(add_rounded(np.array([-np.inf], np.float32), np.array([3e38]), 1e30)[0])


def test_the_rule_refuses_a_quantized_base() -> None:
    with pytest.raises(UnsupportedFeatureError, match="found int8; use an unquantized"):
        add_rounded(np.zeros(2, np.int8), np.zeros(2, np.float32))


def test_a_digest_is_the_sha256_of_the_little_endian_bytes() -> None:
    array = np.array([[1, 2], [3, 4]], np.int32)
    expected = hashlib.sha256(bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0]))
    assert digest(array.T) == f"sha256:{expected.hexdigest()}"


def test_a_digest_of_two_arrays_joins_their_bytes() -> None:
    first, second = np.array([1, 2], np.int32), np.array([0.5], DTYPES["bfloat16"])
    joined = np.frombuffer(first.tobytes() + second.tobytes(), np.uint8)
    assert digest(first, second) == digest(joined)
    assert digest(np.empty(0, np.int32)) == f"sha256:{hashlib.sha256(b'').hexdigest()}"


def test_indices_are_int32_while_they_fit() -> None:
    assert index_dtype(0) == np.int32
    assert index_dtype(2**31 - 1) == np.int32
    assert index_dtype(2**31) == np.int64


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.array([0.0, 1.0]), "expected integer indices of one dimension, found float64"),
        (np.array([True, False]), "expected integer indices"),
        (np.array([[0], [1]]), r"found int64 of shape \[2, 1\]"),
        (np.array([3, 1]), "found 3 before 1 at position 0"),
        (np.array([1, 4, 4]), "found 4 before 4 at position 1"),
        (np.array([-1, 2]), "expected indices from 0 to 5, found -1"),
        (np.array([0, 6]), "expected indices from 0 to 5, found 6"),
        (np.array([0, 2**63], np.uint64), f"found {2**63}"),
    ],
)
def test_broken_indices_are_refused(indices: np.ndarray, message: str) -> None:
    with pytest.raises(CorruptAdapterError, match=f"^here: .*{message}"):
        check_indices("here", indices, (2, 3))


def test_sound_indices_pass() -> None:
    check_indices("here", np.array([], np.int32), (2, 3))
    check_indices("here", np.array([0, 5], np.uint8), (2, 3))
    check_indices("here", np.array([0]), ())


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(dtype: str, bad: float) -> None:
    values = np.array([1.0, bad], DTYPES[dtype])
    with pytest.raises(CorruptAdapterError, match=r"^here: expected finite .* at position 1"):
        check_finite("here", values)
    with pytest.raises(CorruptAdapterError, match=r"^values: expected finite"):
        SparseDelta((4,), np.array([0, 3]), values)


@pytest.mark.parametrize(
    ("shape", "indices", "values", "message"),
    [
        ((4,), [0], np.zeros(2, np.float32), "expected 1 values"),
        ((4,), [0], np.zeros(1), "found float64"),
        ((4,), [0], np.zeros((1, 1), np.float32), r"found float32 of shape \[1, 1\]"),
        ((4,), [4], np.zeros(1, np.float32), "expected indices from 0 to 3, found 4"),
        ((-4,), [0], np.zeros(1, np.float32), "expected sizes from 0"),
        ((2**32, 2**32), [0], np.zeros(1, np.float32), r"fewer than 2\*\*63 entries"),
    ],
)
def test_a_delta_is_checked_at_construction(
    shape: tuple[int, ...], indices: list[int], values: np.ndarray, message: str
) -> None:
    with pytest.raises(CorruptAdapterError, match=message):
        SparseDelta(shape, np.array(indices), values)


dense_pairs = hnp.array_shapes(min_dims=0, max_dims=3, max_side=5).flatmap(
    lambda shape: st.tuples(
        *[hnp.arrays(np.float32, shape, elements=st.integers(-9, 9).map(float))] * 2
    )
)


@settings(deadline=None)
@given(dense_pairs)
def test_a_difference_applied_to_the_base_gives_the_tuned_tensor(
    pair: tuple[np.ndarray, np.ndarray],
) -> None:
    base, tuned = pair
    before = base.copy()
    indices = np.flatnonzero(base != tuned)
    values = (tuned - base).reshape(-1)[indices]
    delta = SparseDelta(base.shape, indices, values)
    np.testing.assert_array_equal(delta.apply(base), tuned)
    np.testing.assert_array_equal(base, before)
    np.testing.assert_array_equal(delta.to_dense(), tuned - base)
    np.testing.assert_array_equal(delta.gather(tuned), tuned[base != tuned])
    assert (delta.numel, delta.count) == (base.size, indices.size)


def test_apply_scales_and_keeps_the_dtype_and_untouched_entries() -> None:
    base = np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3))
    delta = SparseDelta((2, 3), np.array([1, 5]), np.array([1, 2], np.float32))
    new = delta.apply(base, scale=-0.5)
    assert new.dtype == np.float16
    np.testing.assert_array_equal(new, np.array([[0, 0.5, 2], [3, 4, 4]], np.float16))


def test_a_delta_refuses_a_tensor_of_another_shape() -> None:
    delta = SparseDelta((2, 3), np.array([1]), np.array([1], np.float32))
    with pytest.raises(BaseMismatchError, match=r"expected shape \[2, 3\], found \[3, 2\]"):
        delta.apply(np.zeros((3, 2), np.float32))


def in_order(floats: np.ndarray) -> np.ndarray:
    """Number floats in ascending order, -0 just below +0."""
    bits = np.dtype(f"i{floats.itemsize}")
    signed = floats.view(bits).astype(np.int64)
    return np.where(signed < 0, -(signed & np.iinfo(bits).max) - 1, signed)


def from_order(numbers: np.ndarray) -> np.ndarray:
    """Undo `in_order` for float32."""
    bits = np.where(numbers < 0, (-numbers - 1) | 2**31, numbers)
    return bits.astype(np.uint32).view(np.float32)


def values_by_bisection(base: np.ndarray, tuned: np.ndarray) -> np.ndarray:
    """The slow twin: the smallest finite float32 by which the rule reaches tuned, or beyond it.

    The rule never falls as the value grows, so bisecting all floats misses none.
    """
    goal, most = in_order(tuned), in_order(np.array([np.finfo(np.float32).max]))
    low, high = np.repeat(-most - 1, base.size), np.repeat(most, base.size)
    for _ in range(33):
        middle = (low + high) // 2
        reached = in_order(add_rounded(base, from_order(middle))) >= goal
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return from_order(low)


def assert_exact_wherever_possible(base: np.ndarray, tuned: np.ndarray) -> None:
    differ = bits_differ(base, tuned)
    base, tuned = base[differ], tuned[differ]
    values, exact = find_values(base, tuned)
    assert np.isfinite(values).all()
    assert np.array_equal(~bits_differ(add_rounded(base, values), tuned), exact)
    possible = ~bits_differ(add_rounded(base, values_by_bisection(base, tuned)), tuned)
    assert np.array_equal(exact, possible)


def is_finite(floats: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return np.isfinite(floats.astype(np.float32))


def finite_from_bits(dtype: str, bits: list[int]) -> np.ndarray:
    size = DTYPES[dtype].itemsize
    floats = np.array(bits, np.uint64).astype(f"u{size}").view(DTYPES[dtype])
    return np.where(is_finite(floats), floats, DTYPES[dtype].type(1))


@pytest.mark.parametrize("dtype", list(DTYPES))
@settings(deadline=None, max_examples=300)
@given(pairs=st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 2), min_size=1, max_size=50))
def test_a_value_is_found_for_every_pair_of_bit_patterns_that_has_one(
    dtype: str, pairs: list[tuple[int, int]]
) -> None:
    base, tuned = (finite_from_bits(dtype, list(side)) for side in zip(*pairs, strict=True))
    assert_exact_wherever_possible(base, tuned)


@pytest.mark.parametrize("dtype", list(DTYPES))
@settings(deadline=None, max_examples=300)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), step=st.integers(-999, 999)
)
def test_a_value_is_found_for_every_small_step_of_the_bits_that_has_one(
    dtype: str, bits: list[int], step: int
) -> None:
    base = finite_from_bits(dtype, bits)
    moved = (base.view(f"i{base.itemsize}") + np.array(step, f"i{base.itemsize}")).view(base.dtype)
    assert_exact_wherever_possible(base, np.where(is_finite(moved), moved, base))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("base", [0.0, -0.0, 1.0, -0.02, 6e-8, 60000.0])
def test_a_value_is_found_for_every_16_bit_pattern_that_has_one(dtype: str, base: float) -> None:
    tuned = EVERY_16_BITS.view(DTYPES[dtype])
    tuned = tuned[is_finite(tuned)]
    assert_exact_wherever_possible(np.full(tuned.shape, base, tuned.dtype), tuned)


def test_the_difference_is_not_always_the_value() -> None:
    base, tuned = np.array([-3.6e-7], np.float16), np.array([-0.0], np.float16)
    plain = tuned.astype(np.float32) - base.astype(np.float32)
    assert bits_differ(add_rounded(base, plain), tuned)[0]
    values, exact = find_values(base, tuned)
    assert exact[0]
    assert not bits_differ(add_rounded(base, values), tuned)[0]


def test_nothing_leads_from_large_to_tiny_but_the_nearest_value_is_given() -> None:
    values, exact = find_values(np.array([1], np.float32), np.array([1e-30], np.float32))
    assert (values.tolist(), exact.tolist()) == ([-1], [False])


def test_no_value_makes_a_nan() -> None:
    values, exact = find_values(np.ones(1, np.float32), np.full(1, np.nan, np.float32))
    assert not exact[0]
    assert np.isnan(values[0])


def test_zeros_of_two_signs_differ_and_a_nan_equals_itself() -> None:
    left, right = np.array([0.0, np.nan, 1], "f4"), np.array([-0.0, np.nan, 1], "f4")
    assert bits_differ(left, right).tolist() == [True, False, False]
