"""Progress: what a log and a terminal say of a task, and of what it costs to wait."""

import sys

import pytest

from safeweights_peft import progress
from safeweights_peft.cli.output import show_progress
from safeweights_peft.progress import Joined, LineProgress, RichProgress, percent


class Clock:
    """A clock that only tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_log_gets_a_line_at_the_start_one_a_minute_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, lines = Clock(monkeypatch), []
    with LineProgress(lines.append).task("Train", 10) as advance:
        for step in range(1, 11):
            clock.now = 40.0 * step
            advance(1, refusal=1 / step, retain=0.0123456)
    assert lines == [
        "Train: 0/10",
        "Train: 2/10, refusal 0.5, retain 0.0123, 5 min left",
        "Train: 4/10, refusal 0.25, retain 0.0123, 4 min left",
        "Train: 6/10, refusal 0.167, retain 0.0123, 3 min left",
        "Train: 8/10, refusal 0.125, retain 0.0123, 1 min left",
        "Train: 10/10, refusal 0.1, retain 0.0123, in 7 min",
    ]


def test_a_log_says_how_far_a_broken_task_came_only_up_to_its_last_minute() -> None:
    lines: list[str] = []

    def train() -> None:
        with LineProgress(lines.append).task("Train", 10) as advance:
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert lines == ["Train: 0/10"]


def test_a_terminal_shows_the_figures_beside_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress() as bars, bars.task("Train [x]", 2) as advance:
        bars.note("[1/4] Evaluate")
        advance(2, loss=0.25)
    shown = capsys.readouterr().err
    assert "[1/4] Evaluate" in shown
    assert "Train [x]" in shown
    assert "2/2" in shown
    assert "loss 0.25" in shown


@pytest.mark.parametrize(
    ("is_terminal", "kind"), [(True, RichProgress), (False, LineProgress)], ids=["terminal", "log"]
)
def test_the_command_line_draws_bars_only_on_a_terminal(
    is_terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert type(show_progress()) is kind


def test_bytes_are_shown_as_percent_from_when_they_are_first_told() -> None:
    lines: list[str] = []
    shown = LineProgress(lines.append)
    with percent(shown, "Copy") as show:
        assert lines == []
        for done in range(0, 778, 7):
            show(done, 777)
    assert [line.partition(",")[0] for line in lines] == ["Copy: 0/100", "Copy: 100/100"]


def test_nothing_to_copy_is_no_division_by_zero() -> None:
    lines: list[str] = []
    with percent(LineProgress(lines.append), "Copy") as show:
        show(0, 0)
    assert [line.partition(",")[0] for line in lines] == ["Copy: 0/100", "Copy: 0/100"]


def test_joined_tasks_advance_the_one_that_is_shown() -> None:
    done: list[int] = []
    joined = Joined(lambda count, /, **figures: done.append(count))
    with joined.task("Ask", 3) as advance:
        advance(3)
    joined.note("nothing")
    assert done == [3]
