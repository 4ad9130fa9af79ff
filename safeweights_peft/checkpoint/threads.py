"""Work on several files or tensors at once.

Copying, hashing, gathering and waiting for the disk all leave Python's lock alone.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 4
"""Enough that two cores and a disk are busy at once; each may map a window of a tensor."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Do some work on each item, on a few at a time; the first error stops it.

    Args:
        work: What to do.
        items: On what.

    Yields:
        The results, in the order of the items.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(work, items)
