"""Names of judges, as people are shown them."""

from __future__ import annotations

import re

_CLASSIFIER = re.compile(r"(classifier:.+?)=(safe|unsafe|refused)=(.+)", re.DOTALL)


def short_judge(name: str) -> str:
    """Name a judge without what a classifier's label means."""
    classifier = _CLASSIFIER.fullmatch(name)
    return classifier[1] if classifier else name


def explain_judge(name: str) -> str | None:
    """Say what a classifier's label means, if a judge's name tells it."""
    classifier = _CLASSIFIER.fullmatch(name)
    return classifier and f"{classifier[1]}: its label {classifier[3]!r} means {classifier[2]}"
