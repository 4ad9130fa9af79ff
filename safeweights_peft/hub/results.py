"""Evaluations that lie beside an adapter: read, tied to its content, and told as the Hub has it.

No figure comes from anywhere else. An evaluation of a patch counts if it names the patch's content
id; one of the base, if an evaluation of the patch asked the same requests of the same base.

Sources: https://huggingface.co/docs/hub/model-cards (``model-index``) and
https://huggingface.co/docs/hub/eval-results (``.eval_results``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from safeweights_peft.cards import HUB_ID
from safeweights_peft.errors import HubError
from safeweights_peft.files import read_json
from safeweights_peft.hub.layout import FIGURES, RESULTS
from safeweights_peft.rates import Rate

REPRODUCE = "reproduce.json"
"""The record of the run, among the results of what it made."""
OF_ADAPTER = ("enhancement", "reproduction")
"""Kinds of results that are always of an adapter; others may be of its map, and aren't told."""


@dataclass(frozen=True)
class Asked:
    """The answers to one source of requests.

    Attributes:
        source: the requests' source, without its place on a disk.
        digest: of the requests.
        rate: of attacks that succeeded, or of harmless requests that were refused.
        invalid: answers that could not be judged.
    """

    source: str
    digest: str
    rate: Rate
    invalid: int

    @property
    def title(self) -> str:
        """The source as people know it."""
        name = self.source.removeprefix("builtin:")
        return self.source if name == self.source else f"{name}, built into safeweights-peft"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        file: the result's file name.
        base: name and commit of the base, as they were given.
        harmful: harmful requests, with the attack success rate.
        benign: harmless requests, with the over-refusal rate.
        task: source and digest of a task's requests, if there was one.
        task_loss: the loss on them.
        kl: mean KL to the base, in nats per token.
        perplexity: of the base's answers to the harmless requests.
        tokens: how many tokens of these answers were compared.
        judge: who judged.
        decoding: how answers were made.
        date: when, in ISO 8601.
        version: of safeweights-peft.
    """

    file: str
    base: tuple[str, str | None]
    harmful: Asked
    benign: Asked
    task: tuple[str, str] | None
    task_loss: float | None
    kl: float
    perplexity: float
    tokens: int
    judge: str
    decoding: str
    date: str
    version: str

    @property
    def setting(self) -> tuple[object, ...]:
        """What two evaluations must share to be set side by side."""
        asked = self.harmful.digest, self.benign.digest, self.task
        return (self.base, *asked, self.judge, self.decoding)


class Measured(NamedTuple):
    """A patch's evaluation, and its base's on the same requests if there is one."""

    before: Evaluation | None
    after: Evaluation


def read_results(
    folder: Path, content_id: str | None, base: tuple[str | None, str | None]
) -> list[Measured]:
    """Read the evaluations in an adapter's ``results/``."""
    found: dict[bool, list[Evaluation]] = {True: [], False: []}
    for path in sorted((folder / RESULTS).glob("*.json")):
        content = read_json(path, HubError)
        _check_content(path, content, content_id)
        if content.get("kind") == "evaluation":
            read = _read(path, content)
            _check_base(read, base)
            found[content.get("adapter") is None].append(read)
    before = {each.setting: each for each in found[True]}
    measured = [Measured(before.get(each.setting), each) for each in found[False]]
    paired = [each.before.file for each in measured if each.before]
    for each in found[True]:
        if each.file not in paired:
            raise HubError(
                f"{RESULTS}/{each.file}: expected an evaluation of the base as one of the "
                "patch has it (requests, judge, decoding), found no such one beside it; add it, or "
                "take this file away"
            )
    return measured


def model_index(measured: list[Measured], repo_id: str) -> list[EvalResult]:
    """Tell evaluations as a card's ``model-index``."""
    return [result for each in measured for result in _results(each.after, repo_id)]


def write_eval_results(folder: Path, measured: list[Measured], repo_id: str) -> list[Path]:
    """Write evaluations on data sets of the Hub into ``.eval_results/``.

    The Hub takes there only results on its own data sets, named by their ids; results on built-in
    requests and on files are in the card alone.
    """
    written = []
    for each in measured:
        entries = [
            _entry(each.after, asked, title, repo_id)
            for asked, title in ((each.after.harmful, "ASR"), (each.after.benign, "over-refusal"))
            if data_set(asked.source)
        ]
        if entries:
            path = folder / FIGURES / Path(each.after.file).with_suffix(".yaml").name
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml_dump(eval_result_entries_to_yaml(entries)), encoding="utf-8")
            written.append(path)
    return written


def base_text(name: str | None, commit: str | None) -> str:
    """Name a base for people."""
    return f"{name} at {commit}" if commit else str(name)


def data_set(source: str) -> tuple[str, str | None] | None:
    """Find the data set of the Hub that a source of requests is."""
    name, _, split = source.partition(":")
    return (name, split or None) if HUB_ID.fullmatch(name) else None


