"""What a run leaves for whoever wants to run it again: ``reproduce.json``.

Neither paths nor the name of this machine stand in it: of a directory or a file it has the name
alone, and what is inside as digests. A record may come from anyone, so each value is checked
against its type before it is used. Running it again is in ``reproducing``.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from safeweights_peft.data import source_digest
from safeweights_peft.errors import DataError
from safeweights_peft.fetching import MODEL_FILES, BaseModel, resolve_base
from safeweights_peft.files import read_json
from safeweights_peft.hub.results import REPRODUCE
from safeweights_peft.modeling.loading import pick_device, pick_dtype
from safeweights_peft.patch.io import read_metadata
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.rates import Rate
from safeweights_peft.settings import ComputeSettings, RunSettings, restore

Kind = TypeVar("Kind")

RECORD_KIND = "reproduction"
SOURCES = {
    "score": ("harmful", "contrast"),
    "train": ("harmful", "benign"),
    "evaluate": ("harmful", "benign", "task"),
}
"""The settings that name requests, by job."""
JUDGES = ("guard", "classifier")
"""The settings of scoring that name models."""
PACKAGES = ("safeweights-peft", "torch", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Source:
    """A file or a data set that a run read.

    Attributes:
        name: its name, without its place.
        digest: of its content.
    """

    name: str
    digest: str


@dataclass(frozen=True)
class ModelFiles:
    """A model that a run read.

    Attributes:
        name: Hub id, or the directory's own name.
        revision: the Hub commit, or None for a plain directory.
        files: digest of each file by its name.
    """

    name: str
    revision: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class Figures:
    """What one evaluation found.

    Attributes:
        attack_success_rate: on harmful requests.
        over_refusal_rate: on benign ones.
        invalid: answers that could not be judged.
        kl: to the base, in nats per token.
        perplexity: of the base's answers.
        task_loss: on the task, where one was given.
    """

    attack_success_rate: Rate
    over_refusal_rate: Rate
    invalid: int
    kl: float
    perplexity: float
    task_loss: float | None


@dataclass(frozen=True)
class Record:
    """A finished run, completely enough to be run again and compared.

    Attributes:
        kind: always `RECORD_KIND`.
        command: what made the run; always ``enhance`` so far.
        content_id: of the patch.
        merged_digest: of all entries that it merges to.
        base: the base model.
        judges: guard or classifier by the setting's name.
        data: sources of requests, and a guard's profile that is a file, by the setting's name,
            such as ``train.harmful``.
        settings: the run's settings, seeds included, with names in place of paths.
        environment: what bits can depend on beside these: versions, processor, threads, dtype.
        before: what was measured of the base.
        after: what was measured of the patched model.
    """

    kind: str
    command: str
    content_id: str | None
    merged_digest: str
    base: ModelFiles
    judges: dict[str, ModelFiles]
    data: dict[str, Source]
    settings: RunSettings
    environment: dict[str, str | int]
    before: Figures
    after: Figures


def record_run(
    settings: RunSettings, patch: Path, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Record:
    """Describe a finished run."""
    metadata, compute = read_metadata(patch), settings.compute
    judges = {key: getattr(settings.score, key) for key in JUDGES}
    return Record(
        kind=RECORD_KIND,
        command="enhance",
        content_id=metadata.content_id,
        merged_digest=merged_digest(metadata),
        base=describe_model(resolve_base(settings.base, compute.revision)),
        judges={key: describe_model(resolve_base(name)) for key, name in judges.items() if name},
        data={
            key: Source(public_name(source), source_digest(source))
            for key, source in sources_of(settings).items()
        },
        settings=without_paths(settings),
        environment=describe_environment(compute),
        before=restore(Figures, before, "before"),
        after=restore(Figures, after, "after"),
    )


def read_record(path: Path) -> Record:
    """Read a record, whoever wrote it."""
    content = read_json(path, DataError)
    if content.get("kind") != RECORD_KIND:
        raise DataError(
            f"{path}: kind: expected {RECORD_KIND!r}, found {content.get('kind')!r}; give the "
            f"directory of a run, or its {REPRODUCE}"
        )
    return restore(Record, content, str(path))


def merged_digest(metadata: AdapterMetadata) -> str:
    """Name all entries that a patch merges to, as its content id names what it stores."""
    records = metadata.tensors
    lines = (f"{name} {records[name].merged_digest}\n" for name in sorted(records))
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def describe_model(model: BaseModel) -> ModelFiles:
    """Name a model and its files."""
    paths = {path for pattern in MODEL_FILES for path in model.path.glob(pattern)}
    name = model.name if model.revision else public_name(model.name)
    return ModelFiles(name, model.revision, {each.name: _hash(each) for each in sorted(paths)})


def _hash(path: Path) -> str:
    with path.open("rb") as file:  # in pieces: weights can be larger than the memory
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def sources_of(settings: RunSettings) -> dict[str, str]:
    """Find every source of requests, and a guard's profile that is a file."""
    named = {
        f"{job}.{key}": getattr(getattr(settings, job), key)
        for job, keys in SOURCES.items()
        for key in keys
    }
    if (profile := settings.score.profile) and profile.endswith(".json"):
        named["score.profile"] = profile
    return {key: source for key, source in named.items() if source is not None}


def with_sources(settings: RunSettings, sources: Mapping[str, str]) -> RunSettings:
    """Copy settings with other sources."""
    jobs: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        job, key = name.split(".")
        jobs.setdefault(job, {})[key] = source
    changed = {job: replace(getattr(settings, job), **keys) for job, keys in jobs.items()}
    return replace(settings, **changed)


def without_paths(settings: RunSettings) -> RunSettings:
    """Copy settings with names in place of paths."""
    named = {key: public_name(source) for key, source in sources_of(settings).items()}
    settings = replace(with_sources(settings, named), base=public_name(settings.base))
    judges = {key: getattr(settings.score, key) for key in JUDGES}
    public: dict[str, Any] = {key: name and public_name(name) for key, name in judges.items()}
    return replace(settings, score=replace(settings.score, **public))


def public_name(source: str) -> str:
    """Name a source or a model without its place."""
    return Path(os.path.realpath(source)).name if Path(source).exists() else source


def describe_environment(compute: ComputeSettings) -> dict[str, str | int]:
    """Tell what bits can depend on beside settings and data."""
    device = pick_device(compute.device)
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "dtype": str(pick_dtype(compute.dtype, device)).removeprefix("torch."),
    }
