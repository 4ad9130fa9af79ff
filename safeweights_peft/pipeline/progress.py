"""How long jobs say how far they are; what is shown is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Shows tasks of known length."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Shows one task while the context lasts.

        Args:
            description: what is being done.
            total: how many units it has.

        Returns:
            A context that gives a function to be called with the units done since the last call.
        """
        ...


def advance_to(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Turns a task's function of units done since into one of the unit reached.

    Args:
        advance: what a task gave.

    Returns:
        A function to be called with the unit reached; a resumed job begins with a leap.
    """
    done = 0

    def reach(unit: int) -> None:
        nonlocal done
        advance(unit - done)
        done = unit

    return reach


class Joined:
    """Shows all tasks as parts of one that is shown already."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        """Takes the task.

        Args:
            advance: what it gave.
        """
        self._advance = advance

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Adds a part.

        Args:
            description: not used.
            total: not used.

        Returns:
            A context that gives the whole task's function.
        """
        return nullcontext(self._advance)


class Quiet:
    """Shows nothing."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Counts nothing.

        Args:
            description: not used.
            total: not used.

        Returns:
            A context that gives a function that does nothing.
        """
        return nullcontext(lambda _: None)
