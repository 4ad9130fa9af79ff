"""Exact top-k over a stream, held to a full sort of everything."""

import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeweights_peft.errors import SelectionError
from safeweights_peft.selection import topk
from safeweights_peft.selection.topk import Order, Selected, TopK, select

Scores = dict[str, np.ndarray]
Chosen = dict[str, list[tuple[int, float]]]


def sort_everything(scores: Scores, k: int, order: Order) -> Chosen:
    """The obvious twin: sort all entries by (score, name, index) and take the first k."""
    sign = -1 if order is Order.TOP else 1
    entries = [
        (sign * float(score), name, index)
        for name, values in scores.items()
        for index, score in enumerate(values.reshape(-1))
    ]
    chosen: Chosen = {}
    for score, name, index in sorted(entries)[:k]:
        chosen.setdefault(name, []).append((index, abs(score)))
    return {name: sorted(pairs) for name, pairs in chosen.items()}


def as_pairs(selected: dict[str, Selected]) -> Chosen:
    return {
        name: list(zip(entries.indices.tolist(), entries.scores.tolist(), strict=True))
        for name, entries in selected.items()
    }


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_stream_goes_on_from_a_copy_of_its_state(order: Order, done: int) -> None:
    random = np.random.default_rng(0)
    scores = {name: random.integers(9, size=50).astype(np.float32) for name in "dacb"}
    first, second = TopK(40, order), TopK(40, order)
    for name in list(scores)[:done]:
        first.add(name, scores[name])
    second.restore(first.state())
    for name in list(scores)[done:]:
        second.add(name, scores[name])
    assert as_pairs(second.result()) == sort_everything(scores, 40, order)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Scores, int]:
    """Few distinct values, so that ties are everywhere; several tensors, some of them empty."""
    few = st.sampled_from([0.0, -0.0, 2.0**-149, 0.5, 1.0, 2.0**127])
    pool = few | st.floats(0, 2.0**100, width=32)
    names = draw(st.lists(st.text("abz.", min_size=1, max_size=3), min_size=1, unique=True))
    scores = {name: np.array(draw(st.lists(pool, max_size=9)), dtype=np.float32) for name in names}
    total = sum(values.size for values in scores.values())
    if not total:
        scores[names[0]] = np.zeros(1, np.float32)
    return scores, draw(st.integers(1, max(total, 1)))


@pytest.mark.parametrize("order", list(Order))
@settings(deadline=None)
@given(streams())
def test_the_selection_is_that_of_a_full_sort(order: Order, stream: tuple[Scores, int]) -> None:
    scores, k = stream
    assert as_pairs(select(scores.items(), k, order)) == sort_everything(scores, k, order)


@pytest.mark.parametrize("order", list(Order))
@settings(deadline=None, max_examples=40)
@given(streams(), st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(order: Order, stream, random) -> None:
    scores, k = stream
    arrivals = list(scores.items())
    random.shuffle(arrivals)
    assert as_pairs(select(arrivals, k, order)) == as_pairs(select(scores.items(), k, order))


@pytest.mark.parametrize("order", list(Order))
@settings(deadline=None, max_examples=40)
@given(streams(), st.data())
def test_pieces_of_a_tensor_are_ranked_as_the_whole(order: Order, stream, data) -> None:
    scores, k = stream
    whole = np.concatenate(list(scores.values()))
    places = st.lists(st.integers(0, whole.size), max_size=4)
    cuts = [0, *sorted(data.draw(places)), whole.size]
    pieces = {f"piece {n}": whole[start:end] for n, (start, end) in enumerate(pairwise(cuts))}
    selected = select(pieces.items(), k, order)
    indices = [
        cuts[int(name.removeprefix("piece "))] + index
        for name, pairs in as_pairs(selected).items()
        for index, _ in pairs
    ]
    expected = sort_everything({"whole": whole}, k, order)["whole"]
    assert sorted(indices) == [index for index, _ in expected]


@pytest.mark.parametrize("order", list(Order))
def test_scores_of_many_chunks_are_ranked_as_by_a_full_sort(order: Order) -> None:
    random = np.random.default_rng(0)
    scores = {
        name: random.integers(0, 50, size).astype(np.float32)
        for name, size in (("b", 3 * topk.CHUNK + 1), ("a", topk.CHUNK), ("c", 5))
    }
    flat = np.concatenate([scores[name] for name in "abc"])
    k = flat.size // 3
    keys = -flat if order is Order.TOP else flat
    expected = np.sort(np.argsort(keys, kind="stable")[:k])
    selected = select(scores.items(), k, order)
    starts = {"a": 0, "b": scores["a"].size, "c": scores["a"].size + scores["b"].size}
    actual = np.concatenate([starts[name] + entries.indices for name, entries in selected.items()])
    assert np.array_equal(actual, expected)


def test_a_single_entry_can_be_selected() -> None:
    scores = {"b": np.array([1, 3, 3], np.float32), "a": np.array([2, 3], np.float32)}
    assert as_pairs(select(scores.items(), 1)) == {"a": [(1, 3.0)]}
    assert as_pairs(select(scores.items(), 1, Order.BOTTOM)) == {"b": [(0, 1.0)]}


def test_everything_can_be_selected() -> None:
    scores = {"b": np.ones((2, 3), np.float32), "a": np.zeros(2, np.float32)}
    selected = select(scores.items(), 8)
    assert {name: entries.indices.tolist() for name, entries in selected.items()} == {
        "a": [0, 1],
        "b": [0, 1, 2, 3, 4, 5],
    }


def test_names_come_in_order_and_names_without_entries_do_not_come() -> None:
    scores = {
        "c": np.ones(1, np.float32),
        "b": np.zeros(1, np.float32),
        "a": np.ones(1, np.float32),
    }
    assert list(select(scores.items(), 2)) == ["a", "c"]


def test_indices_are_flat_and_row_major_whatever_the_layout_in_memory() -> None:
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = 1
    for layout in (scores, np.asfortranarray(scores)):
        assert select([("w", layout)], 1)["w"].indices.tolist() == [6]


def test_scores_are_returned_bit_by_bit() -> None:
    scores = np.random.default_rng(0).random(1000, dtype=np.float32)
    selected = select([("w", scores)], 100)["w"]
    assert selected.scores.dtype == np.float32
    assert np.array_equal(selected.scores, scores[selected.indices])


def test_negative_zero_ties_with_zero() -> None:
    scores = np.array([-0.0, 0.0, -0.0], np.float32)
    for order in Order:
        assert select([("w", scores)], 2, order)["w"].indices.tolist() == [0, 1]


def test_more_entries_than_there_are_is_an_error() -> None:
    with pytest.raises(SelectionError, match="k: expected at most 3 entries, found 4"):
        select([("w", np.zeros(3, np.float32))], 4)


@pytest.mark.parametrize("k", [0, -1])
def test_no_entries_at_all_is_an_error(k: int) -> None:
    with pytest.raises(SelectionError, match=f"k: expected at least 1, found {k}"):
        TopK(k)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-30])