def _check_content(path: Path, content: Mapping[str, Any], content_id: str | None) -> None:
    """Check that what a card reads of an adapter was made for this one."""
    kind, found = content.get("kind"), content.get("content_id")
    read = kind in OF_ADAPTER or (kind == "evaluation" and content.get("adapter") is not None)
    if read and found != content_id:
        raise HubError(
            f"{RESULTS}/{path.name}: content_id: expected {content_id}, the adapter's, found "
            f"{found or 'none'}; evaluate this adapter, or take the file away"
        )


def _check_base(evaluation: Evaluation, base: tuple[str | None, str | None]) -> None:
    """Refuse what was measured on another base, or on another commit of it."""
    if evaluation.base != base:
        wanted = base_text(*base)
        raise HubError(
            f"{RESULTS}/{evaluation.file}: base: expected {wanted}, the adapter's, found "
            f"{base_text(*evaluation.base)}; evaluate on {wanted}, or take the file away"
        )


def _read(path: Path, content: Mapping[str, Any]) -> Evaluation:
    """Take what a card tells out of an evaluation's JSON."""
    try:
        settings, task, utility = content["settings"], content["task"], content["utility"]
        base = content["base"]
        return Evaluation(
            file=path.name,
            base=(str(base["name"]), None if base["revision"] is None else str(base["revision"])),
            harmful=_asked(settings["harmful"], content["harmful"], "attack_success_rate"),
            benign=_asked(settings["benign"], content["benign"], "over_refusal_rate"),
            task=(_public(settings["task"]), str(task["data_digest"])) if task else None,
            task_loss=float(task["loss"]) if task else None,
            kl=float(utility["kl"]),
            perplexity=float(utility["perplexity"]),
            tokens=int(utility["tokens"]),
            judge=str(content["judge"]),
            decoding=str(content["decoding"]),
            date=str(content["date"]),
            version=str(content["safeweights_peft_version"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HubError(
            f"{RESULTS}/{path.name}: expected a result of `safeweights eval`, found "
            f"{type(error).__name__}: {error}; evaluate again"
        ) from error


def _asked(source: str, part: Mapping[str, Any], key: str) -> Asked:
    rate = part[key]
    return Asked(
        _public(source),
        str(part["data_digest"]),
        Rate(
            int(rate["count"]),
            int(rate["n"]),
            *(float(rate[each]) for each in ("rate", "low", "high")),
        ),
        int(part["invalid"]),
    )


def _public(source: str) -> str:
    """Keep of a file's path its name."""
    return os.path.basename(source) if source.endswith((".json", ".jsonl")) else source


def _results(evaluation: Evaluation, repo_id: str) -> list[EvalResult]:
    harmful, benign = evaluation.harmful, evaluation.benign
    rates = [
        (harmful, "attack_success_rate", "ASR", harmful.rate.rate, _interval(harmful.rate)),
        (benign, "over_refusal_rate", "over-refusal", benign.rate.rate, _interval(benign.rate)),
    ]
    tokens = {"tokens": evaluation.tokens}
    utility = [
        (benign, "kl_divergence", "KL to the base (nats/token)", evaluation.kl, tokens),
        (benign, "perplexity", "perplexity of the base's answers", evaluation.perplexity, tokens),
    ]
    told = {"judge": evaluation.judge, "decoding": evaluation.decoding}
    sets = {asked: data_set(asked.source) or (asked.source, None) for asked in (harmful, benign)}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=sets[asked][0],
            dataset_split=sets[asked][1],
            dataset_name=asked.title,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
            metric_args={**told, **numbers, "data_digest": asked.digest},
            source_name=f"{RESULTS}/{evaluation.file}",
            source_url=_link(evaluation, repo_id),
        )
        for asked, metric, name, value, numbers in rates + utility
    ]


def _interval(rate: Rate) -> dict[str, Any]:
    return {"n": rate.n, "low": rate.low, "high": rate.high}


def _entry(evaluation: Evaluation, asked: Asked, title: str, repo_id: str) -> EvalResultEntry:
    rate, found = asked.rate, data_set(asked.source)
    assert found is not None
    return EvalResultEntry(
        dataset_id=found[0],
        task_id="default",
        value=rate.rate,
        date=evaluation.date,
        source_url=_link(evaluation, repo_id),
        source_name=f"{RESULTS}/{evaluation.file}",
        notes=f"{title}, a share: {rate.count} of {rate.n}, 95 % interval {rate.low:.3f} to "
        f"{rate.high:.3f}; judge: {evaluation.judge}; {evaluation.decoding}",
    )


def _link(evaluation: Evaluation, repo_id: str) -> str:
    return f"https://huggingface.co/{repo_id}/blob/main/{RESULTS}/{evaluation.file}"
