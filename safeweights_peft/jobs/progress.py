"""How long jobs say how far they are; what is shown is the caller's business."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Shows tasks of known length."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show one task while the context lasts."""
        ...


def advance_to(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Turn a task's function of units done since into one of the unit reached."""
    done = 0

    def reach(unit: int) -> None:
        nonlocal done
        advance(unit - done)
        done = unit

    return reach


class Joined:
    """Shows all tasks as parts of one that is shown already."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        """Take the task."""
        self._advance = advance

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Add a part."""
        return nullcontext(self._advance)


class Quiet:
    """Shows nothing."""

    def task(self, description: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Count nothing."""
        return nullcontext(lambda _: None)
