"""Work on several items at once."""

import threading

import pytest

from safeweights_peft.checkpoint.threads import THREADS, in_threads


def test_results_come_in_the_order_of_the_items() -> None:
    second_is_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_is_done.wait(60)
        if item == 1:
            second_is_done.set()
        return 10 * item

    assert list(in_threads(work, range(20))) == [10 * item for item in range(20)]


def test_the_first_error_is_raised_and_what_has_not_begun_is_left() -> None:
    begun: list[int] = []
    failed = threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 0:
            failed.set()
            raise KeyError(item)
        assert failed.wait(60)

    with pytest.raises(KeyError):
        list(in_threads(work, range(100_000)))
    assert 0 < len(begun) <= THREADS + 1


def test_work_is_not_done_far_ahead_of_its_use() -> None:
    begun: list[int] = []
    results = in_threads(begun.append, range(1000))
    for taken in range(1, 100):
        next(results)
        assert len(begun) <= taken + THREADS
    results.close()
