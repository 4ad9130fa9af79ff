"""Where a repository on the Hub has the files of a patch or a map; ``docs/hub.md`` shows it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from safeweights_peft.cards import CARD_FILE
from safeweights_peft.errors import FormatError
from safeweights_peft.patch.io import ADAPTER_FILES, read_artifact
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.signing import SIGNATURE_FILE

MAP, RESULTS, IMAGES, FIGURES = "map", "results", "images", ".eval_results"
PATTERNS = (
    *ADAPTER_FILES,
    CARD_FILE,
    f"{FIGURES}/*.yaml",
    f"{RESULTS}/*.json",
    f"{IMAGES}/*.png",
    SIGNATURE_FILE,
    *(f"{MAP}/{name}" for name in (*ADAPTER_FILES, SIGNATURE_FILE)),
)
"""Every file that a push writes and a pull fetches; others in a repository are left alone."""

UNSAFE = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of files that programs unpickle, which runs code."""

_MODEL = (".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", *UNSAFE)


class Base(NamedTuple):
    """A base as adapters and results record it."""

    name: str | None
    commit: str | None

    def __str__(self) -> str:
        """Name it in a message."""
        return f"{self.name} at {self.commit}" if self.commit else str(self.name)

    @classmethod
    def of(cls, metadata: AdapterMetadata) -> Base:
        """Return the base that an adapter was made for."""
        return cls(metadata.base_model_name_or_path, metadata.revision)


def belongs(path: str) -> bool:
    """Tell whether a file of a repository is part of a shared patch or map."""
    return any(
        # A * of fnmatch would match a / too, and thus files in folders of others.
        fnmatchcase(path, pattern) and path.count("/") == pattern.count("/")
        for pattern in PATTERNS
    )


def is_unsafe(path: str) -> bool:
    """Tell whether programs would unpickle a file."""
    return PurePosixPath(path).suffix.lower() in UNSAFE


def is_foreign(path: str) -> bool:
    """Tell whether a file shows that a repository holds something else, such as a whole model."""
    is_model = path == "config.json" or PurePosixPath(path).suffix.lower() in _MODEL
    return is_model and not belongs(path)


def check_adapter(folder: Path, name: str) -> AdapterMetadata:
    """Check an adapter by every rule of the format; errors call its folder by ``name``."""
    try:
        return read_artifact(folder).metadata
    except FormatError as error:
        raise type(error)(str(error).replace(str(folder), name)) from error
