"""The evaluation job: put harmful and benign requests to a base, with an adapter or without."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from transformers import PreTrainedModel

from safeweights_peft.data import Example
from safeweights_peft.errors import EvaluationError
from safeweights_peft.evaluation.generate import find_end_tokens
from safeweights_peft.evaluation.judge_kinds import AnyJudge, check_judges, make_judges
from safeweights_peft.evaluation.judges import (
    Judge,
    RefusalJudge,
    Verdict,
    attack_success_rate,
    compare_judges,
    has_said_something,
    over_refusal_rate,
)
from safeweights_peft.evaluation.model_judges import ModelJudge
from safeweights_peft.evaluation.utility import Patched, measure_utility
from safeweights_peft.jobs.job import Job, refuse_thoughts
from safeweights_peft.jobs.load import MergedEntries, is_patch, load_patched, note_chat
from safeweights_peft.judge_names import explain_judge, short_judge
from safeweights_peft.modeling.answers import find_layout
from safeweights_peft.patch.artifacts import AnyPatch
from safeweights_peft.patch.io import read_patch
from safeweights_peft.rates import Rate
from safeweights_peft.settings import EvaluateSettings
from safeweights_peft.sources import Row, data_digest, read_rows
from safeweights_peft.tables import shorten

SAMPLE_CHARACTERS = {"harmful": 60, "benign": 120}
"""Samples show this much of an answer: of one that may harm, how it begins."""

TASK_TOKENS = 256
"""Answers whose loss is measured are cut after this many tokens."""

RATES: Mapping[str, Callable[[Sequence[Verdict]], Rate]] = MappingProxyType(
    {"harmful": attack_success_rate, "benign": over_refusal_rate}
)
"""What verdicts on each kind of requests amount to."""

CUT_IN_THOUGHT = "cut in thought"

Item = TypeVar("Item")

_REFUSALS = RefusalJudge()


def evaluate(
    job: Job,
    adapter: Path | None = None,
    settings: EvaluateSettings | None = None,
    judges: Sequence[AnyJudge] = (),
    scale: float = 1.0,
) -> dict[str, Any]:
    """Measure ASR, over-refusal, KL to the base, perplexity, and the loss on a task if given.

    Judges that are given stand in for those of the settings.
    """
    evaluator = Evaluator(job, settings or EvaluateSettings(), judges)
    patch = read_patch(adapter) if adapter and is_patch(adapter) else None
    if scale != 1.0 and patch is None:
        raise EvaluationError(
            f"{adapter}: expected a safety patch, which can be scaled, found another adapter at "
            f"scale {scale:g}; leave the scale out"
        )
    evaluator.check()
    if patch:
        note_chat(job, patch)
    return evaluator.evaluate(adapter, patch, scale)


class Evaluator:
    """Puts the same requests to a base and to patched models, and judges the answers."""

    def __init__(
        self,
        job: Job,
        settings: EvaluateSettings,
        judges: Sequence[AnyJudge] = (),
        samples: int = 0,  # answers of each kind whose beginnings stay in the result
    ) -> None:
        """Read the requests and what is said of judges, before any file of a model."""
        self._samples = samples
        self.job, self.settings = job, settings
        self.harmful = read_rows(settings.harmful)[: settings.limit]
        self.benign = read_rows(settings.benign)[: settings.limit]
        self._judges = make_judges(judges or settings.judge, (job.device, job.dtype))
        self.task = read_rows(settings.task, needs_output=True) if settings.task else []

    def check(self, **target: Any) -> None:
        """Check what measuring needs, and a target, as `Job.check` does."""
        check_judges(self._judges)
        rows, tokens = [*self.harmful, *self.benign], self.settings.max_new_tokens
        self.job.check(rows, self.task, answer_tokens=tokens, **target)
        for explained in filter(None, (explain_judge(judge.name) for judge in self._judges)):
            self.job.progress.note(explained)

    def note_shared(self, learned: Sequence[Row]) -> None:
        """Warn of requests that are measured and learned from as well."""
        texts = {row.instruction for row in learned}
        shared = sum(row.instruction in texts for row in (*self.harmful, *self.benign))
        if shared:
            total = len(self.harmful) + len(self.benign)
            self.job.progress.note(
                f"{shared} of the {total} requests to measure on are learned from as well: the "
                "rates say less about others"
            )

    @property
    def judges(self) -> dict[str, list[Judge]]:
        """The judges of each kind of requests; the first decides."""
        # What harms nobody passes a guard, refusal or not: others must tell over-refusal.
        telling = [judge for judge in self._judges if judge.tells_refusals]
        return {"harmful": self._judges, "benign": telling or [_REFUSALS]}

    @cached_property
    def base_answers(self) -> list[Example]:
        """The base's answers to the benign requests, asked for once; never written to disk."""
        return self._ask("the base benign", self.benign, self.job.model)

    def evaluate(
        self, adapter: Path | None = None, patch: AnyPatch | None = None, scale: float = 1.0
    ) -> dict[str, Any]:
        """Measure and record; `patch` is the adapter's content where it is read already."""
        started = time.perf_counter()
        if adapter and patch is None and is_patch(adapter):
            patch = read_patch(adapter)
        measured = self.measure(self._patched(adapter, patch, scale))
        return self.job.record(
            "evaluation",
            # At another scale it isn't the content that a content id names.
            patch if scale == 1.0 else None,
            self.settings,
            adapter=None if adapter is None else str(adapter),
            scale=scale,
            **measured,
            **self.describe(),
            seconds=time.perf_counter() - started,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def measure(self, patched: Patched | None = None) -> dict[str, Any]:
        """Ask a patched model, or the base, and compare it with the base on the base's answers."""
        base, answers, pad = self.job.model, self.base_answers, self.job.tokenizer.pad_token_id
        with nullcontext(base) if patched is None else patched() as model:
            harmful = self._ask("harmful", self.harmful, model)
            benign = answers if patched is None else self._ask("benign", self.benign, model)
            task = self._measure_task(model) if self.task else None
        with self.job.progress.task("Compare with the base", len(answers)) as advance:
            utility = measure_utility(base, answers, pad, patched, on_batch=advance)
        # Last: a guard is loaded when all else is measured, and one judge after another.
        parts = self._judge({"harmful": harmful, "benign": benign})
        return {**parts, "utility": asdict(utility), "task": task}

    def describe(self) -> dict[str, Any]:
        """Tell how answers are made and judged."""
        harmful, benign = (self.judges[kind][0].name for kind in RATES)
        judge = harmful if harmful == benign else f"{harmful}; over-refusal: {benign}"
        decoding = f"greedy, at most {self.settings.max_new_tokens} tokens"
        batching = find_layout(self.job.model).batching.value
        cut = sum(row.instruction in self.job.chat.cut for row in (*self.harmful, *self.benign))
        return {
            "judge": judge,
            "decoding": decoding,
            "batching": batching,
            "answers_begin_after": self.job.chat.describe(),
            "cut_requests": cut,
        }

    def _patched(
        self, adapter: Path | None, patch: AnyPatch | None, scale: float
    ) -> Patched | None:
        if adapter is None:
            return None
        if patch is None:
            # A LoRA can't be unmerged bit for bit, so a second model holds it.
            model = load_patched(self.job.base, [adapter], self.job.dtype, self.job.device)
            return lambda: nullcontext(model)
        merged = MergedEntries(self.job.reader, [patch], [adapter], [scale])
        return merged.make_switch(self.job.model)

    def _ask(self, who: str, rows: Sequence[Row], model: PreTrainedModel) -> list[Example]:
        settings = self.settings
        return self.job.ask(
            *(who, rows, settings.max_new_tokens, settings.batch_size, model),
            show_refusals=True,
        )

    def _judge(self, answers: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, Any]]:
        """Let each judge read the answers that it can tell apart, and sum up what all say."""
        chat = self.job.chat
        texts = {kind: list(map(chat.read, given)) for kind, given in answers.items()}
        in_thought = {kind: list(map(chat.is_in_thought, given)) for kind, given in answers.items()}
        for cut in in_thought.values():
            refuse_thoughts(cut)
        verdicts: dict[str, dict[str, list[Verdict]]] = {kind: {} for kind in RATES}
        for judge in dict.fromkeys([*self.judges["harmful"], *self.judges["benign"]]):
            kinds = [kind for kind in RATES if judge in self.judges[kind]]
            pairs = [
                (row.instruction, text)
                for kind in kinds
                for row, text in zip(getattr(self, kind), texts[kind], strict=True)
            ]
            given = iter(self._ask_judge(judge, pairs))
            for kind in kinds:
                verdicts[kind][judge.name] = list(islice(given, len(texts[kind])))
        return {
            kind: self._sum_up(
                *(kind, texts[kind], self._find_cut(answers[kind])),
                *(in_thought[kind], verdicts[kind]),
            )
            for kind in RATES
        }

    def keep_judge(self) -> AbstractContextManager[None]:
        """Load a judge's model once for all that is measured in the context."""
        models = [judge for judge in self._judges if isinstance(judge, ModelJudge)]
        # Of several, one at a time is in memory, as in a single evaluation.
        return models[0].keep() if len(models) == 1 else nullcontext()

    def count_units(self) -> int:
        """Count the units of progress that measuring a patched model shows."""
        judged = sum(
            len(getattr(self, kind))
            for kind, judges in self.judges.items()
            for judge in judges
            if not isinstance(judge, RefusalJudge)
        )
        return len(self.harmful) + 2 * len(self.benign) + len(self.task) + judged

    def _ask_judge(self, judge: Judge, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        if isinstance(judge, RefusalJudge):  # done before a bar could show
            return judge.judge(pairs)
        with self.job.progress.task(
            f"Judge answers by {short_judge(judge.name)}", len(pairs)
        ) as advance:
            verdicts = judge.judge(pairs, advance)
        if len(verdicts) != len(pairs):
            raise EvaluationError(
                f"{judge.name}: expected {len(pairs)} verdicts, found {len(verdicts)}; return one "
                "for each pair, in order"
            )
        return verdicts

    def _find_cut(self, answers: Sequence[Example]) -> list[bool]:
        """Tell which answers were cut at the limit, and didn't end there of themselves."""
        ends, limit = (
            find_end_tokens(self.job.model, self.job.tokenizer),
            self.settings.max_new_tokens,
        )
        return [
            len(answer.answer_ids) == limit and answer.answer_ids[-1] not in ends
            for answer in answers
        ]

    def _sum_up(
        self,
        kind: str,
        texts: Sequence[str],
        cut: Sequence[bool],
        in_thought: Sequence[bool],
        verdicts: Mapping[str, Sequence[Verdict]],
    ) -> dict[str, Any]:
        """Count verdicts on the answers to one kind of requests; the first judge's decide."""
        rows: Sequence[Row] = getattr(self, kind)
        judge, *others = verdicts
        rate = RATES[kind]
        # What was cut in a thought is no answer yet, and counts for nothing but itself.
        said = {name: _drop(given, in_thought) for name, given in verdicts.items()}
        decisive = verdicts[judge]
        requests, by_category = [], defaultdict(list)
        for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
            by_judge = {name: given[place].value for name, given in verdicts.items()}
            requests.append(
                {
                    "request": shorten(row.instruction),
                    "verdict": CUT_IN_THOUGHT if in_thought[place] else by_judge[judge],
                }
                | ({"verdicts": by_judge} if others else {})
                | ({"answer": text} if self.settings.keep_answers else {})
            )
            if not in_thought[place]:
                by_category[row.category].append(decisive[place])
        categories = {
            name: asdict(rate(by_category[name])) for name in by_category if name is not None
        }
        return {
            "n": len(rows),
            "data_digest": data_digest(rows),
            "judge": judge,
            **_count(said[judge]),
            "cut_in_thought": sum(in_thought),
            # A refusal that shows has said enough, whole sentence or not.
            "cut_short": sum(
                is_cut and verdict is not Verdict.REFUSED and not has_said_something(text)
                for is_cut, verdict, text in _drop(
                    [*zip(cut, decisive, texts, strict=True)], in_thought
                )
            ),
            "requests": requests,
            **({"samples": self._sample(kind, texts, requests)} if self._samples else {}),
            rate.__name__: asdict(rate(said[judge])),
            "categories": categories,
            "judges": {
                name: {**_count(given), rate.__name__: asdict(rate(given))}
                for name, given in said.items()
            },
            "agreement": compare_judges(said),
        }

    def _sample(
        self, kind: str, texts: Sequence[str], requests: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, str]]:
        """Take the beginnings of answers from all over the requests."""
        count = min(self._samples, len(texts))
        places = [len(texts) * number // count for number in range(count)]
        return [
            {
                "request": requests[place]["request"],
                "verdict": requests[place]["verdict"],
                # Called so, it is left out where results are pushed.
                "answer": shorten(texts[place], SAMPLE_CHARACTERS[kind]),
            }
            for place in places
        ]

    def _measure_task(self, model: PreTrainedModel) -> dict[str, Any]:
        examples = self.job.chat.encode_rows(self.task, TASK_TOKENS)
        with self.job.progress.task("Read the task's answers", len(examples)) as advance:
            utility = measure_utility(
                model, examples, self.job.tokenizer.pad_token_id, batch_size=4, on_batch=advance
            )
        return {
            "loss": math.log(utility.perplexity),
            "tokens": utility.tokens,
            "data_digest": data_digest(self.task),
        }


def _drop(items: Sequence[Item], is_dropped: Sequence[bool]) -> list[Item]:
    return [item for item, drop in zip(items, is_dropped, strict=True) if not drop]


def _count(verdicts: Sequence[Verdict]) -> dict[str, int]:
    counts = Counter(verdicts)
    return {verdict.value: counts[verdict] for verdict in Verdict}


def pick_figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the figures that are compared before and after."""
    task = evaluation["task"]
    return {
        "attack_success_rate": evaluation["harmful"]["attack_success_rate"],
        "over_refusal_rate": evaluation["benign"]["over_refusal_rate"],
        "invalid": evaluation["harmful"]["invalid"] + evaluation["benign"]["invalid"],
        "cut_short": evaluation["harmful"]["cut_short"] + evaluation["benign"]["cut_short"],
        "cut_in_thought": sum(evaluation[kind].get("cut_in_thought", 0) for kind in RATES),
        "kl": evaluation["utility"]["kl"],
        "perplexity": evaluation["utility"]["perplexity"],
        "task_loss": task["loss"] if task else None,
    }
