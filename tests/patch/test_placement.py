"""Blocks and streams: where a parameter's entries lie."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights_peft.errors import CorruptAdapterError
from safeweights_peft.patch.placement import Block, check_blocks, check_coverage, row_major_strides
from tests.tiny_files import fused_experts


@st.composite
def nested_blocks(draw: st.DrawFn) -> Block:
    """Strided blocks that hold no entry twice, with dimensions in any order and any gaps."""
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    strides, reach = {}, 0
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = reach + draw(st.integers(1, 3))
        reach += strides[dim] * (shape[dim] - 1)
    return Block(
        key="k",
        shape=tuple(shape),
        offset=draw(st.integers(0, 5)),
        strides=tuple(strides[dim] for dim in range(len(shape))),
    )


def flat_by_entry(block: Block) -> dict[int, int]:
    """Flat index in the parameter -> flat index in the block, entry by entry."""
    return {
        block.offset + sum(s * i for s, i in zip(block.strides, index, strict=True)): local
        for local, index in enumerate(np.ndindex(*block.shape))
    }


@settings(deadline=None)
@given(nested_blocks(), st.sets(st.integers(0, 120)))
def test_locate_agrees_with_counting_entry_by_entry(block: Block, chosen: set[int]) -> None:
    indices = np.array(sorted(chosen), np.int32)
    oracle = flat_by_entry(block)
    positions, local = block.locate(indices)
    expected = [(at, oracle[flat]) for at, flat in enumerate(indices.tolist()) if flat in oracle]
    found = np.arange(indices.size)[positions]
    assert list(zip(found.tolist(), local.tolist(), strict=True)) == expected
    assert block.is_injective()
    assert block.last == max(oracle)


@settings(deadline=None)
@given(nested_blocks())
def test_spread_agrees_with_counting_entry_by_entry(block: Block) -> None:
    local = np.arange(int(np.prod(block.shape)), dtype=np.int32)
    assert block.spread(local).tolist() == list(flat_by_entry(block))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 2), (1, 1)), ((3, 2), (1, 2)), ((2, 3), (2, 1)), ((4, 4), (4, 2))],
)
def test_strides_that_reach_an_entry_twice_are_refused(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    block = Block(key="w", shape=shape, offset=0, strides=strides)
    with pytest.raises(CorruptAdapterError, match=r"^p: block 'w': expected strides that reach"):
        check_blocks("p", [block], 100)


def test_a_dimension_of_one_entry_may_have_any_stride() -> None:
    block = Block(key="w", shape=(1, 5, 1), offset=0, strides=(3, 1, 1))
    check_blocks("p", [block], 5)
    assert block.locate(np.arange(5))[1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(key="w", shape=(2, 3), offset=0, strides=(3,)), "expected one stride per size"),
        (Block(key="w", shape=(2, 3), offset=1, strides=(3, 1)), "below 6, found one at 6"),
        (Block(key="w", shape=(2, 3), offset=0, strides=(4, 1)), "below 6, found one at 6"),
        (Block(key="w", shape=(2,), offset=0, strides=(2**70,)), "expected entries below 6"),
    ],
)
def test_a_block_must_lie_inside_its_parameter(block: Block, message: str) -> None:
    with pytest.raises(CorruptAdapterError, match=message):
        check_blocks("p", [block], 6)


def test_blocks_must_not_be_larger_than_their_parameter() -> None:
    blocks = [Block.dense("a", (2, 3)), Block.dense("b", (1,))]
    with pytest.raises(CorruptAdapterError, match="expected at most 6 entries together, found 7"):
        check_blocks("p", blocks, 6)


def test_fused_experts_find_each_entry_once() -> None:
    record = fused_experts("experts", experts=3, inner=2, outer=4, dtype="bfloat16")
    assert record.shape == (3, 4, 4)
    everything = np.arange(record.numel)
    check_blocks("p", record.blocks, record.numel)
    check_coverage("p", record.blocks, everything)
    expert, row, column = 1, 3, 2  # the second row of the second half: w3
    flat = np.ravel_multi_index((expert, row, column), record.shape)
    holders = {block.key: block.locate(np.array([flat]))[1].tolist() for block in record.blocks}
    assert holders.pop("experts.1.w3.weight") == [1 * 4 + 2]
    assert not any(holders.values())


def test_a_transposed_matrix_is_found() -> None:
    block = Block(
        key="w", shape=(4, 3), offset=0, strides=(1, 4)
    )  # on disk [4, 3], in memory [3, 4]
    memory = np.arange(12).reshape(3, 4)
    _, local = block.locate(np.arange(12))
    np.testing.assert_array_equal(np.arange(12).reshape(4, 3).T, local.reshape(3, 4))
    np.testing.assert_array_equal(memory.T.reshape(-1)[local], np.arange(12))


def test_an_entry_in_no_block_is_refused() -> None:
    with pytest.raises(CorruptAdapterError, match=r"^p: .* found none for index 4"):
        check_coverage("p", [Block.dense("w", (4,))], np.array([0, 4, 5]))


def test_an_entry_in_two_blocks_is_refused() -> None:
    blocks = [Block.dense("a", (4,)), Block(key="b", shape=(2,), offset=3, strides=(1,))]
    check_coverage("p", blocks, np.array([0, 2, 4]))
    with pytest.raises(CorruptAdapterError, match="found 'b' overlapping another"):
        check_coverage("p", blocks, np.array([0, 3]))


def test_indices_beyond_32_bits_are_located() -> None:
    shape = (2**16, 2**17)
    block = Block.dense("w", shape)
    flat = np.array([2**31 - 1, 2**32 + 5, 2**33 - 1])
    positions, local = block.locate(flat)
    np.testing.assert_array_equal(local, flat)
    assert positions == slice(0, 3)
    assert row_major_strides(shape) == (2**17, 1)


def test_blocks_that_interleave_a_thousandfold_are_refused() -> None:
    indices = np.arange(10_000, dtype=np.int32)
    blocks = [
        Block(key=str(start), shape=(2,), offset=start, strides=(5000,)) for start in range(5000)
    ]
    with pytest.raises(CorruptAdapterError, match="in the reach of 256 at most"):
        check_coverage("weight", blocks, indices)
