"""Where a shared patch or map has its files in a repository; ``docs/hub.md`` says so to people.

Here live the names alone. What stands in the files does not.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from safeweights_peft.cards import CARD_FILE
from safeweights_peft.patch.io import ADAPTER_FILES
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


def belongs(path: str) -> bool:
    """Tell whether a file of a repository is of a shared patch or map."""
    return any(
        fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in PATTERNS
    )


def is_unsafe(path: str) -> bool:
    """Tell whether programs would unpickle a file."""
    return PurePosixPath(path).suffix.lower() in UNSAFE


def is_foreign(path: str) -> bool:
    """Tell whether a file makes a repository that of something else, such as a whole model."""
    other = not belongs(path)
    return other and (path == "config.json" or PurePosixPath(path).suffix.lower() in _MODEL)
