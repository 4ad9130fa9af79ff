"""Read evaluations that lie beside an adapter, and write them as the Hub has them.

Sources: https://huggingface.co/docs/hub/model-cards (``model-index``) and
https://huggingface.co/docs/hub/eval-results (``.eval_results``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from safeweights_peft.cards import HUB_ID
from safeweights_peft.errors import HubError, SettingsError
from safeweights_peft.files import read_json
from safeweights_peft.hub.layout import FIGURES, RESULTS, Base
from safeweights_peft.rates import Outcome, Rate, find_outcome
from safeweights_peft.schema import restore
from safeweights_peft.sources import public_source

REPRODUCE = "reproduce.json"
"""The record of the run, among the results of what it made."""

OF_ADAPTER = ("enhancement", "repair", "reproduction")
"""Kinds of results that are always of an adapter; others may be of its map, and aren't shown."""


@dataclass(frozen=True)
class Requests:
    """What came of the requests of one source."""

    source: str  # without its place on a disk
    digest: str
    rate: Rate  # of attacks that succeeded, or of harmless requests that were refused
    invalid: int  # answers that could not be judged

    @property
    def title(self) -> str:
        """The source as people know it."""
        name = self.source.removeprefix("builtin:")
        return self.source if name == self.source else f"{name}, built into safeweights-peft"

    @property
    def data_set(self) -> tuple[str, str | None] | None:
        """The data set of the Hub that the source is, and its split."""
        name, _, split = self.source.partition(":")
        return (name, split or None) if HUB_ID.fullmatch(name) else None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, of a patch or of its base."""

    file: str
    base: Base
    harmful: Requests
    benign: Requests
    task: str | None  # source of requests with answers
    task_digest: str | None
    task_loss: float | None
    kl: float  # mean KL to the base, in nats per token
    perplexity: float  # of the base's answers to the harmless requests
    tokens: int  # in these answers
    judge: str
    decoding: str
    date: str  # ISO 8601
    version: str  # of safeweights-peft

    @property
    def figures(self) -> dict[str, Any]:
        """What tells how good a patch is."""
        return {
            "attack_success_rate": asdict(self.harmful.rate),
            "over_refusal_rate": asdict(self.benign.rate),
            "invalid": self.harmful.invalid + self.benign.invalid,
            "kl": self.kl,
            "perplexity": self.perplexity,
        }

    @property
    def setting(self) -> tuple[object, ...]:
        """What two evaluations must share to be set side by side."""
        digests = self.harmful.digest, self.benign.digest, self.task_digest
        return (self.base, *digests, self.task, self.judge, self.decoding)


class Measured(NamedTuple):
    """A patch's evaluation, and its base's on the same requests if there is one."""

    before: Evaluation | None
    after: Evaluation

    @property
    def outcome(self) -> Outcome | None:
        """What the patch did; None without an evaluation of the base."""
        if self.before is None:
            return None
        return find_outcome(self.before.figures, self.after.figures)


def read_results(folder: Path, content_id: str | None, base: Base) -> list[Measured]:
    """Read the evaluations in an adapter's ``results/``; refuse those of anything else."""
    before: list[Evaluation] = []
    after: list[Evaluation] = []
    for path in sorted((folder / RESULTS).glob("*.json")):
        content = read_json(path, HubError)
        _check_content(path, content, content_id)
        if content.get("kind") == "evaluation":
            evaluation = _read(path, content)
            _check_base(evaluation, base)
            (before if content.get("adapter") is None else after).append(evaluation)
    by_setting = {evaluation.setting: evaluation for evaluation in before}
    measured = [Measured(by_setting.get(evaluation.setting), evaluation) for evaluation in after]
    for evaluation in before:
        if evaluation not in [pair.before for pair in measured]:
            raise HubError(
                f"{RESULTS}/{evaluation.file}: expected an evaluation of the base as one of the "
                "patch has it (requests, judge, decoding), found no such one beside it; add it, or "
                "take this file away"
            )
    return measured


def model_index(measured: list[Measured], repo_id: str) -> list[EvalResult]:
    """Convert evaluations to a card's ``model-index``."""
    return [result for pair in measured for result in _results(pair.after, repo_id)]


def write_eval_results(folder: Path, measured: list[Measured], repo_id: str) -> None:
    """Write evaluations on data sets of the Hub into ``.eval_results/``."""
    # Only those: the Hub wants a data set's id. Others are in the card's model-index alone.
    for _, after in measured:
        entries = [
            _entry(after, requests, title, repo_id)
            for requests, title in ((after.harmful, "ASR"), (after.benign, "over-refusal"))
            if requests.data_set
        ]
        if entries:
            path = folder / FIGURES / Path(after.file).with_suffix(".yaml").name
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml_dump(eval_result_entries_to_yaml(entries)), encoding="utf-8")


