"""Scales of patches: PATCH@SCALE, and what `repair` adds; and how long it trains."""

from __future__ import annotations

from pathlib import Path

from safeweights_peft.schema import Setting

# Beyond these bounds a patch ruins a model, whatever is in it.
SCALE = Setting("", name="scale", kind=float, least=-10, most=10)
ADDED = Setting(
    "Add the old patch's values at this scale, and train nothing (RESTA).",
    flag="--add-patch",
    name="add_patch",
    kind=float,
    above=0,
    most=10,
    is_optional=True,
)
REPAIR_STEPS = 30
STEPS = Setting(
    "Optimizer steps.", flag="--steps", name="steps", kind=int, least=1, default=REPAIR_STEPS
)


def split_scale(patch: str) -> tuple[str, float]:
    """Split PATCH@SCALE, where PATCH is a directory or a Hub id; without a scale it is 1."""
    # What follows the last @ is no scale if a directory is called so, nor if it is a revision.
    path, at, suffix = patch.rpartition("@")
    scale = number_or_text(suffix)
    names_revision = isinstance(scale, str) and not Path(path).is_dir()
    if not at or Path(patch).is_dir() or names_revision:
        return patch, 1.0
    checked: float = SCALE.check(scale)
    return path, checked


def number_or_text(text: str) -> float | str:
    """Read a number, for a setting to check; leave what is none as it is."""
    try:
        return float(text)
    except ValueError:
        return text
