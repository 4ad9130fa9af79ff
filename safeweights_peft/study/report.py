"""From a safety map and its base's config to tables, pictures and a page on disk."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from safeweights_peft.errors import ModelError, ReportError
from safeweights_peft.fetching import find_base
from safeweights_peft.files import check_apart, check_target, publish, write_json
from safeweights_peft.jobs.job import Job
from safeweights_peft.modeling.layout import check_shape, eligible_parameters
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.selection.pattern import Part, count_parts, tabulate
from safeweights_peft.study.pictures import check_installed, plot_pattern
from safeweights_peft.tables import enriched_first, grid_rows, share_rows

TOP_EXPERTS = 20  # on the page; a model can have thousands


def report_map(
    map_dir: Path, out: Path, base: str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Count a map's entries by layer, component and expert, and write tables and pictures."""
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
    report = job.record(
        "pattern",
        artifact,
        map=str(map_dir),
        base=job.base.name,
        base_revision=job.base.revision,
        artifact=artifact.metadata.mode.artifact,
        selection=artifact.metadata.selection,
        **_count(count_parts(shapes, eligible, artifact.indices)),
    )
    with publish(out, overwrite, ReportError) as draft:
        write_json(draft / "report.json", report)
        page = render_page(report, plot_pattern(report, draft))
        # A path that isn't Unicode still makes a page.
        (draft / "report.html").write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return report


def render_page(record: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """Write a report as one HTML page with its pictures inside, without scripts."""
    facts = {
        record["artifact"]: record["map"],
        "base": record["base"],
        "revision": record["base_revision"],
        "weights": f"{record['parameters']:,}, of which {record['eligible']:,} eligible",
        "selected": f"{record['selected']:,} ({record['selected'] / record['parameters']:.3%})",
        **{f"selection: {key}": value for key, value in record["selection"].items()},
    }
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
        random=record["random_enrichment"],
        pictures={title: b64encode(path.read_bytes()).decode() for title, path in pictures.items()},
        tables=tables,
    )


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
