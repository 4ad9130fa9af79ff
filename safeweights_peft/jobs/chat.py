"""A conversation with a base and a patch, whose scale is switched in place between two answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safeweights_peft.errors import SettingsError
from safeweights_peft.evaluation.generate import stream_answer
from safeweights_peft.evaluation.utility import Patched
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import MergedEntries, note_chat
from safeweights_peft.patch.io import read_patch
from safeweights_peft.scales import SCALE
from safeweights_peft.sources import Row

MAX_NEW_TOKENS = 512  # of an answer


class Chat:
    """Keeps the turns, and lets the base answer, patched at a scale or as it is (scale 0)."""

    def __init__(self, job: Job, adapter: Path | None = None, scale: float = 1.0) -> None:
        """Load the base, and check that the patch was made for it."""
        self.job, self.turns = job, list[dict[str, Any]]()
        self._adapter, self._patch = adapter, read_patch(adapter) if adapter else None
        self._scale = self._scale_of_patch = scale if adapter else 0.0
        job.check([Row("Hello")])
        if self._patch:
            note_chat(job, self._patch)
        self._patched = self._switch()

    @property
    def scale(self) -> float:
        """The scale at which the patch is in the base; 0 for the base itself."""
        return self._scale

    def set_scale(self, scale: float | str) -> None:
        """Put the patch into the base at a scale from the next answer on."""
        if self._patch is None:
            raise SettingsError("scale: expected a patch, found none; give one by --adapter")
        self._scale = self._scale_of_patch = SCALE.check(scale)
        self._patched = self._switch()

    def toggle(self) -> None:
        """Change from the patched model to the base, or back."""
        self._scale = 0.0 if self._scale else self._scale_of_patch
        self._patched = self._switch()

    def ask(self, text: str, on_text: Callable[[str, bool], None] = lambda *_: None) -> str:
        """Let the model answer, knowing all turns so far, but no thoughts.

        What it writes is passed on as it does, and whether that is a thought.
        """
        chat, turns = self.job.chat, tuple((turn["role"], turn["content"]) for turn in self.turns)
        ids = chat.encode(chat.render_prompt(Row(text, turns=turns)))
        with self._patched() as model:
            answer = stream_answer(model, chat, ids, MAX_NEW_TOKENS, on_text)
        said = {"role": "assistant", "content": chat.read(answer), "scale": self._scale}
        cut = {"cut_in_thought": True} if chat.is_in_thought(answer) else {}
        self.turns += [{"role": "user", "content": text}, said | cut]
        return chat.read(answer)

    def _switch(self) -> Patched:
        """Make a context of the base with the patch at the present scale."""
        if self._patch is None or self._adapter is None or not self._scale:
            return lambda: nullcontext(self.job.model)
        # Merged first: another base is refused before it is loaded.
        merged = MergedEntries(self.job.reader, [self._patch], [self._adapter], [self._scale])
        return merged.make_switch(self.job.model)
