"""The evaluation job: put harmful and benign requests to a base, with an adapter or without."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from safeweights_peft.data import Example, Row, data_digest, encode_rows, read_rows
from safeweights_peft.evaluation.judges import (
    JUDGES,
    Verdict,
    attack_success_rate,
    over_refusal_rate,
)
from safeweights_peft.evaluation.utility import Patched, measure_utility
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import MergedEntries, is_patch, load_patched
from safeweights_peft.modeling.answers import find_layout
from safeweights_peft.patch.artifacts import AnyPatch
from safeweights_peft.patch.io import read_patch
from safeweights_peft.rates import Rate
from safeweights_peft.settings import EvaluateSettings

SHOWN_CHARACTERS = 40
"""Results show this much of a request."""

TASK_TOKENS = 256
"""Answers whose loss is measured are cut after this many tokens."""


def evaluate(
    job: Job, adapter: Path | None = None, settings: EvaluateSettings | None = None
) -> dict[str, Any]:
    """Measure ASR, over-refusal, KL to the base, perplexity, and the loss on a task if given."""
    evaluator = Evaluator(job, settings or EvaluateSettings())
    patch = read_patch(adapter) if adapter and is_patch(adapter) else None
    evaluator.check()
    return evaluator.evaluate(adapter, patch)


class Evaluator:
    """Puts the same requests to a base and to patched models, and judges the answers."""

    def __init__(
        self, job: Job, settings: EvaluateSettings, judge: str = "refusal openings"
    ) -> None:
        """Read the requests, so that a missing file is found before a model is loaded."""
        self.job, self.settings, self.judge = job, settings, judge
        self.harmful = read_rows(settings.harmful)[: settings.limit]
        self.benign = read_rows(settings.benign)[: settings.limit]
        self.task = read_rows(settings.task, needs_output=True) if settings.task else []

    def check(self, **target: Any) -> None:
        """Check what measuring needs, and a target, as `Job.check` does."""
        requests = [row.instruction for row in (*self.harmful, *self.benign)]
        self.job.check(requests, self.task, **target)

    @cached_property
    def base_answers(self) -> list[Example]:
        """The base's answers to the benign requests, asked for once; never written to disk."""
        return self._ask("the base benign", self.benign, self.job.model)

    def evaluate(
        self, adapter: Path | None = None, patch: AnyPatch | None = None
    ) -> dict[str, Any]:
        """Measure and record; `patch` is the adapter's content where it is read already."""
        started = time.perf_counter()
        if adapter and patch is None and is_patch(adapter):
            patch = read_patch(adapter)
        measured = self.measure(self._patched(adapter, patch))
        return self.job.record(
            "evaluation",
            patch,
            self.settings,
            adapter=None if adapter is None else str(adapter),
            **measured,
            **self.describe(),
            seconds=time.perf_counter() - started,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def measure(self, patched: Patched | None = None) -> dict[str, Any]:
        """Ask a patched model, or the base, and compare it with the base on the base's answers."""
        base, answers, pad = self.job.model, self.base_answers, self.job.tokenizer.pad_token_id
        with nullcontext(base) if patched is None else patched() as model:
            harmful = self._judge(
                self.harmful, self._ask("harmful", self.harmful, model), attack_success_rate
            )
            own = answers if patched is None else self._ask("benign", self.benign, model)
            benign = self._judge(self.benign, own, over_refusal_rate)
            task = self._measure_task(model) if self.task else None
        with self.job.progress.task("Compare with the base", len(answers)) as advance:
            utility = measure_utility(base, answers, pad, patched, on_batch=advance)
        return {"harmful": harmful, "benign": benign, "utility": asdict(utility), "task": task}

    def describe(self) -> dict[str, str]:
        """Tell how answers are made and judged."""
        decoding = f"greedy, at most {self.settings.max_new_tokens} tokens"
        batching = find_layout(self.job.model).batching.value
        return {"judge": self.judge, "decoding": decoding, "batching": batching}

    def _patched(self, adapter: Path | None, patch: AnyPatch | None) -> Patched | None:
        if adapter is None:
            return None
        if patch is None:
            # A LoRA can't be unmerged bit for bit, so a second model holds it.
            model = load_patched(self.job.base, [adapter], self.job.dtype, self.job.device)
            return lambda: nullcontext(model)
        return MergedEntries(self.job.reader, [patch], [adapter]).make_switch(self.job.model)

    def _ask(self, who: str, rows: Sequence[Row], model: PreTrainedModel) -> list[Example]:
        requests, settings = [row.instruction for row in rows], self.settings
        return self.job.ask(
            *(who, requests, settings.max_new_tokens, settings.batch_size, model),
            show_refusals=True,
        )

    def _judge(
        self,
        rows: Sequence[Row],
        answers: Sequence[Example],
        rate: Callable[[Sequence[Verdict]], Rate],
    ) -> dict[str, Any]:
        verdicts, requests = [], []
        for row, answer in zip(rows, answers, strict=True):
            text = self.job.tokenizer.decode(answer.answer_ids, skip_special_tokens=True)
            verdicts.append(JUDGES[self.judge](row.instruction, text))
            request = {"request": shorten(row.instruction), "verdict": verdicts[-1].value}
            requests.append(request | ({"answer": text} if self.settings.keep_answers else {}))
        counts = Counter(verdicts)
        return {
            "n": len(rows),
            "data_digest": data_digest(rows),
            **{verdict.value: counts[verdict] for verdict in Verdict},
            "requests": requests,
            rate.__name__: asdict(rate(verdicts)),
        }

    def _measure_task(self, model: PreTrainedModel) -> dict[str, Any]:
        tokenizer = self.job.tokenizer
        examples = encode_rows(tokenizer, self.task, TASK_TOKENS)
        with self.job.progress.task("Read the task's answers", len(examples)) as advance:
            utility = measure_utility(
                model, examples, tokenizer.pad_token_id, batch_size=4, on_batch=advance
            )
        return {
            "loss": math.log(utility.perplexity),
            "tokens": utility.tokens,
            "data_digest": data_digest(self.task),
        }


def pick_figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the figures that are compared before and after."""
    task = evaluation["task"]
    return {
        "attack_success_rate": evaluation["harmful"]["attack_success_rate"],
        "over_refusal_rate": evaluation["benign"]["over_refusal_rate"],
        "invalid": evaluation["harmful"]["invalid"] + evaluation["benign"]["invalid"],
        "kl": evaluation["utility"]["kl"],
        "perplexity": evaluation["utility"]["perplexity"],
        "task_loss": task["loss"] if task else None,
    }


def shorten(request: str) -> str:
    """Shorten a request for results and logs."""
    line = " ".join(request.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
