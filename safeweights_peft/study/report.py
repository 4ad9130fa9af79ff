"""The reporting job: from a safety map and its base's config to tables and pictures on disk.

Of the base only names and shapes are needed; its weights are neither read nor fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from safeweights_peft.errors import ModelError, ReportError
from safeweights_peft.fetching import BaseModel, resolve_base
from safeweights_peft.files import check_apart, check_target, publish, write_json
from safeweights_peft.modeling.layout import check_shape, eligible_parameters
from safeweights_peft.modeling.loading import build_empty
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.selection.pattern import Part, count_parts, tabulate
from safeweights_peft.study.page import render_page
from safeweights_peft.study.pictures import plot_pattern

Shapes = Mapping[str, tuple[int, ...]]


def report_map(
    map_dir: Path, out: Path, base: str | None = None, *, overwrite: bool = False
) -> dict[str, Any]:
    """Count a map's entries by layer, component and expert, and writes tables and pictures."""
    check_target(out, overwrite, ReportError)
    artifact = read_artifact(map_dir)
    metadata = artifact.metadata
    found = _find_base(map_dir, metadata, base)
    check_apart(out, {"the base": found.path, "the map": map_dir}, ReportError)
    model = build_empty(found)
    _check_matrices(found, model)
    parameters, hint = dict(model.named_parameters()), f"give the map's base, not {found.name}"
    for name, tensor in metadata.tensors.items():
        check_shape(name, parameters.get(name), tensor, hint)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    parts = count_parts(shapes, eligible_parameters(model), artifact.indices)
    record = {
        "kind": "pattern",
        "map": str(map_dir),
        "artifact": metadata.mode.artifact,
        "base": found.name,
        "base_revision": found.revision,
        "selection": metadata.selection,
        **_figures(parts),
        "safeweights_peft_version": version("safeweights-peft"),
    }
    with publish(out, overwrite, ReportError) as draft:
        write_json(draft / "report.json", record)
        page = render_page(record, plot_pattern(record, draft))
        # A path that isn't Unicode still makes a page.
        (draft / "report.html").write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return record


def _find_base(map_dir: Path, metadata: AdapterMetadata, base: str | None) -> BaseModel:
    name = base or metadata.base_model_name_or_path
    if name is None:
        raise ModelError(
            f"{map_dir}: base_model_name_or_path: expected the base, found null; give --base"
        )
    return resolve_base(name, None if base else metadata.revision, ["config.json"])


def _check_matrices(base: BaseModel, model: PreTrainedModel) -> None:
    if not eligible_parameters(model):
        raise ModelError(
            f"{base.name}: expected a model with matrices beside its embeddings, found none; "
            "give the map's base by --base"
        )


def _figures(parts: list[Part]) -> dict[str, Any]:
    (whole,) = tabulate(parts)
    experts = [row for row in tabulate(parts, "layer", "expert") if row["expert"] is not None]
    return {
        **{key: whole[key] for key in ("parameters", "eligible", "selected")},
        "random_enrichment": whole["parameters"] / whole["eligible"],
        "components": tabulate(parts, "component"),
        "layers": tabulate(parts, "layer"),
        "cells": tabulate(parts, "layer", "component"),
        "experts": experts,
    }
