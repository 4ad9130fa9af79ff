"""Finds patches and maps on the Hub by their base, with the results that their cards tell.

Cards are written by anyone: what one says is shown as its author's claim, and a malformed one is
shown without results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.utils import validate_repo_id

from safeweights_peft.errors import HubError
from safeweights_peft.fetching import HUB_ERRORS, explain, patiently

TAG = "safeweights"
KINDS = {"safety-patch": "safety patch", "safety-map": "safety map"}


@dataclass(frozen=True)
class Claim:
    """One result, as a card tells it.

    Attributes:
        metric: what was measured.
        dataset: on what.
        value: the figure.
    """

    metric: str
    dataset: str
    value: float | str


@dataclass(frozen=True)
class Shared:
    """A patch or a map that was found.

    Attributes:
        repo_id: its repository.
        artifact: "safety patch" or "safety map".
        commit: the commit at the tip of its main branch.
        date: when that was pushed, in ISO 8601.
        results: what its card tells.
    """

    repo_id: str
    artifact: str
    commit: str
    date: str
    results: tuple[Claim, ...]


def find_on_hub(base: str) -> list[Shared]:
    """Find patches and maps for a base.

    Args:
        base: the base's Hub id.

    Returns:
        What was found, by name.

    Raises:
        HubError: it is no Hub id, or the Hub can't be asked.
    """
    wanted = [TAG, f"base_model:adapter:{base}"]
    properties: list[Any] = ["tags", "sha", "lastModified", "model-index"]
    try:
        validate_repo_id(base)
        found = patiently(lambda: list(HfApi().list_models(filter=wanted, expand=properties)))
    except HUB_ERRORS as error:
        raise HubError(f"{base}: expected to search for it, {explain(error, base)}") from error
    shared = [_shared(info) for info in found]
    return sorted((each for each in shared if each is not None), key=lambda each: each.repo_id)


def _shared(info: ModelInfo) -> Shared | None:
    artifact = next((name for tag, name in KINDS.items() if tag in (info.tags or ())), None)
    if artifact is None:
        return None
    date = info.last_modified.isoformat(timespec="seconds") if info.last_modified else ""
    return Shared(info.id, artifact, info.sha or "", date, tuple(_claims(info.model_index)))


def _claims(index: Any) -> list[Claim]:
    """Read a card's model-index as far as it has the right form."""
    claims = []
    try:
        for entry in index or ():
            for result in entry["results"]:
                name = str(result["dataset"]["name"])
                for metric in result["metrics"]:
                    value = metric["value"]
                    shown = value if type(value) in (int, float) else str(value)
                    claims.append(Claim(str(metric.get("name") or metric["type"]), name, shown))
    except (KeyError, TypeError, AttributeError):
        return []
    return claims
