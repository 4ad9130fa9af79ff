"""What a result was made with: of which base, and by the content id of which adapter.

Every record of a job has these two, in the same form. A directory can be filled anew, a content id
names what was in it; and as an adapter holds digests of its base, it names that base's entries too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safeweights_peft.errors import DataError
from safeweights_peft.fetching import BaseModel
from safeweights_peft.patch.artifacts import Artifact
from safeweights_peft.patch.io import read_artifact


def made_with(base: BaseModel, artifact: Artifact | None) -> dict[str, Any]:
    """Say what a result is made with, to be put into its record."""
    return {
        "base": {"name": base.name, "revision": base.revision},
        "content_id": artifact.metadata.content_id if artifact else None,
    }


def check_made_with(record: Mapping[str, Any], adapter: Path, source: Path) -> None:
    """Check that a result which is there already was made with an adapter as it now is."""
    content_id, found = read_artifact(adapter).metadata.content_id, record.get("content_id")
    if found != content_id:
        raise DataError(
            f"{source}: expected a result for {adapter} with content id {content_id}, found one "
            f"for {found}; delete it, and it is made again"
        )