def test_a_score_that_is_no_score_is_refused_by_its_tensors_name(bad: float) -> None:
    scores = np.zeros(topk.CHUNK + 2, np.float32)
    scores[-1] = bad
    with pytest.raises(
        SelectionError, match=r"layer\.weight: expected finite scores of at least 0"
    ):
        TopK(1).add("layer.weight", scores)


def test_a_name_that_comes_twice_is_refused() -> None:
    best = TopK(1)
    best.add("w", np.ones(2, np.float32))
    with pytest.raises(SelectionError, match="w: expected to be scored once, found it twice"):
        best.add("w", np.ones(2, np.float32))


def test_a_name_is_remembered_even_where_nothing_of_it_was_kept() -> None:
    best = TopK(1)
    best.add("a", np.ones(2, np.float32))
    best.add("w", np.zeros(2, np.float32))
    with pytest.raises(SelectionError, match="w: expected to be scored once"):
        best.add("w", np.ones(2, np.float32))


def test_indices_are_int32_in_a_tensor_of_usual_size() -> None:
    assert select([("w", np.ones(3, np.float32))], 2)["w"].indices.dtype == np.int32


def test_indices_are_int64_in_a_tensor_that_int32_cannot_address(monkeypatch) -> None:
    """The limit is lowered: 2**31 scores are 8 GB."""
    limited = lambda numel: np.dtype(np.int32 if numel < 10 else np.int64)  # noqa: E731
    monkeypatch.setattr(topk, "index_dtype", limited)
    scores = {"small": np.ones(9, np.float32), "large": np.ones(10, np.float32)}
    dtypes = {name: entries.indices.dtype for name, entries in select(scores.items(), 15).items()}
    assert dtypes == {"large": np.int64, "small": np.int32}


@pytest.mark.parametrize("kind", ["random", "all equal", "ever larger"])
@pytest.mark.parametrize(("k", "size", "tensors"), [(50_000, 2_000_000, 3), (200_000, 40_000, 30)])
def test_memory_is_bounded_by_k_and_one_tensor(kind: str, k: int, size: int, tensors: int) -> None:
    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for number in range(tensors):
            yield f"{number:02}", tensor_of_scores(kind, size, number)

    _, tensor_bytes = with_peak_bytes(lambda: tensor_of_scores(kind, size, 1))
    selected, peak_bytes = with_peak_bytes(lambda: select(stream(), k))
    assert sum(entries.indices.size for entries in selected.values()) == k
    # Temporary: some arrays for one piece of a tensor, and a histogram of 16-bit halves.
    assert peak_bytes <= 16 * k + tensor_bytes + 32 * topk.CHUNK + 32 * (1 << 16)


def tensor_of_scores(kind: str, size: int, number: int) -> np.ndarray:
    if kind == "all equal":
        return np.ones(size, np.float32)
    scores = np.random.default_rng(number).random(size, dtype=np.float32)
    scores += number if kind == "ever larger" else 0
    return scores


def with_peak_bytes(work: Callable[[], Any]) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        result = work()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
