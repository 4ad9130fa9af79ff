"""The record of a finished run, ``reproduce.json``, from which anyone can run it again."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from safeweights_peft.chat import PLAIN
from safeweights_peft.errors import DataError
from safeweights_peft.evaluation.judge_kinds import (
    find_model,
    find_profile_file,
    name_judge,
    with_profile,
)
from safeweights_peft.fetching import MODEL_FILES, BaseModel, public_name, resolve_base
from safeweights_peft.files import read_json
from safeweights_peft.hub.results import REPRODUCE
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import uses_benign
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.rates import Rate
from safeweights_peft.schema import restore
from safeweights_peft.settings import RunSettings, ScoreSettings
from safeweights_peft.sources import public_source, source_digest

RECORD_KIND = "reproduction"
# The settings that name requests, by job.
SOURCES = {
    "score": ("harmful", "contrast", "benign"),
    "train": ("harmful", "benign", "boundary"),
    "evaluate": ("harmful", "benign", "task"),
}
# The settings of scoring that name models.
JUDGES = ("guard", "classifier")
PACKAGES = ("safeweights-peft", "torch", "transformers", "peft", "numpy")

# Neither paths nor this machine's name go into a record, which is made to be shared: directories
# and files are told by their own names and by digests of what is inside.


@dataclass(frozen=True)
class Source:
    """A file or a data set that a run read."""

    name: str  # without its place
    digest: str


@dataclass(frozen=True)
class ModelFiles:
    """A model that a run read."""

    name: str  # Hub id, or a directory's own name
    revision: str | None  # the Hub commit, or None for a directory
    files: dict[str, str]  # digest by file name


@dataclass(frozen=True)
class Figures:
    """The figures of one evaluation."""

    attack_success_rate: Rate
    over_refusal_rate: Rate
    invalid: int
    cut_short: int
    kl: float
    perplexity: float
    task_loss: float | None


@dataclass(frozen=True)
class Record:
    """A finished run, completely enough to be run again and compared."""

    kind: str
    command: str
    content_id: str | None
    merged_digest: str  # of all entries that the patch merges to
    base: ModelFiles
    judges: dict[str, ModelFiles]  # guards and classifiers, by the setting's name
    data: dict[str, Source]  # by the setting's name, such as ``train.harmful``
    settings: RunSettings  # with names in place of paths
    environment: dict[str, str | int]  # what else bits can depend on
    before: Figures
    after: Figures


def record_run(
    settings: RunSettings,
    job: Job,
    metadata: AdapterMetadata,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> Record:
    """Describe a finished run by its patch's metadata and its figures."""
    return Record(
        kind=RECORD_KIND,
        command="enhance",
        content_id=metadata.content_id,
        merged_digest=combine_digests(metadata),
        base=describe_model(job.base),
        judges={
            key: describe_model(resolve_base(name)) for key, name in judges_of(settings).items()
        },
        data={
            key: Source(public_source(source), source_digest(source))
            for key, source in sources_of(settings).items()
        },
        settings=without_paths(settings),
        environment=_describe_environment(job),
        before=read_figures(before, "before"),
        after=read_figures(after, "after"),
    )


def read_figures(figures: Any, where: str) -> Figures:
    """Check the figures of an evaluation, and take those that a record has."""
    # Records have one set of fields, which every version reads.
    if isinstance(figures, Mapping):
        figures = {key: figure for key, figure in figures.items() if key != "cut_in_thought"}
    return restore(Figures, figures, where)


def read_record(path: Path) -> Record:
    """Read and check a record, which may come from a stranger."""
    content = read_json(path, DataError)
    if content.get("kind") != RECORD_KIND:
        raise DataError(
            f"{path}: kind: expected {RECORD_KIND!r}, found {content.get('kind')!r}; give the "
            f"directory of a run, or its {REPRODUCE}"
        )
    return restore(Record, content, str(path))


def combine_digests(metadata: AdapterMetadata) -> str:
    """Compute one digest of all entries that a patch merges to."""
    records = metadata.tensors
    lines = (f"{name} {records[name].merged_digest}\n" for name in sorted(records))
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def describe_model(model: BaseModel) -> ModelFiles:
    """Name a model and hash its files."""
    paths = {path for pattern in MODEL_FILES for path in model.path.glob(pattern)}
    name = model.name if model.revision else public_name(model.name)
    return ModelFiles(name, model.revision, {path.name: hash_file(path) for path in sorted(paths)})


def hash_file(path: Path) -> str:
    """Digest a file."""
    with path.open("rb") as file:  # in pieces: weights can be larger than the memory
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def sources_of(settings: RunSettings) -> dict[str, str]:
    """List the sources of requests, and the guards' profiles that are files, by setting."""
    named = {
        f"{job}.{key}": getattr(getattr(settings, job), key)
        for job, keys in SOURCES.items()
        for key in keys
    }
    if not uses_benign(settings.score) and settings.score.benign == ScoreSettings.benign:
        del named["score.benign"]  # unused; older records don't have it
    if settings.compute.chat_template != PLAIN:
        named["compute.chat_template"] = settings.compute.chat_template
    if (profile := settings.score.profile) and profile.endswith(".json"):
        named["score.profile"] = profile
    named |= {
        f"evaluate.judge.{place}": find_profile_file(judge)
        for place, judge in enumerate(settings.evaluate.judge)
    }
    return {key: source for key, source in named.items() if source is not None}


def with_sources(settings: RunSettings, sources: Mapping[str, str]) -> RunSettings:
    """Copy settings with other sources."""
    jobs: dict[str, dict[str, Any]] = {}
    judges = [*settings.evaluate.judge]
    for name, source in sources.items():
        job, key, *place = name.split(".")
        if place:
            judges[int(*place)] = with_profile(judges[int(*place)], source)
        else:
            jobs.setdefault(job, {})[key] = source
    jobs["evaluate"] = jobs.get("evaluate", {}) | {"judge": tuple(judges)}
    changed = {job: replace(getattr(settings, job), **keys) for job, keys in jobs.items()}
    return replace(settings, **changed)


def without_paths(settings: RunSettings) -> RunSettings:
    """Copy settings with names in place of paths."""
    scoring = {f"score.{key}": getattr(settings.score, key) for key in JUDGES}
    paths = sources_of(settings) | {key: name for key, name in scoring.items() if name}
    named = with_sources(settings, {key: public_source(path) for key, path in paths.items()})
    evaluate = replace(named.evaluate, judge=tuple(map(name_judge, settings.evaluate.judge)))
    return replace(named, base=public_name(settings.base), evaluate=evaluate)


def judges_of(settings: RunSettings) -> dict[str, str]:
    """List the models that judge while a run scores or evaluates, by setting."""
    judges = {f"score.{key}": getattr(settings.score, key) for key in JUDGES}
    judges |= {
        f"evaluate.judge.{place}": find_model(judge)
        for place, judge in enumerate(settings.evaluate.judge)
    }
    return {key: name for key, name in judges.items() if name}


def _describe_environment(job: Job) -> dict[str, str | int]:
    is_cuda = job.device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(job.device) if is_cuda else job.device.type,
        "dtype": str(job.dtype).removeprefix("torch."),
    }
