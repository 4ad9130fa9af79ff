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
