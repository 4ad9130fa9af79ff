"""Run a recorded run again, and compare: is the patch the same, and do the rates agree?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safeweights_peft.errors import BaseMismatchError, DataError, FormatError, ModelError
from safeweights_peft.fetching import resolve_base, split_revision
from safeweights_peft.files import read_json
from safeweights_peft.hub.layout import RESULTS
from safeweights_peft.hub.results import REPRODUCE
from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.jobs.record import (
    Figures,
    ModelFiles,
    Record,
    describe_model,
    judges_of,
    read_figures,
    read_record,
    sources_of,
    with_sources,
    without_paths,
)
from safeweights_peft.jobs.sweep import SCALES
from safeweights_peft.patch.io import read_metadata
from safeweights_peft.progress import Progress
from safeweights_peft.rates import Rate
from safeweights_peft.schema import restore
from safeweights_peft.settings import RunSettings
from safeweights_peft.sources import (
    is_file_name,
    is_missing,
    parse_source,
    source_digest,
    with_column,
)
from safeweights_peft.study.compare import compare
from safeweights_peft.tables import picked_row

STAGES = ("before", "after")
RATES = ("attack_success_rate", "over_refusal_rate")


@dataclass(frozen=True)
class Picked:
    """The scale that a run names beside its patch, and what was measured there."""

    max_asr: float
    scale: float
    figures: Figures


@dataclass(frozen=True)
class Recorded:
    """A recorded run whose base and data are here, the same by their digests."""

    folder: Path  # the record's
    patch: Path | None  # the recorded one, if it is beside the record
    record: Record
    settings: RunSettings  # the recorded ones, with the places of base and data on this machine
    picked: Picked | None = None  # if the run names another scale than 1


def find_recorded(path: Path, base: str | None = None, data: Sequence[Path] = ()) -> Recorded:
    """Read a run's record, and find the same base and the same data."""
    if path.is_dir():  # of a run, or of a shared patch, which has the record among its results
        places = (path / RESULTS / REPRODUCE, path / REPRODUCE)
        if not (record_path := next((place for place in places if place.is_file()), None)):
            run = path.resolve().parent
            hint = path.parent if (run / REPRODUCE).is_file() else "the directory of a run"
            raise DataError(f"{path}: expected {REPRODUCE}, found none; give {hint}")
        path = record_path
    record = read_record(path)
    patch = _find_patch(path.parent, record)
    settings = _find_data(_localize(path.parent, record), record, data)
    name, revision = _find_base(base, settings.base, record, patch)
    # All is checked by digests now, not after hours of training on something else.
    _check_model("base", name, revision, record.base)
    judges = judges_of(settings)
    for key, judge in record.judges.items():
        _check_model(key, judges.get(key, judge.name), None, judge)
    compute = replace(settings.compute, revision=revision)
    settings = replace(settings, base=name, compute=compute)
    return Recorded(path.parent, patch, record, settings, _read_picked(path.parent, record))


def reproduce(recorded: Recorded, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run a recorded run again, and compare the two."""
    if out.resolve() == recorded.folder.resolve():
        raise DataError(f"{out}: expected a directory for a new run, found the recorded run itself")
    picked = recorded.picked
    result = enhance(recorded.settings, out, progress, picked.max_asr if picked else None)
    old, new = recorded.record, read_record(out / REPRODUCE)
    stages = {stage: (getattr(old, stage), getattr(new, stage)) for stage in STAGES}
    if picked:
        rows = {row["scale"]: row for row in result["sweep"]["rows"]}
        again = _figures_of(rows[picked.scale], "again")
        stages[f"at scale {picked.scale:g}"] = picked.figures, again
    rates = {
        f"{stage}.{key}": _compare_rates(getattr(before, key), getattr(after, key))
        for stage, (before, after) in stages.items()
        for key in RATES
    }
    digests = {
        key: _pair(getattr(old, key), getattr(new, key)) for key in ("content_id", "merged_digest")
    }
    environment = {
        key: _pair(old.environment.get(key), new.environment.get(key))
        for key in sorted(old.environment.keys() | new.environment.keys())
    }
    return {
        "kind": "comparison",
        "same": all(map(_agrees, digests.values()))
        and all(rate["within"] for rate in rates.values()),
        **digests,
        "entries": _compare_entries(recorded.patch, out / "patch") if recorded.patch else None,
        "rates": rates,
        "environment": {key: pair for key, pair in environment.items() if not _agrees(pair)},
    }


def _find_patch(folder: Path, record: Record) -> Path | None:
    """Find the recorded patch beside its record: in a run's directory, or in a repository's."""
    for path in (folder / "patch", folder.parent):
        try:
            if read_metadata(path).content_id == record.content_id:
                return path
        except FormatError:
            continue
    return None


def _read_picked(folder: Path, record: Record) -> Picked | None:
    """Read the scale that a run names in its result, which the record doesn't have."""
    path = folder / "result.json"
    result = read_json(path, DataError) if path.is_file() else {}
    if not result.get("sweep") or result.get("content_id") != record.content_id:
        return None
    try:
        row, max_asr = picked_row(result), result["sweep"]["max_asr"]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: sweep: expected rows, scale and max_asr, found {type(error).__name__}: "
            f"{error}; give the run's {REPRODUCE} alone"
        ) from error
    if row is None or row["scale"] not in SCALES or row["scale"] == 1:
        return None
    where = f"{path}: sweep at {row['scale']:g}"
    picked = {"max_asr": max_asr, "scale": row["scale"], "figures": asdict(_figures_of(row, where))}
    return restore(Picked, picked, str(path))


