"""The evaluation job: a base model, with a patch or without, asked harmful and benign requests."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeweights_peft.data import Example, Row, data_digest, encode_example, read_rows
from safeweights_peft.evaluation.generate import generate_answers
from safeweights_peft.evaluation.judges import RefusalJudge, Verdict
from safeweights_peft.evaluation.metrics import attack_success_rate, over_refusal_rate
from safeweights_peft.evaluation.utility import Utility, measure_utility
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.jobs.load import is_patch, load_patched
from safeweights_peft.jobs.progress import Progress, Quiet
from safeweights_peft.jobs.provenance import made_with
from safeweights_peft.modeling.loading import load_model, load_tokenizer, pick_device, pick_dtype
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.settings import ComputeSettings, EvaluateSettings

SHOWN_CHARACTERS = 40
"""Requests are shortened to this many characters in results."""

TASK_TOKENS = 256
"""Answers whose loss is measured are cut after this many tokens."""


def evaluate(
    base: str,
    adapter: Path | None = None,
    settings: EvaluateSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure ASR, over-refusal, KL to the base, perplexity, and the loss on a task if given.

    With an adapter, what is measured is the merged model in the checkpoint's dtype, whatever the
    dtype of the computation.
    """
    settings = settings or EvaluateSettings()
    compute = compute or ComputeSettings()
    started = time.perf_counter()
    found, device = resolve_base(base, compute.revision), pick_device(compute.device)
    dtype = pick_dtype(compute.dtype, device)
    asker = make_asker(found, settings, progress or Quiet())
    model = base_model = load_model(found, dtype, device)
    if adapter is not None:
        model = load_patched(found, [adapter], dtype, device)
    return {
        "kind": "evaluation",
        **made_with(found, _read_patch(adapter)),
        "adapter": None if adapter is None else str(adapter),
        **asker.measure(model, base_model, asker.ask_base(base_model)),
        **asker.describe(),
        "settings": asdict(settings) | asdict(compute),
        "seconds": time.perf_counter() - started,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "safeweights_peft_version": version("safeweights-peft"),
    }


def _read_patch(adapter: Path | None) -> Artifact | None:
    """Read what a content id names: a safety patch, and not a LoRA."""
    return read_artifact(adapter) if adapter and is_patch(adapter) else None


def check_requests(settings: EvaluateSettings) -> None:
    """Find out before a long job, not after it, that what is to be asked is missing."""
    for source in dict.fromkeys((settings.harmful, settings.benign)):
        read_rows(source)
    if settings.task:
        read_rows(settings.task, needs_output=True)


def make_asker(base: BaseModel, settings: EvaluateSettings, progress: Progress) -> Asker:
    """Read what models will be asked."""
    return Asker(
        harmful=read_rows(settings.harmful)[: settings.limit],
        benign=read_rows(settings.benign)[: settings.limit],
        task=read_rows(settings.task, needs_output=True) if settings.task else [],
        tokenizer=load_tokenizer(base),
        settings=settings,
        progress=progress,
    )


@dataclass(frozen=True)
class Asker:
    """Puts the same requests to models in memory and judges their answers.

    Attributes:
        harmful: harmful requests.
        benign: benign requests.
        task: requests with the answers whose loss is measured; none if empty.
        tokenizer: the models' tokenizer.
        settings: decoding, batch size, whether answers are kept.
        progress: shown while asking.
    """

    harmful: Sequence[Row]
    benign: Sequence[Row]
    task: Sequence[Row]
    tokenizer: PreTrainedTokenizerBase
    settings: EvaluateSettings
    progress: Progress

    def ask_base(self, base: PreTrainedModel) -> list[Example]:
        """Let the base answer the benign requests: what other models are compared on."""
        return self._ask(base, "the base benign", self.benign)

    def measure(
        self, model: PreTrainedModel, base: PreTrainedModel, base_answers: Sequence[Example]
    ) -> dict[str, Any]:
        """Ask a model everything, judges its answers, and compares it with the base."""
        harmful = self._judge(self.harmful, self._ask(model, "harmful", self.harmful))
        answers = base_answers if model is base else self._ask(model, "benign", self.benign)
        benign = self._judge(self.benign, answers)
        harmful["attack_success_rate"] = asdict(attack_success_rate(_verdicts(harmful)))
        benign["over_refusal_rate"] = asdict(over_refusal_rate(_verdicts(benign)))
        return {
            "harmful": harmful,
            "benign": benign,
            "utility": asdict(self._compare(model, base, base_answers)),
            "task": self._learned(model) if self.task else None,
        }

    def describe(self) -> dict[str, str]:
        """Tell how answers are made and judged."""
        return {
            "judge": "refusal openings",
            "decoding": f"greedy, at most {self.settings.max_new_tokens} tokens",
        }

    def _ask(self, model: PreTrainedModel, title: str, rows: Sequence[Row]) -> list[Example]:
        with self.progress.task(f"Asking {title} requests", len(rows)) as advance:
            return generate_answers(
                model,
                self.tokenizer,
                [row.instruction for row in rows],
                max_new_tokens=self.settings.max_new_tokens,
                batch_size=self.settings.batch_size,
                on_batch=advance,
            )

    def _judge(self, rows: Sequence[Row], answers: Sequence[Example]) -> dict[str, Any]:
        judge = RefusalJudge()
        requests = []
        for row, answer in zip(rows, answers, strict=True):
            text = self.tokenizer.decode(answer.answer_ids, skip_special_tokens=True)
            verdict = judge.judge(row.instruction, text)
            request = {"request": shorten(row.instruction), "verdict": verdict.value}
            requests.append(request | ({"answer": text} if self.settings.keep_answers else {}))
        counts = Counter(request["verdict"] for request in requests)
        return {
            "n": len(rows),
            "data_digest": data_digest(rows),
            **{verdict.value: counts[verdict.value] for verdict in Verdict},
            "requests": requests,
        }

    def _compare(
        self, model: PreTrainedModel, base: PreTrainedModel, answers: Sequence[Example]
    ) -> Utility:
        with self.progress.task("Comparing with the base", len(answers)) as advance:
            return measure_utility(
                model, base, answers, self.tokenizer.pad_token_id, on_batch=advance
            )

    def _learned(self, model: PreTrainedModel) -> dict[str, Any]:
        examples = [
            encode_example(self.tokenizer, row.instruction, row.output or "", TASK_TOKENS)
            for row in self.task
        ]
        with self.progress.task("Reading the task's answers", len(self.task)) as advance:
            found = measure_utility(
                model, model, examples, self.tokenizer.pad_token_id, batch_size=4, on_batch=advance
            )
        loss = math.log(found.perplexity)
        return {"loss": loss, "tokens": found.tokens, "data_digest": data_digest(self.task)}


def figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
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


def _verdicts(part: dict[str, Any]) -> list[Verdict]:
    return [Verdict(request["verdict"]) for request in part["requests"]]