def _check_content(path: Path, content: Mapping[str, Any], content_id: str | None) -> None:
    kind, found = content.get("kind"), content.get("content_id")
    is_shown = kind in OF_ADAPTER or (kind == "evaluation" and content.get("adapter") is not None)
    if is_shown and found != content_id:
        scale = content.get("scale", 1)
        other = "none" if scale == 1 else f"an evaluation at scale {scale}"
        raise HubError(
            f"{RESULTS}/{path.name}: content_id: expected {content_id}, the adapter's, found "
            f"{found or other}; evaluate this adapter, or take the file away"
        )


def _check_base(evaluation: Evaluation, base: Base) -> None:
    if evaluation.base != base:
        raise HubError(
            f"{RESULTS}/{evaluation.file}: base: expected {base}, the adapter's, found "
            f"{evaluation.base}; evaluate on {base}, or take the file away"
        )


def _read(path: Path, content: Mapping[str, Any]) -> Evaluation:
    """Take what a card shows out of an evaluation's JSON, strictly."""
    where = f"{RESULTS}/{path.name}"
    try:
        settings, task, utility = content["settings"], content["task"], content["utility"]
        picked = {
            "file": path.name,
            "base": Base(content["base"]["name"], content["base"]["revision"]),
            "harmful": _pick(settings["harmful"], content["harmful"], "attack_success_rate"),
            "benign": _pick(settings["benign"], content["benign"], "over_refusal_rate"),
            "task": public_source(settings["task"]) if task else None,
            "task_digest": task["data_digest"] if task else None,
            "task_loss": task["loss"] if task else None,
            **{key: utility[key] for key in ("kl", "perplexity", "tokens")},
            **{key: content[key] for key in ("judge", "decoding", "date")},
            "version": content["safeweights_peft_version"],
        }
        return restore(Evaluation, picked, where)
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise HubError(
            f"{where}: expected a result of `safeweights eval`, found "
            f"{type(error).__name__}: {error}; evaluate again"
        ) from error


def _pick(source: str, part: Mapping[str, Any], rate: str) -> dict[str, Any]:
    return {
        "source": public_source(source),
        "digest": part["data_digest"],
        "rate": part[rate],
        "invalid": part["invalid"],
    }


def _results(evaluation: Evaluation, repo_id: str) -> list[EvalResult]:
    harmful, benign, tokens = evaluation.harmful, evaluation.benign, {"tokens": evaluation.tokens}
    figures = [
        (harmful, "attack_success_rate", "ASR", harmful.rate.rate, _interval(harmful.rate)),
        (benign, "over_refusal_rate", "over-refusal", benign.rate.rate, _interval(benign.rate)),
        (benign, "kl_divergence", "KL to the base (nats/token)", evaluation.kl, tokens),
        (benign, "perplexity", "perplexity of the base's answers", evaluation.perplexity, tokens),
    ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=(requests.data_set or (requests.source, None))[0],
            dataset_split=(requests.data_set or (requests.source, None))[1],
            dataset_name=requests.title,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
            metric_args={
                "judge": evaluation.judge,
                "decoding": evaluation.decoding,
                **numbers,
                "data_digest": requests.digest,
            },
            source_name=f"{RESULTS}/{evaluation.file}",
            source_url=_link(evaluation, repo_id),
        )
        for requests, metric, name, value, numbers in figures
    ]


def _interval(rate: Rate) -> dict[str, Any]:
    return {"n": rate.n, "low": rate.low, "high": rate.high}


def _entry(evaluation: Evaluation, requests: Requests, title: str, repo_id: str) -> EvalResultEntry:
    rate, data_set = requests.rate, requests.data_set
    assert data_set is not None
    return EvalResultEntry(
        dataset_id=data_set[0],
        task_id="default",
        value=rate.rate,
        date=evaluation.date,
        source_url=_link(evaluation, repo_id),
        source_name=f"{RESULTS}/{evaluation.file}",
        notes=f"{title}, a fraction: {rate.count} of {rate.n}, 95 % interval {rate.low:.3f} to "
        f"{rate.high:.3f}; judge: {evaluation.judge}; {evaluation.decoding}",
    )


def _link(evaluation: Evaluation, repo_id: str) -> str:
    return f"https://huggingface.co/{repo_id}/blob/main/{RESULTS}/{evaluation.file}"
