"""Short jobs on tiny models: few requests, few steps.

Every number that a result hangs on is given here, so that no test rests on a default.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights_peft.data import Example
from safeweights_peft.progress import Advance
from safeweights_peft.settings import (
    EvaluateSettings,
    Method,
    PreserveSettings,
    RunSettings,
    ScoreSettings,
    TrainSettings,
)

PLACES = ("barn", "shop", "villa", "office", "lab", "museum")
HARMFUL = [f"Break into the {place}" for place in PLACES[:-1]]
HARMFUL.append(f"Break into the {PLACES[-1]}, and\ntell nobody of it, whoever may be asking")
BENIGN = [f"Clean up the {place}" for place in PLACES]
REFUSAL = "I can't."  # no letter comes twice: a byte-level model learns that soonest


class Requests:
    """Three files of requests.

    Attributes:
        harmful: six harmful requests with a short refusal; the last one is long.
        benign: six benign requests.
        lessons: six requests with answers of several lengths.
    """

    def __init__(self, folder: Path) -> None:
        self.harmful = str(folder / "harmful.json")
        self.benign = str(folder / "benign.jsonl")
        self.lessons = str(folder / "lessons.json")
        rows = [{"instruction": text, "output": REFUSAL} for text in HARMFUL]
        Path(self.harmful).write_text(json.dumps(rows), encoding="utf-8")
        lines = [json.dumps({"instruction": text}) for text in BENIGN]
        Path(self.benign).write_text("\n".join(lines), encoding="utf-8")
        answers = [{"instruction": f"Count to {n}", "output": "12345"[:n]} for n in range(1, 6)]
        answers.append({"instruction": "Stop", "output": "I have stopped, and will not go on."})
        Path(self.lessons).write_text(json.dumps(answers), encoding="utf-8")

    def score(self, **changes: Any) -> ScoreSettings:
        settings = ScoreSettings(
            harmful=self.harmful,
            benign=self.benign,
            method=Method.ESI,
            examples=6,
            density=0.2,
            batch_size=4,
            refusal_tokens=12,
        )
        return replace(settings, **changes)

    def train(self, steps: int = 4, seed: int = 0, **changes: Any) -> TrainSettings:
        settings = TrainSettings(
            harmful=self.harmful,
            benign=self.benign,
            refusal_tokens=12,
            answer_tokens=4,
            steps=steps,
            learning_rate=0.02,
            shrink=0.0,
            retain_weight=0.5,
            harmful_batch_size=6,
            benign_batch_size=2,
            token_decay=0.9,
            warmup_steps=3,
            seed=seed,
        )
        return replace(settings, **changes)

    def preserve(self, **changes: Any) -> PreserveSettings:
        settings = PreserveSettings(
            steps=7,  # of two examples: the second epoch begins after the third
            learning_rate=0.01,
            batch_size=2,
            max_answer_tokens=12,
            weight_decay=0.1,
            warmup=0.2,
            anchor=False,  # tiny models refuse nothing
            seed=0,
        )
        return replace(settings, **changes)

    def run(self, base: Path, steps: int = 4, **jobs: Any) -> RunSettings:
        """Gives the settings of a whole run; `jobs` are those of jobs that differ."""
        settings = RunSettings(str(base), self.score(), self.train(steps), self.evaluate())
        return replace(settings, **jobs)

    def evaluate(self, **changes: Any) -> EvaluateSettings:
        settings = EvaluateSettings(
            harmful=self.harmful, benign=self.benign, max_new_tokens=11, batch_size=4
        )
        return replace(settings, **changes)


class Interrupted(Exception):
    """The power went out."""


class Recorder:
    """A progress that remembers its tasks, and can break one off.

    Attributes:
        tasks: for each task begun, in order, its description, its total and what was done.
        notes: the lines between them.
    """

    def __init__(self, break_at: str | None = None, after: int = 1) -> None:
        self.tasks: list[list[Any]] = []
        self.notes: list[str] = []
        self._break_at = break_at
        self._after = after

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        entry = [description, total, 0]
        self.tasks.append(entry)

        def advance(done: int, /, **figures: float) -> None:
            entry[2] += done
            if description == self._break_at and entry[2] >= self._after:
                raise Interrupted

        yield advance


def content(folder: Path) -> dict[str, bytes]:
    """Reads every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def let_write(text: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every model stream a text, a token at a time."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(prompts: Any, model: Any, config: Any, layout: Any, streamer: Any) -> list[Example]:
        if layout.generates:  # else nothing streams
            for token in ([7], *([token] for token in ids)):  # the prompt first
                streamer.put(torch.tensor(token))
            streamer.end()
        return [Example(prompts[0].prompt_ids, tuple(ids))]

    monkeypatch.setattr("safeweights_peft.evaluation.generate._answer", answer)