def _figures_of(row: Mapping[str, Any], where: str) -> Figures:
    return read_figures({key: figure for key, figure in row.items() if key != "scale"}, where)


def _localize(folder: Path, record: Record) -> RunSettings:
    """Take the paths from the run's own ``settings.json`` while they lead to the same names."""
    path = folder / "settings.json"
    if path.is_file():
        settings = restore(RunSettings, read_json(path, DataError), str(path))
        if without_paths(settings) == record.settings:
            return settings
    return record.settings


def _find_data(settings: RunSettings, record: Record, data: Sequence[Path]) -> RunSettings:
    """Replace recorded files by given ones of the same content, and check every source."""
    paths = {source_digest(str(path)): str(path) for path in data}
    sources = sources_of(settings)
    if sources.keys() != record.data.keys():
        raise DataError(
            f"data: expected digests of {', '.join(sources)}, found {', '.join(record.data)}; "
            "ask for a whole record"
        )
    for key, recorded in record.data.items():
        if path := paths.get(recorded.digest):
            sources[key] = with_column(path, parse_source(sources[key]).column)
        _check_source(key, sources[key], recorded.digest)
    return with_sources(settings, sources)


def _check_source(key: str, source: str, digest: str) -> None:
    is_file = is_file_name(source)
    found = "nothing" if is_missing(source) else source_digest(source)
    if found != digest:
        hint = "give the recorded file by --data" if is_file else "install the recorded version"
        raise DataError(f"{key}: {source}: expected {digest}, found {found}; {hint}")


def _find_base(
    base: str | None, name: str, record: Record, patch: Path | None
) -> tuple[str, str | None]:
    """Find a base's name and commit: the given one, the recorded one, or the patch's."""
    revision = record.base.revision
    if base is not None:
        if Path(base).is_dir():
            return base, None
        hub_id, commit = split_revision(base)
        return hub_id, commit or (revision if hub_id == name else None)
    if Path(name).is_dir():
        return name, None
    if revision is None and patch:
        # A record knows a directory by its last name only; the patch knows its path.
        metadata = read_metadata(patch)
        name, revision = metadata.base_model_name_or_path or name, metadata.revision
        if Path(name).is_dir():
            return name, None
    if revision is None:
        raise ModelError(
            f"base: expected the directory {record.base.name!r} or a Hub id and its commit, found "
            "neither; give it by --base"
        )
    return name, revision


def _check_model(key: str, name: str, revision: str | None, recorded: ModelFiles) -> None:
    files = describe_model(resolve_base(name, revision)).files
    names = recorded.files.keys() | (files.keys() if Path(name).is_dir() else set())
    differing = [file for file in sorted(names) if files.get(file) != recorded.files.get(file)]
    if differing or not names:
        raise BaseMismatchError(
            f"{key}: {name}: expected the files of the recorded run, found another or no "
            f"{', '.join(differing) or 'record of any'}; give the model that was used"
        )


def _compare_entries(old: Path, new: Path) -> dict[str, Any]:
    overlap = compare([old, new])
    sizes = [described["entries"] for described in overlap["maps"]]
    (pair,) = overlap["pairs"]
    return {**_pair(*sizes), "shared": pair["shared"], "iou": pair["iou"]}


def _compare_rates(recorded: Rate, found: Rate) -> dict[str, Any]:
    within = recorded.low <= found.rate <= recorded.high
    return {**_pair(asdict(recorded), asdict(found)), "within": within}


def _pair(recorded: Any, found: Any) -> dict[str, Any]:
    return {"recorded": recorded, "found": found}


def _agrees(pair: dict[str, Any]) -> bool:
    return bool(pair["recorded"] == pair["found"])
