"""Merges and unmerges that are killed at random moments of their work; see ``merge``.

The moment is drawn after Python has started and imported what it needs, so that it falls into the
work itself. What follows a kill is called in this process.
"""

import hashlib
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safeweights_peft.errors import MergeError
from safeweights_peft.merging.in_place import merge_in_place, unmerge
from safeweights_peft.merging.merge import merge

WORK = """
import sys
from safeweights_peft import merge, merge_in_place, unmerge
work, *arguments = sys.argv[1:]
print("ready", flush=True)
{"merge": merge, "merge in place": merge_in_place, "unmerge": unmerge}[work](*arguments)
"""


def content(directory: Path) -> dict[str, str]:
    """Hash every file of a directory."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def run(arguments: list[str], seconds: float | None) -> tuple[bool, float]:
    """Start some work and kill it after some time; tell whether it ran, and for how long."""
    command = [sys.executable, "-c", WORK, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        started = time.perf_counter()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait() != 0, time.perf_counter() - started


class Killing:
    """A checkpoint on which work is killed, and what it should hold."""

    def __init__(self, base: Path, patch: Path) -> None:
        """Merge once undisturbed."""
        self.base, self.patch, self.out = base, patch, base.with_name("killed")
        self.whole = content(base)
        merge(base, patch, self.out)
        self.merged = content(self.out)
        self.durations: dict[str, list[float]] = {}

    def kill(self, work: str, moment: float) -> bool:
        """Kill some work between its start (0) and its end (1); return whether it still ran."""
        arguments = {
            "merge": [str(self.base), str(self.patch), str(self.out)],
            "merge in place": [str(self.base), str(self.patch)],
            "unmerge": [str(self.base)],
        }[work]
        if work not in self.durations:  # the load of the machine is that of three runs
            self.durations[work] = sorted(self._alone(work, arguments) for _ in range(3))
        self._prepare(work)
        return run([work, *arguments], moment * self.durations[work][1])[0]

    def recover(self, work: str, finish: bool) -> bool:
        """Call what follows a kill; return whether the result is whole or absent, bit for bit."""
        good = True
        if work == "merge":
            good = not self.out.exists() or content(self.out) == self.merged
            merge(self.base, self.patch, self.out, overwrite=True)
            good &= content(self.out) == self.merged
        elif finish:
            merge_in_place(self.base, self.patch)
            now = content(self.base)
            good = all(now[name] == self.merged[name] for name in self.whole)
        self._take_back()
        return good and content(self.base) == self.whole

    def _alone(self, work: str, arguments: list[str]) -> float:
        self._prepare(work)
        _, seconds = run([work, *arguments], None)
        self._take_back()
        return seconds

    def _prepare(self, work: str) -> None:
        for path in self.base.parent.glob("*killed*"):  # a killed merge leaves its hidden draft
            shutil.rmtree(path)
        if work == "unmerge":
            merge_in_place(self.base, self.patch)

    def _take_back(self) -> None:
        try:
            unmerge(self.base)
        except MergeError:
            pass  # there is nothing to take back


def kill_at_random(base: Path, patch: Path, kills: int) -> None:
    """Kill each kind of work in turn, and print how often the next call recovered."""
    killing, moment = Killing(base, patch), random.Random(0)
    works = ("merge", "merge in place", "unmerge")
    results: dict[str, list[tuple[bool, bool]]] = {work: [] for work in works}
    for number in range(kills):
        work = works[number % 3]
        running = killing.kill(work, moment.random())
        results[work].append((running, killing.recover(work, finish=number % 2 == 0)))
    print("\n| killed | times | while it ran | recovered |\n|---|---|---|---|")
    for work, kills in results.items():
        running, good = (sum(counts) for counts in zip(*kills, strict=True))
        print(f"| {work} | {len(kills)} | {running} | {good} |")
