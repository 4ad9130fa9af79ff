"""The card of a shared patch or map: what it is, how to use it, what was measured, its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from safeweights_peft.cards import CARD_FILE, render_card
from safeweights_peft.errors import HubError
from safeweights_peft.fetching import retry
from safeweights_peft.files import read_json
from safeweights_peft.hub.layout import IMAGES, MAP, RESULTS, Base
from safeweights_peft.hub.pull import TAG
from safeweights_peft.hub.results import (
    REPRODUCE,
    Measured,
    model_index,
    read_results,
    write_eval_results,
)
from safeweights_peft.patch.io import inspect, read_artifact
from safeweights_peft.patch.metadata import AdapterMetadata, read_chat
from safeweights_peft.patch.records import Mode
from safeweights_peft.sources import is_file_name
from safeweights_peft.tables import chat_rows

LICENCE_KEYS = ("license", "license_name", "license_link")
VERSIONS = ("safeweights-peft", "torch", "transformers", "peft", "python")


def write_card(folder: Path, repo_id: str) -> Path:
    """Write a repository's card, and its results as the Hub reads them."""
    metadata = read_artifact(folder).metadata  # with a content id, even of format 1.0
    base = Base.of(metadata)
    content, selection = inspect(folder), metadata.selection
    measured = read_results(folder, metadata.content_id, base)
    licence, total = find_licence(metadata), selection.get("total_parameters")
    card = render_card(
        *("shared", *base),
        card_data=_card_data(metadata, measured, licence, repo_id).to_yaml(),
        repo_id=repo_id,
        is_patch=metadata.mode is Mode.SET,
        method=selection.get("method"),
        scale=metadata.scale,
        picked=_read_picked(folder),
        entries=content["entries"],
        total=total if isinstance(total, int) and total > 0 else None,
        tensors=content["parameters"],
        size_bytes=content["size_bytes"],
        content_id=metadata.content_id,
        licence=licence.get("license_name") or licence.get("license"),
        measured=measured,
        chat=chat_rows(read_chat(selection)),
        pictures=[path.name for path in (folder / IMAGES).glob("*.png")],
        has_map=(folder / MAP).is_dir(),
        **_read_record(folder),
    )
    write_eval_results(folder, measured, repo_id)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return folder / CARD_FILE


def find_licence(metadata: AdapterMetadata) -> dict[str, Any]:
    """Look the base's licence up in its card."""
    name, revision = str(metadata.base_model_name_or_path), metadata.revision
    try:
        card = retry(lambda: HfApi().model_info(name, revision=revision)).card_data
        found = card.to_dict() if card else {}
    except Exception:  # not to be reached, or its author wrote no YAML there: the new card says so
        found = {}
    if not isinstance(found.get("license"), str):
        return {}
    return {key: found[key] for key in LICENCE_KEYS if isinstance(found.get(key), str)}


def _card_data(
    metadata: AdapterMetadata, measured: list[Measured], licence: dict[str, Any], repo_id: str
) -> ModelCardData:
    return ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=metadata.base_model_name_or_path,
        base_model_relation="adapter",
        tags=[TAG, metadata.mode.artifact.replace(" ", "-"), "safety"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=model_index(measured, repo_id) or None,
        **licence,
    )


def _read_picked(folder: Path) -> dict[str, float] | None:
    """Read at which other scale the run found its patch safe enough, if it was asked."""
    path = folder / RESULTS / "result.json"
    swept = read_json(path, HubError).get("sweep") if path.is_file() else None
    if not isinstance(swept, dict):
        return None
    picked = {key: swept.get(key) for key in ("scale", "max_asr")}
    if not all(isinstance(number, int | float) for number in picked.values()):
        return None  # at no scale was it safe enough
    # At 0 the base is, without a patch.
    return picked if picked["scale"] not in (0, 1) else None  # type: ignore[return-value]


def _read_record(folder: Path) -> dict[str, Any]:
    """Read what the run's record says about making the adapter again."""
    path = folder / RESULTS / REPRODUCE
    if not path.is_file():
        return {"versions": None}
    record = read_json(path, HubError)
    try:
        names = {source["name"] for source in record["data"].values()}
        return {
            "versions": {name: record["environment"][name] for name in VERSIONS},
            "data_files": sorted(name for name in names if is_file_name(name)),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{RESULTS}/{REPRODUCE}: expected a run's record, found {type(error).__name__}: "
            f"{error}; take it from the run again"
        ) from error
