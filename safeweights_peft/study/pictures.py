"""Saved results as pictures. matplotlib is imported only where something is drawn.

Figures are made without pyplot: they need no screen, and nothing holds on to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeweights_peft.tables import Cells, grid, probed

DOTS_PER_INCH = 120
MAX_INCHES = 16
MAX_TICKS = 32
MAX_NUMBERED = 16
"""Columns of a heatmap up to which its cells are wide enough for numbers."""
EVEN, SELECTED = "0.6", "tab:blue"


def plot_run(result: Mapping[str, Any], losses: list[Mapping[str, Any]], path: Path) -> None:
    """Draw a run: rates before and after with their intervals, and the losses over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for offset, stage, colour in ((-0.2, "before", EVEN), (0.2, "after", SELECTED)):
        _draw_rates(bars, result[stage], offset, stage, colour)
    bars.set_xticks([0, 1], ["ASR\n(harmful requests)", "over-refusal\n(benign requests)"])
    bars.set_ylim(0, 1)
    bars.set_ylabel("rate, with 95 % interval")
    bars.legend()
    steps = [loss["step"] for loss in losses]
    for key, label in (("refusal", "refusal term"), ("retain", "retain term (KL)")):
        curves.plot(steps, [max(loss[key], 1e-6) for loss in losses], label=label)
    curves.set(xlabel="step", ylabel="nats per token", yscale="log", ylim=(1e-3, None))
    curves.legend()
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_rates(
    axes: Any, figures: Mapping[str, Any], offset: float, label: str, colour: str
) -> None:
    rates = [figures["attack_success_rate"], figures["over_refusal_rate"]]
    _draw_bars(axes, [offset, 1 + offset], rates, label, colour)


def _draw_bars(
    axes: Any, places: list[float], rates: list[Mapping[str, Any]], label: str, colour: str
) -> None:
    errors = [
        [rate["rate"] - rate["low"] for rate in rates],
        [rate["high"] - rate["rate"] for rate in rates],
    ]
    heights = [rate["rate"] for rate in rates]
    axes.bar(places, heights, 0.4, yerr=errors, capsize=3, color=colour, label=label)


def plot_probe(result: Mapping[str, Any], path: Path) -> None:
    """Draw a probe: ASR and over-refusal of each row, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes, rows = figure.subplots(), result["rows"]
    for offset, key, label, colour in (
        (-0.2, "attack_success_rate", "ASR", "tab:red"),
        (0.2, "over_refusal_rate", "over-refusal", "tab:blue"),
    ):
        places = [place + offset for place in range(len(rows))]
        _draw_bars(axes, places, [row[key] for row in rows], label, colour)
    axes.set_xticks(range(len(rows)), [probed(row).replace(", ", "\n") for row in rows])
    axes.set_ylim(0, 1)
    axes.set_ylabel("rate, with 95 % interval")
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=120)


def plot_pattern(record: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw where a map's entries lie; experts only for a model that has some."""
    layers = [row for row in record["layers"] if row["layer"] is not None]
    level = f"1 = in proportion to all weights, {record['random_enrichment']:.2f} = at random"
    heatmaps = {"component": ("heatmap", record["cells"]), "expert": ("experts", record["experts"])}
    bars = {"component": ("components", record["components"]), "layer": ("layers", layers)}
    written = {}
    for key, (name, cells) in heatmaps.items():
        if cells:
            title = f"Enrichment by layer and {key}"
            written[title] = folder / f"{name}.png"
            _draw_heatmap(cells, key, f"{title}\n({level})", written[title])
    for key, (name, rows) in bars.items():
        title = f"Selected weights against all weights, by {key}"
        written[title] = folder / f"{name}.png"
        _draw_shares(rows, key, title, written[title])
    return written


def _draw_heatmap(cells: Cells, key: str, title: str, path: Path) -> None:
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    layers, columns, enrichments = grid(cells, key)
    values = np.full((len(layers), len(columns)), np.nan)
    for (layer, column), enrichment in enrichments.items():
        values[layers.index(layer), columns.index(column)] = enrichment
    width, height = max(6, 3.5 + 0.55 * len(columns)), 1.5 + 0.24 * len(layers)
    size = min(width, MAX_INCHES), min(height, MAX_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")  # shows where the model has no such weights
    highest = max(2, *enrichments.values())
    norm = TwoSlopeNorm(1, 0, highest)
    image = axes.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto")
    marks = [0, 0.5, 1, (1 + highest) / 2, highest]
    label = "enrichment: share of the selected weights over share of all"
    figure.colorbar(image, label=label, ticks=marks, format="%.1f")
    _mark(axes.set_xticks, columns, rotation=45 if key == "component" else 0)
    _mark(axes.set_yticks, layers)
    axes.set(xlabel=key, ylabel="layer", title=title)
    if len(columns) <= MAX_NUMBERED:
        _write_numbers(axes, values, norm)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _write_numbers(axes: Any, values: Any, norm: Any) -> None:
    """Write each cell's value, light on the dark ends of the colours."""
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            if not math.isnan(value):
                colour = "white" if abs(norm(value) - 0.5) > 0.35 else "black"
                place = {"ha": "center", "va": "center", "fontsize": 7}
                axes.text(column, row, f"{value:.2f}", color=colour, **place)


def _draw_shares(rows: Cells, key: str, title: str, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    width = min(max(6, 2 + 0.3 * len(rows)), MAX_INCHES)
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    for offset, share, label, colour in (
        (-0.2, "parameter_share", "share of all weights", EVEN),
        (0.2, "selected_share", "share of the selected weights", SELECTED),
    ):
        heights = [row[share] for row in rows]
        axes.bar([i + offset for i in range(len(rows))], heights, 0.4, color=colour, label=label)
    _mark(axes.set_xticks, [row[key] for row in rows], rotation=45 if key == "component" else 0)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel=key, ylabel="share", title=title)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _mark(set_ticks: Any, labels: Sequence[str | int], rotation: int = 0) -> None:
    """Label an axis, leaving out as many ticks as there is no room for."""
    ticks = range(0, len(labels), math.ceil(len(labels) / MAX_TICKS))
    aligned = {"rotation": rotation, "ha": "right", "rotation_mode": "anchor"} if rotation else {}
    set_ticks(list(ticks), [str(labels[tick]) for tick in ticks], **aligned)
