"""From a run, or a safety map, and its base's config to tables, pictures and a page on disk."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from safeweights_peft.errors import ModelError, ReportError, SettingsError
from safeweights_peft.fetching import find_base
from safeweights_peft.files import check_apart, check_target, publish, read_json, write_json
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.record import read_figures
from safeweights_peft.jobs.train import LOSSES_FILE
from safeweights_peft.modeling.layout import check_shape, eligible_parameters
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.groups import count_lines
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.records import LINES
from safeweights_peft.rates import find_outcome
from safeweights_peft.schema import flatten
from safeweights_peft.selection.pattern import Part, Place, count_parts, find_places, tabulate
from safeweights_peft.study.pictures import check_installed, plot_pattern, plot_run, plot_sweep
from safeweights_peft.tables import (
    comparison_rows,
    enriched_first,
    grid_rows,
    share_rows,
    sweep_rows,
)

RESULT = "result.json"  # of a run
PARTS = {  # of a result, with what a page shows of each
    "base": {"name"},
    "patch": {"path", "entries", "share_of_weights", "size_bytes"},
    "settings": {"base", "score", "train", "evaluate"},
}
_RUN_AGAIN = "run `safeweights enhance` again, with another --out"
TOP_EXPERTS = 20  # on the page; a model can have thousands


def report_map(
    map_dir: Path, out: Path, base: str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Count a map's entries by layer, component and expert, and write tables and pictures."""
    report = _find_pattern(map_dir, out, base, overwrite)
    with publish(out, overwrite, ReportError) as draft:
        write_json(draft / "report.json", report)
        _write_page(draft, render_page(report, plot_pattern(report, draft)))
    return report


