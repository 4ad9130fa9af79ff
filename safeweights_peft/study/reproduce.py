"""A recorded run, run again and compared: is the patch the same, and do the rates agree?

What is recorded is in ``recording``. Base and data are found and checked by their digests before
anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safeweights_peft.data import FILE_SUFFIXES, source_digest
from safeweights_peft.errors import BaseMismatchError, DataError, FormatError, ModelError
from safeweights_peft.fetching import resolve_base, split_revision
from safeweights_peft.files import read_json
from safeweights_peft.hub.layout import RESULTS
from safeweights_peft.hub.results import REPRODUCE
from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.jobs.job import Progress
from safeweights_peft.jobs.record import (
    ModelFiles,
    Record,
    describe_model,
    read_record,
    sources_of,
    with_sources,
    without_paths,
)
from safeweights_peft.patch.io import read_metadata
from safeweights_peft.settings import RunSettings, restore
from safeweights_peft.study.compare import compare

STAGES = ("before", "after")
RATES = ("attack_success_rate", "over_refusal_rate")


@dataclass(frozen=True)
class Recorded:
    """A recorded run whose base and data are here, the same by their digests.

    Attributes:
        folder: the record's directory.
        patch: the recorded patch, if it is beside the record.
        record: what was recorded.
        settings: the recorded settings, with the places of base and data on this machine.
    """

    folder: Path
    patch: Path | None
    record: Record
    settings: RunSettings


def find_recorded(path: Path, base: str | None = None, data: Sequence[Path] = ()) -> Recorded:
    """Read a run's record, and finds the same base and the same data."""
    file = _find_record(path)
    record = read_record(file)
    patch = _find_patch(file.parent, record)
    settings = _with_data(_settings_here(file.parent, record), record, data)
    name, revision = settings.base, record.base.revision
    if base is None and revision is None and patch and not Path(name).is_dir():
        metadata = read_metadata(patch)
        name, revision = metadata.base_model_name_or_path or name, metadata.revision
    if base is not None:
        given, asked = (base, None) if Path(base).is_dir() else split_revision(base)
        name, revision = given, asked or (revision if given == name else None)
    if Path(name).is_dir():
        revision = None
    elif base is None and revision is None:
        raise ModelError(
            f"base: expected the directory {record.base.name!r} or a Hub id and its commit, found "
            "neither; give it by --base"
        )
    _check_model("base", name, revision, record.base)
    for key, recorded in record.judges.items():
        _check_model(f"score.{key}", getattr(settings.score, key), None, recorded)
    compute = replace(settings.compute, revision=revision)
    return Recorded(file.parent, patch, record, replace(settings, base=name, compute=compute))


def reproduce(recorded: Recorded, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run a recorded run again and compares."""
    if out.resolve() == recorded.folder.resolve():
        raise DataError(f"{out}: expected a directory for a new run, found the recorded run itself")
    enhance(recorded.settings, out, progress)
    old, new = recorded.record, read_record(out / REPRODUCE)
    rates = {
        f"{stage}.{key}": _compare_rates(old, new, stage, key) for stage in STAGES for key in RATES
    }
    digests = {
        key: {"recorded": getattr(old, key), "found": getattr(new, key)}
        for key in ("content_id", "merged_digest")
    }
    return {
        "kind": "comparison",
        "same": all(each["recorded"] == each["found"] for each in digests.values())
        and all(each["within"] for each in rates.values()),
        **digests,
        "entries": _compare_entries(recorded.patch, out / "patch") if recorded.patch else None,
        "rates": rates,
        "environment": {
            key: {"recorded": old.environment.get(key), "found": new.environment.get(key)}
            for key in sorted(old.environment.keys() | new.environment.keys())
            if old.environment.get(key) != new.environment.get(key)
        },
    }


def _find_record(path: Path) -> Path:
    """Find the record of a run, or of a shared patch, which has it among its results."""
    if not path.is_dir():
        return path
    shared = path / RESULTS / REPRODUCE
    return shared if shared.is_file() else path / REPRODUCE


def _find_patch(folder: Path, record: Record) -> Path | None:
    """Find the recorded patch beside its record: in a run's directory, or in a repository's."""
    for path in (folder / "patch", folder.parent):
        try:
            if read_metadata(path).content_id == record.content_id:
                return path
        except FormatError:
            continue
    return None


def _settings_here(folder: Path, record: Record) -> RunSettings:
    """Take the paths from the run's own ``settings.json`` while they lead to the same names."""
    path = folder / "settings.json"
    if path.is_file():
        settings = restore(RunSettings, read_json(path, DataError), str(path))
        if without_paths(settings) == record.settings:
            return settings
    return record.settings


def _with_data(settings: RunSettings, record: Record, data: Sequence[Path]) -> RunSettings:
    """Put given files in the place of recorded ones, and checks every source by its digest."""
    given = {source_digest(str(path)): str(path) for path in data}
    found = sources_of(settings)
    if found.keys() != record.data.keys():
        raise DataError(
            f"data: expected digests of {', '.join(found)}, found {', '.join(record.data)}; "
            "ask for a whole record"
        )
    for key, recorded in record.data.items():
        found[key] = given.get(recorded.digest, found[key])
        _check_source(key, found[key], recorded.digest)
    return with_sources(settings, found)


def _check_source(key: str, source: str, digest: str) -> None:
    is_file = Path(source).suffix in FILE_SUFFIXES
    there = "nothing" if is_file and not Path(source).is_file() else source_digest(source)
    if there != digest:
        hint = "give the recorded file by --data" if is_file else "install the recorded version"
        raise DataError(f"{key}: {source}: expected {digest}, found {there}; {hint}")


def _check_model(key: str, name: str, revision: str | None, recorded: ModelFiles) -> None:
    files = describe_model(resolve_base(name, revision)).files
    every = recorded.files.keys() | (files.keys() if Path(name).is_dir() else set())
    other = [file for file in sorted(every) if files.get(file) != recorded.files.get(file)]
    if other or not every:
        raise BaseMismatchError(
            f"{key}: {name}: expected the files of the recorded run, found another or no "
            f"{', '.join(other) or 'record of any'}; give the model that was used"
        )


def _compare_entries(old: Path, new: Path) -> dict[str, Any]:
    found = compare([old, new])
    sizes = [each["entries"] for each in found["maps"]]
    (pair,) = found["pairs"]
    return {
        "recorded": sizes[0],
        "found": sizes[1],
        "shared": pair["shared"],
        "iou": pair["iou"],
    }


def _compare_rates(old: Record, new: Record, stage: str, key: str) -> dict[str, Any]:
    was, found = (getattr(getattr(each, stage), key) for each in (old, new))
    within = was.low <= found.rate <= was.high
    return {"recorded": asdict(was), "found": asdict(found), "within": within}
