"""Kinds of judges as data, and judges by what `--judge` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

from safeweights_peft.errors import EvaluationError
from safeweights_peft.evaluation.judges import FunctionJudge, Judge, RefusalJudge, Verdict
from safeweights_peft.evaluation.model_judges import (
    ClassifierReader,
    GuardReader,
    LibraryJudge,
    split_model,
)
from safeweights_peft.evaluation.remote_judge import RemoteJudge
from safeweights_peft.fetching import public_name

Place = tuple[torch.device, torch.dtype | str]
AnyJudge = Judge | str | Callable[[str, str], Verdict]
"""A judge, what `--judge` says, or a function from a request and an answer to a verdict."""

# A new kind is an entry here: what follows its name and a colon, and where models compute.
KINDS: Mapping[str, Callable[[str, Place], Judge]] = MappingProxyType(
    {
        "guard": lambda model, place: GuardReader(model, *place),
        "classifier": lambda model, place: ClassifierReader(model, *place),
        "openai": lambda place_there, _: RemoteJudge(place_there),
        "judgezoo": lambda name, _: LibraryJudge(name),
    }
)

MODELS = ("guard", "classifier")  # kinds that are models on this machine


def find_model(judge: str) -> str | None:
    """Find the model in what `--judge` says, if one is loaded here."""
    kind, _, detail = judge.partition(":")
    return split_model(detail)[0] if kind in MODELS else None


def find_profile_file(judge: str) -> str | None:
    """Find a guard's own profile in what `--judge` says."""
    kind, _, detail = judge.partition(":")
    profile = split_model(detail)[1] if kind == "guard" else None
    return profile if profile and profile.endswith(".json") else None


def with_profile(judge: str, profile: str) -> str:
    """Put another profile's file into what `--judge` says."""
    return f"guard:{find_model(judge)}={profile}"


def name_judge(judge: str) -> str:
    """Put names in place of paths in what `--judge` says."""
    if (model := find_model(judge)) is None:
        return judge
    kind, _, detail = judge.partition(":")
    about = split_model(detail)[1]
    return f"{kind}:{public_name(model)}{f'={public_name(about)}' if about else ''}"


def make_judges(judges: Sequence[AnyJudge], place: Place) -> list[Judge]:
    """Make judges of what names them."""
    return [_make(judge, place) for judge in judges]


def check_judges(judges: Sequence[Judge]) -> None:
    """Have each judge check what it can before models compute, and its name among the others."""
    for judge in judges:
        judge.check()
    names = [judge.name for judge in judges]
    if len({*names}) < len(names):
        raise EvaluationError(
            f"--judge: expected different judges, found {', '.join(names)}; give each once"
        )


def _make(judge: AnyJudge, place: Place) -> Judge:
    if isinstance(judge, Judge):
        return judge
    if not isinstance(judge, str):
        return FunctionJudge(judge)
    if judge == RefusalJudge.name:
        return RefusalJudge()
    kind, _, detail = judge.partition(":")
    if kind not in KINDS or not detail:
        kinds = ", ".join(f"{kind}:…" for kind in KINDS)
        raise EvaluationError(
            f"--judge {judge}: expected {RefusalJudge.name}, {kinds}, found another; choose one"
        )
    return KINDS[kind](detail, place)
