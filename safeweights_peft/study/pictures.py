"""Saved results as pictures, drawn without pyplot: no screen is needed, no figure is left open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from safeweights_peft.errors import ReportError
from safeweights_peft.tables import Cells, grid, name_row, size_text

DOTS_PER_INCH = 120
MAX_INCHES = 16
STACKED = (5.2, 7.0)  # inches: narrow enough to be read on a phone
MAX_TICKS = 32
MAX_NUMBERED = 16  # columns of a heatmap up to which its cells are wide enough for numbers
ALL, SELECTED = "0.6", "tab:blue"  # colours
# Label, colour and threshold of each rate of a sweep.
RATES = {
    "attack_success_rate": ("ASR", "tab:red", "max_asr"),
    "over_refusal_rate": ("over-refusal", "tab:blue", "max_over_refusal"),
}


def check_installed(*packages: str) -> None:
    """Refuse to go on without packages of the extra `study`."""
    # Jobs that draw call this first: found missing at the end, it would cost hours of work.
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ReportError(
            f"{', '.join(missing)}: expected to be installed, found nothing; run "
            "pip install 'safeweights-peft[study]'"
        )


def plot_run(result: Mapping[str, Any], losses: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a run: rates before and after with their intervals, and the losses over the steps."""
    figure = _make_figure(*STACKED)
    figure.suptitle(_title(result), fontsize="medium")
    bars, curves = figure.subplots(2, 1)
    for offset, stage, colour in ((-0.2, "before", ALL), (0.2, "after", SELECTED)):
        rates = [result[stage][key] for key in ("attack_success_rate", "over_refusal_rate")]
        _draw_rates(bars, offset, rates, stage, colour)
    bars.set_xticks([0, 1], ["ASR\n(harmful requests)", "over-refusal\n(benign requests)"])
    bars.legend()
    steps = [loss["step"] for loss in losses]
    for key, label in (("refusal", "refusal term"), ("retain", "retain term (KL)")):
        curves.plot(steps, [max(loss[key], 1e-6) for loss in losses], label=label)
    curves.set(xlabel="step", ylabel="nats per token", yscale="log", ylim=(1e-3, None))
    if losses:
        curves.legend()
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_sweep(result: Mapping[str, Any], path: Path) -> None:
    """Draw a sweep: ASR and over-refusal by scale with their intervals, and KL by scale."""
    figure, rows = _make_figure(*STACKED), result["rows"]
    figure.suptitle(f"{_name(result)}\none patch at several scales", fontsize="medium")
    rates, costs = figure.subplots(2, 1)
    scales = [row["scale"] for row in rows]
    curves = [[row[key]["rate"] for row in rows] for key in RATES]
    # The numbers of the higher curve go above it, those of the lower one below.
    asr_is_higher = [asr >= refused for asr, refused in zip(*curves, strict=True)]
    for (key, (label, colour, limit)), curve in zip(RATES.items(), curves, strict=True):
        ends = [[row[key][end] for row in rows] for end in ("low", "high")]
        rates.plot(scales, curve, color=colour, marker="o", label=label)
        rates.fill_between(scales, *ends, color=colour, alpha=0.15, linewidth=0)
        for scale, rate, is_higher in zip(scales, curve, asr_is_higher, strict=True):
            offset = 6 if is_higher == (label == "ASR") else -13
            place = {"textcoords": "offset points", "xytext": (0, offset)}
            rates.annotate(f"{rate:.0%}", (scale, rate), ha="center", fontsize=8, **place)
        if result.get(limit) is not None:
            rates.axhline(result[limit], color=colour, linestyle=":")
    costs.plot(scales, [row["kl"] for row in rows], color="tab:purple", marker="o")
    for axes in (rates, costs):
        axes.set_xticks(scales)
        axes.set(xlabel="scale")
        if result["scale"] is not None:
            axes.axvline(result["scale"], color="0.5", linestyle="--", zorder=0)
    rates.set(ylim=(-0.12, 1.12), ylabel="rate, with 95 % interval")
    costs.set(ylim=(0, None), ylabel="KL to the base, nats per token")
    rates.legend()
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_probe(result: Mapping[str, Any], path: Path) -> None:
    """Draw a probe: ASR and over-refusal of each row, with their intervals."""
    figure, rows = _make_figure(9, 3.9), result["rows"]
    axes = figure.subplots()
    for offset, key, label, colour in (
        (-0.2, "attack_success_rate", "ASR", "tab:red"),
        (0.2, "over_refusal_rate", "over-refusal", "tab:blue"),
    ):
        _draw_rates(axes, offset, [row[key] for row in rows], label, colour)
    axes.set_xticks(range(len(rows)), [name_row(row).replace(", ", "\n") for row in rows])
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_pattern(record: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw where a map's entries lie, and return the pictures by title."""
    layers = [row for row in record["layers"] if row["layer"] is not None]
    level = f"1 = in proportion to all weights, {record['random_enrichment']:.2f} = at random"
    share = record["selected"] / record["parameters"]
    whole = f"{_last(record['base'])}, {record['selected']:,} weights ({share:.2%})"
    heatmaps = {"component": ("heatmap", record["cells"]), "expert": ("experts", record["experts"])}
    bars = {"component": ("components", record["components"]), "layer": ("layers", layers)}
    pictures = {}
    for key, (name, cells) in heatmaps.items():
        if cells:  # only some models have experts
            title = f"Enrichment by layer and {key}"
            pictures[title] = folder / f"{name}.png"
            _draw_heatmap(cells, key, f"{whole}\n{title}\n({level})", pictures[title])
    for key, (name, rows) in bars.items():
        title = f"Selected weights against all weights, by {key}"
        pictures[title] = folder / f"{name}.png"
        _draw_fractions(rows, key, f"{whole}\n{title}", pictures[title])
    return pictures


def _make_figure(width: float, height: float) -> Any:
    """Make a figure of a size in inches."""
    check_installed("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(min(width, MAX_INCHES), min(height, MAX_INCHES)), layout="constrained")


def _name(result: Mapping[str, Any]) -> str:
    """Name a result's base without its place, as pictures are shared."""
    return _last(result["base"]["name"])


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _title(result: Mapping[str, Any]) -> str:
    patch = result["patch"]
    share = f"{patch['entries']:,} weights ({patch['share_of_weights']:.2%})"
    return f"{_name(result)}\npatch of {share}, {size_text(patch['size_bytes'])}"


def _draw_rates(
    axes: Any, offset: float, rates: Sequence[Mapping[str, Any]], label: str, colour: str
) -> None:
    """Draw one bar at each tick, moved aside by an offset."""
    errors = [
        [rate["rate"] - rate["low"] for rate in rates],
        [rate["high"] - rate["rate"] for rate in rates],
    ]
    heights = [rate["rate"] for rate in rates]
    places = [tick + offset for tick in range(len(rates))]
    axes.bar(places, heights, 0.4, yerr=errors, capsize=3, color=colour, label=label)
    for place, rate in zip(places, rates, strict=True):
        axes.text(place, rate["high"] + 0.02, f"{rate['rate']:.0%}", ha="center", fontsize=8)
    axes.set(ylim=(0, 1.12), ylabel="rate, with 95 % interval")


def _draw_heatmap(cells: Cells, key: str, title: str, path: Path) -> None:
    layers, columns, enrichments = grid(cells, key)
    values = np.full((len(layers), len(columns)), np.nan)
    for (layer, column), enrichment in enrichments.items():
        values[layers.index(layer), columns.index(column)] = enrichment
    figure = _make_figure(max(6, 3.5 + 0.55 * len(columns)), max(3.6, 1.8 + 0.24 * len(layers)))
    from matplotlib.colors import TwoSlopeNorm

    axes = figure.subplots()
    axes.set_facecolor("0.85")  # shows where the model has no such weights
    highest = max(2, *enrichments.values())
    norm = TwoSlopeNorm(1, 0, highest)
    image = axes.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto")
    marks = [0, 0.5, 1, (1 + highest) / 2, highest]
    label = "enrichment: share of selected\nweights over share of all"
    figure.colorbar(image, label=label, ticks=marks, format="%.1f")
    _mark(axes.set_xticks, columns, rotation=45 if key == "component" else 0)
    _mark(axes.set_yticks, layers)
    axes.set(xlabel=key, ylabel="layer", title=title)
    if len(columns) <= MAX_NUMBERED:
        _write_numbers(axes, values, norm)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _write_numbers(axes: Any, values: Any, norm: Any) -> None:
    """Write each cell's value, light on the dark ends of the colours."""
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "white" if abs(norm(value) - 0.5) > 0.35 else "black"
            place = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column, row, f"{value:.2f}", color=colour, **place)


def _draw_fractions(rows: Cells, key: str, title: str, path: Path) -> None:
    figure = _make_figure(max(6, 2 + 0.8 * min(len(rows), 12)), 4.4)
    axes = figure.subplots()
    for offset, fraction, label, colour in (
        (-0.2, "parameter_share", "share of all weights", ALL),
        (0.2, "selected_share", "share of the selected weights", SELECTED),
    ):
        heights = [row[fraction] for row in rows]
        places = [i + offset for i in range(len(rows))]
        bars = axes.bar(places, heights, 0.4, color=colour, label=label)
        if len(rows) <= MAX_NUMBERED:
            axes.bar_label(bars, [f"{height:.1%}" for height in heights], fontsize=7, padding=1)
    _mark(axes.set_xticks, [row[key] for row in rows], rotation=45 if key == "component" else 0)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.margins(y=0.1)
    axes.set(xlabel=key, ylabel="share", title=title)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _mark(set_ticks: Any, labels: Sequence[str | int], rotation: int = 0) -> None:
    """Label an axis, leaving out ticks for which there is no room."""
    ticks = range(0, len(labels), math.ceil(len(labels) / MAX_TICKS))
    aligned = {"rotation": rotation, "ha": "right", "rotation_mode": "anchor"} if rotation else {}
    set_ticks(list(ticks), [str(labels[tick]) for tick in ticks], **aligned)
