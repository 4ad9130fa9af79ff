"""How long jobs show what they do: as bars on a terminal, as lines in a log, or not at all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol, Self


class Advance(Protocol):
    """Take the units that were just done, and figures to show beside them, such as losses."""

    def __call__(self, done: int, /, **figures: float) -> None:
        """Show that more is done."""
        ...


class Progress(Protocol):
    """Shows tasks of known length, and notes between them; jobs take any object of this kind.

    Example:
        >>> from contextlib import contextmanager
        >>> class Titles:
        ...     @contextmanager
        ...     def task(self, description, total):
        ...         print(description)
        ...         yield lambda done, **figures: None
        ...     def note(self, text):
        ...         print(text)
    """

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Show one task while the context lasts."""
        ...

    def note(self, text: str) -> None:
        """Show a line."""
        ...


class Quiet:
    """Shows nothing."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Show nothing."""
        return nullcontext(_ignore)

    def note(self, text: str) -> None:
        """Show nothing."""


class Joined:
    """Shows all tasks as parts of one that is shown already."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Add a part."""
        return nullcontext(self._advance)

    def note(self, text: str) -> None:
        """Show nothing: the whole task has its own line."""


class RichProgress:
    """Shows bars while it is open, by the library rich; for terminals and notebooks.

    Example:
        >>> from safeweights_peft import RichProgress
        >>> with RichProgress() as progress, progress.task("Training", 2) as advance:
        ...     advance(1, loss=0.5)
        ...     advance(1, loss=0.25)
    """

    def __init__(self) -> None:
        """Make a display on stderr, so that results alone go to stdout."""
        from rich import progress
        from rich.console import Console

        self._bars = progress.Progress(
            progress.TextColumn("{task.description:<26}", markup=False),
            progress.BarColumn(bar_width=12),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            progress.TextColumn("{task.fields[figures]}", markup=False),
            console=Console(stderr=True),
        )

    def __enter__(self) -> Self:
        """Begin to show bars."""
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bars as they are."""
        self._bars.stop()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Show a bar while the context lasts."""
        task = self._bars.add_task(description, total=total, figures="")

        def advance(done: int, /, **figures: float) -> None:
            self._bars.update(task, advance=done)
            if figures:
                self._bars.update(task, figures=_text(figures))

        yield advance

    def note(self, text: str) -> None:
        """Write a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)


class LineProgress:
    """Writes a line when a task begins, one a minute, and one when it is done; for logs.

    Example:
        >>> from safeweights_peft import LineProgress
        >>> with LineProgress(print) as progress, progress.task("Training", 2) as advance:
        ...     advance(2, loss=0.5)
        Training: 0/2
        Training: 2/2, loss 0.5, in 0 s
    """

    def __init__(self, write: Callable[[str], object] | None = None, seconds: float = 60.0) -> None:
        """Choose where lines go, by default to stderr, and the seconds between two of a task."""
        self._write, self._seconds = write or _write_to_stderr, seconds

    def __enter__(self) -> Self:
        """Begin: nothing to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """End: nothing to do."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """Write how far a task is while the context lasts."""
        started = written = time.monotonic()
        count, shown = 0, ""
        self._write(f"{description}: 0/{total}")

        def advance(done: int, /, **figures: float) -> None:
            nonlocal count, shown, written
            count, shown, now = count + done, _text(figures) or shown, time.monotonic()
            if now - written >= self._seconds and 0 < count < total:
                left = (now - started) / count * (total - count)
                self._write(_join(f"{description}: {count}/{total}", shown, f"{_time(left)} left"))
                written = now

        yield advance
        taken = f"in {_time(time.monotonic() - started)}"
        self._write(_join(f"{description}: {count}/{total}", shown, taken))

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(text)


@contextmanager
def percent(progress: Progress, description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a task in percent, from when it first tells the units done and all of them."""
    with ExitStack() as stack:
        reached, advance = 0, None

        def show(done: int, total: int) -> None:
            nonlocal reached, advance
            # Not before: a task that is refused at once leaves no dead bar.
            advance = advance or stack.enter_context(progress.task(description, 100))
            now = 100 * done // max(total, 1)
            advance(now - reached)
            reached = now

        yield show


def _ignore(done: int, /, **figures: float) -> None:
    """Show nothing."""


def _text(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def _join(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _write_to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