def report_run(
    run: Path, out: Path, base: str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Show a run on one page: what came of it, figures, answers, and where its weights are."""
    result = _read_result(run / RESULT)
    losses = _read_losses(run / "patch" / LOSSES_FILE)
    pattern = _find_pattern(run / "map", out, base, overwrite)
    check_apart(out, {"the patch": run / "patch"}, ReportError)
    report = {
        "kind": "report",
        "content_id": result["content_id"],
        "result": result | {"sweep": _find_sweep(run, result)},
        "pattern": pattern,
    }
    with publish(out, overwrite, ReportError) as draft:
        write_json(draft / "report.json", report)
        plot_run(result, losses, draft / "result.png")
        shown = {"Rates before and after, and losses": draft / "result.png"}
        if swept := report["result"]["sweep"]:
            plot_sweep({"base": result["base"], **swept}, draft / "sweep.png")
            shown["The patch at several scales"] = draft / "sweep.png"
        pictures = plot_pattern(pattern, draft)
        _write_page(draft, render_page(pattern, pictures, report["result"], shown))
    return report


def _read_result(path: Path) -> dict[str, Any]:
    """Read a run's result; of an earlier version's, what it lacks follows from the rest."""
    result = read_json(path, ReportError)
    if result.get("kind") not in ("enhancement", "repair"):
        raise ReportError(
            f"{path}: expected the result of `safeweights enhance` or `repair`, found kind "
            f"{str(result.get('kind'))[:80]}; give the directory of a run, or a safety map"
        )
    try:
        before, after = (asdict(read_figures(result.get(s), s)) for s in ("before", "after"))
        for part, keys in PARTS.items():
            lacking = keys - (result[part].keys() if isinstance(result.get(part), dict) else set())
            if lacking:
                raise SettingsError(f"{part}: expected {', '.join(sorted(lacking))}, found none")
    except SettingsError as error:
        raise ReportError(f"{path}: {error}; {_RUN_AGAIN}") from error
    outcome = find_outcome(before, after)._asdict()
    return {"content_id": None, "sweep": None, "outcome": outcome, "answers": {}} | result


def _read_losses(path: Path) -> list[dict[str, Any]]:
    """Read the losses of a run's steps."""
    losses = read_json(path, ReportError, _RUN_AGAIN).get("losses")
    needed = {"step", "refusal", "retain"}
    if not isinstance(losses, list) or any(
        not isinstance(loss, dict) or needed - loss.keys() for loss in losses
    ):
        raise ReportError(
            f"{path}: expected losses, each with {', '.join(sorted(needed))}, found others; "
            f"{_RUN_AGAIN}"
        )
    return losses


def _find_sweep(run: Path, result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find a sweep of a run's patch: of the run itself, or put into its directory."""
    if result.get("sweep"):
        return dict(result["sweep"])
    for path in (run / "sweep.json", run / "sweep" / "sweep.json"):
        swept = read_json(path, ReportError) if path.exists() else {}
        if swept and swept.get("content_id") == result["content_id"]:
            return {"max_asr": None, "scale": None, **swept}
    return None


def _write_page(draft: Path, page: str) -> None:
    # A path that isn't Unicode still makes a page.
    (draft / "report.html").write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def _find_pattern(map_dir: Path, out: Path, base: str | None, overwrite: bool) -> dict[str, Any]:
    """Count a map's entries by layer, component and expert, and check where a report goes."""
    check_installed("matplotlib")
    check_target(out, overwrite, ReportError)
    artifact = read_artifact(map_dir)
    # Names and shapes are enough, so no weight of the base is fetched or read.
    job = Job(find_base(base, [map_dir], files=["config.json"]))
    check_apart(out, {"the base": job.base.path, "the map": map_dir}, ReportError)
    model = build_empty(job.base)
    eligible = eligible_parameters(model)
    if not eligible:
        raise ModelError(
            f"{job.base.name}: expected a model with matrices beside its embeddings, found none; "
            "give the map's base by --base"
        )
    parameters, hint = dict(model.named_parameters()), f"give the map's base, not {job.base.name}"
    for name, record in artifact.metadata.tensors.items():
        check_shape(name, parameters.get(name), record, hint)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    counted = _count(count_parts(shapes, eligible, artifact.indices))
    lines = {name: count_lines(shapes, {name: own}) for name, own in artifact.indices.items()}
    _add_lines(counted, lines, find_places(shapes, eligible))
    return job.record(
        "pattern",
        artifact,
        map=str(map_dir),
        base=job.base.name,
        base_revision=job.base.revision,
        artifact=artifact.metadata.mode.artifact,
        selection=artifact.metadata.selection,
        **counted,
    )


def _add_lines(
    counted: dict[str, Any], lines: Mapping[str, Mapping[str, int]], places: Mapping[str, Place]
) -> None:
    """Add how many rows and columns are selected whole: in all, and by tensor and place."""
    counted |= _sum_lines(lines.values()) | {"tensors": lines}
    for key in ("component", "layer"):
        for cell in counted[f"{key}s"]:
            names = [name for name in lines if getattr(places[name], key) == cell[key]]
            cell |= _sum_lines([lines[name] for name in names])


def _sum_lines(lines: Collection[Mapping[str, int]]) -> dict[str, int]:
    return {kind.value: sum(own[kind] for own in lines) for kind in LINES}


def render_page(
    record: Mapping[str, Any],
    pictures: Mapping[str, Path],
    result: Mapping[str, Any] | None = None,
    shown: Mapping[str, Path] = MappingProxyType({}),
) -> str:
    """Write a map's pattern, or a run's result with it, as one HTML page, without scripts."""
    facts = {
        record["artifact"]: record["map"],
        "base": record["base"],
        "revision": record["base_revision"],
        "weights": f"{record['parameters']:,}, of which {record['eligible']:,} eligible",
        "selected": f"{record['selected']:,} ({record['selected'] / record['parameters']:.3%})",
        **{f"whole {kind}": f"{record[kind]:,}" for kind in LINES if record.get(kind)},
    }
    folded = {f"selection: {key}": value for key, value in record["selection"].items()}
    settings = flatten(result["settings"]) if result else {}
    tables = {
        "Components": share_rows(enriched_first(record["components"]), "component"),
        "Layers": share_rows(enriched_first(record["layers"]), "layer"),
        "Enrichment by layer and component": grid_rows(record["cells"], "component"),
    }
    if record["experts"]:
        experts = enriched_first(record["experts"])[:TOP_EXPERTS]
        tables[f"The {len(experts)} experts most enriched"] = share_rows(experts, "layer", "expert")
    templates = Environment(
        loader=PackageLoader("safeweights_peft"),
        autoescape=True,  # names in a map may be a stranger's
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    return templates.get_template("report.html.jinja").render(
        facts={key: _as_text(value) for key, value in facts.items() if value is not None},
        folded={key: _as_text(value) for key, value in (folded | settings).items()},
        random=record["random_enrichment"],
        pictures=_embed(pictures),
        tables=tables,
        result=result,
        comparison=comparison_rows(result) if result else [],
        sweep=sweep_rows(result["sweep"]["rows"]) if result and result["sweep"] else [],
        shown=_embed(shown),
    )


def _embed(pictures: Mapping[str, Path]) -> dict[str, str]:
    return {title: b64encode(path.read_bytes()).decode() for title, path in pictures.items()}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(parts: list[Part]) -> dict[str, Any]:
    """Count selected weights by component, layer and expert."""
    (whole,) = tabulate(parts)
    experts = [row for row in tabulate(parts, "layer", "expert") if row["expert"] is not None]
    if not any(row["eligible"] or row["selected"] for row in experts):
        experts = []  # biases of experts alone
    return {
        **{key: whole[key] for key in ("parameters", "eligible", "selected")},
        "random_enrichment": whole["parameters"] / whole["eligible"],
        "components": tabulate(parts, "component"),
        "layers": tabulate(parts, "layer"),
        "cells": tabulate(parts, "layer", "component"),
        "experts": experts,
    }
