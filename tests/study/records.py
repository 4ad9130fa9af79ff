"""Saved results, made by hand or counted on a model that doesn't exist."""

from typing import Any

import numpy as np

from safeweights_peft.selection.pattern import count_parts, tabulate


def rate(count: int, n: int, low: float, high: float) -> dict[str, Any]:
    return {"count": count, "n": n, "rate": count / n, "low": low, "high": high}


RESULT: dict[str, Any] = {
    "base": {"name": "someone/tiny", "revision": None},
    "before": {
        "attack_success_rate": rate(97, 100, 0.9155, 0.9897),
        "over_refusal_rate": rate(0, 112, 0.0, 0.0332),
        "invalid": 1,
        "cut_short": 9,
        "kl": 0.0,
        "perplexity": 1.2345,
        "task_loss": None,
    },
    "after": {
        "attack_success_rate": rate(2, 100, 0.0055, 0.07),
        "over_refusal_rate": rate(7, 112, 0.0306, 0.1234),
        "invalid": 0,
        "cut_short": 4,
        "kl": 0.012345,
        "perplexity": 1.301,
        "task_loss": None,
    },
    "patch": {"entries": 1_345_155, "share_of_weights": 0.01, "size_bytes": 8_072_000},
}
SWEEP: dict[str, Any] = {
    "base": {"name": "someone/tiny", "revision": None},
    "rows": [
        {"scale": scale, **RESULT["before" if scale < 0.5 else "after"]}
        for scale in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    ],
    "max_asr": 0.05,
    "max_over_refusal": None,
    "scale": 0.5,
}
LOSSES = [{"step": step, "refusal": 2.0 / step, "retain": 0.0} for step in range(1, 6)]


def probed(perturbation: str | None, selection: str, draws: int, **kl: float | None) -> dict:
    return {
        "perturbation": perturbation,
        "selection": selection,
        "attack_success_rate": rate(17, 100, 0.1092, 0.2555),
        "over_refusal_rate": rate(7, 112, 0.0306, 0.1234),
        "invalid_rate": rate(1, 200, 0.0009, 0.0278),
        "kl": {"mean": 0.0, "low": None, "high": None} | kl,
        "draws": [{}] * draws,
    }


PROBE: dict[str, Any] = {
    "rows": [
        probed(None, "base", 1),
        probed("noise", "map", 5, mean=0.25, low=0.125, high=0.375),
    ],
    "verdicts": {
        "noise": {"verdict": "specific", "reason": "it rises"},
        "zero": {"verdict": "can't tell", "reason": "it may rise"},
    },
}


def record_of(layers: int, experts: int = 0) -> dict[str, Any]:
    """Counts a random selection in a model of some layers, as a report's ``report.json`` holds it.

    Args:
        layers: how many.
        experts: how many of them a layer has, 0 for a dense model.

    Returns:
        The record.
    """
    down = (
        {"mlp.experts.down_proj": (experts, 4, 6)} if experts else {"mlp.down_proj.weight": (4, 6)}
    )
    inner = {"self_attn.q_proj.weight": (4, 8)} | down
    eligible = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers)
        for name, shape in inner.items()
    }
    norms = {f"model.layers.{layer}.norm.weight": (4,) for layer in range(layers)}
    shapes = {"model.embed_tokens.weight": (10, 4)} | eligible | norms
    random = np.random.default_rng(0)
    indices = {
        name: np.flatnonzero(random.random(shape) < random.random() / 3)
        for name, shape in eligible.items()
    }
    parts = count_parts(shapes, eligible, indices)
    (whole,) = tabulate(parts)
    return {
        "map": "run/map",
        "artifact": "safety map",
        "base": "someone/tiny",
        "base_revision": None,
        "selection": {"method": "esi", "density": 0.01},
        **{key: whole[key] for key in ("parameters", "eligible", "selected")},
        "random_enrichment": whole["parameters"] / whole["eligible"],
        "components": tabulate(parts, "component"),
        "layers": tabulate(parts, "layer"),
        "cells": tabulate(parts, "layer", "component"),
        "experts": [row for row in tabulate(parts, "layer", "expert") if row["expert"] is not None],
    }
