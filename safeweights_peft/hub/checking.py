"""Adapters that are on their way: checked in full, and called what the user knows them by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safeweights_peft.errors import FormatError
from safeweights_peft.patch.io import read_artifact
from safeweights_peft.patch.metadata import AdapterMetadata


def check_adapter(folder: Path, known_as: str) -> AdapterMetadata:
    """Check an adapter by every rule of the format."""
    with calling(folder, known_as):
        return read_artifact(folder).metadata


@contextmanager
def calling(folder: Path, known_as: str) -> Iterator[None]:
    """Let errors name a place as the user does."""
    try:
        yield
    except FormatError as error:
        raise type(error)(str(error).replace(str(folder), known_as)) from error
