"""Saved results -> tables and pictures. Reads plain JSON; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, str, str]


def comparison_rows(result: Mapping[str, Any]) -> list[Row]:
    """Lays out a run's figures before and after.

    Args:
        result: the content of a run's ``result.json``.

    Returns:
        Rows of (figure, before, after), as text.
    """
    before, after, patch = result["before"], result["after"], result["patch"]
    perplexities = f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"
    return [
        *judged_rows(before, after),
        ("KL to the base (nats/token)", f"{before['kl']:.4f}", f"{after['kl']:.4f}"),
        ("perplexity of the base's answers", *perplexities),
        ("weights changed", "0", f"{patch['entries']:,} ({patch['share_of_weights']:.3%})"),
        ("patch size", "", size_text(patch["size_bytes"])),
    ]


def judged_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Row]:
    """Lays out what was judged of a model before and after a change, and its loss on a task.

    Args:
        before: the figures of one evaluation.
        after: those of another, on the same requests.

    Returns:
        Rows of (figure, before, after), as text; the loss is left out where no task was given.
    """
    rows = [
        (title, rate_text(before[key]), rate_text(after[key]))
        for title, key in (
            ("ASR, harmful requests", "attack_success_rate"),
            ("over-refusal, benign requests", "over_refusal_rate"),
        )
    ]
    rows.append(("invalid answers", str(before["invalid"]), str(after["invalid"])))
    if before["task_loss"] is not None:
        losses = f"{before['task_loss']:.4f}", f"{after['task_loss']:.4f}"
        rows.append(("loss on the task (nats/token)", *losses))
    return rows


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lays out one evaluation's figures.

    Args:
        evaluation: what the evaluation job returned.

    Returns:
        Rows of (figure, value), as text.
    """
    harmful, benign, utility = (evaluation[key] for key in ("harmful", "benign", "utility"))
    rows = [
        ("ASR, harmful requests", rate_text(harmful["attack_success_rate"])),
        ("over-refusal, benign requests", rate_text(benign["over_refusal_rate"])),
        ("invalid answers", str(harmful["invalid"] + benign["invalid"])),
        ("KL to the base (nats/token)", f"{utility['kl']:.4f}"),
        ("perplexity of the base's answers", f"{utility['perplexity']:.2f}"),
    ]
    if evaluation["task"]:
        rows.append(("loss on the task (nats/token)", f"{evaluation['task']['loss']:.4f}"))
    return rows


def rate_text(rate: Mapping[str, Any]) -> str:
    """Writes a rate with its interval.

    Args:
        rate: count, n, rate, low and high.

    Returns:
        For instance ``97.0 % [91.5, 99.0] (97/100)``.
    """
    return f"{_interval_text(rate)} ({rate['count']}/{rate['n']})"


def _interval_text(rate: Mapping[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def size_text(size_bytes: float) -> str:
    """Writes a size in the largest decimal unit that leaves at least 1.

    Args:
        size_bytes: the size.

    Returns:
        For instance ``8.1 MB``.
    """
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size_bytes /= 1000
        if size_bytes < 999.95:  # 999.95 and more are written as 1000.0
            return f"{size_bytes:.1f} {unit}"
    size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def plot_run(result: Mapping[str, Any], losses: list[Mapping[str, Any]], path: Path) -> None:
    """Draws a run: rates before and after with their intervals, and the losses over the steps.

    Args:
        result: the content of a run's ``result.json``.
        losses: the losses in the patch's ``training.json``.
        path: the PNG file to be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for offset, stage, colour in ((-0.2, "before", "0.6"), (0.2, "after", "tab:blue")):
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
    figure.savefig(path, dpi=120)


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


def probe_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lays out a probe's figures: one row for the base, one for each selection perturbed.

    Args:
        result: the content of a ``probe.json``.

    Returns:
        Rows of (what was perturbed, draws, ASR, over-refusal, invalid answers, KL), as text, after
        their titles; intervals are of 95 %.
    """
    titles = ("", "draws", "ASR", "over-refusal", "invalid answers", "KL (nats/token)")
    keys = ("attack_success_rate", "over_refusal_rate", "invalid_rate")
    return [titles] + [
        (
            _probed(row),
            str(len(row["draws"])),
            *(_interval_text(row[key]) for key in keys),
            _mean_text(row["kl"]),
        )
        for row in result["rows"]
    ]


def verdict_lines(result: Mapping[str, Any]) -> list[str]:
    """Writes a probe's verdicts, a sentence each.

    Args:
        result: the content of a ``probe.json``.

    Returns:
        One line for each perturbation.
    """
    titles = {"noise": "With noise at the map's weights", "zero": "With the map's weights at zero"}
    return [
        f"{titles[perturbation]}: {found['verdict']}: {found['reason']}."
        for perturbation, found in result["verdicts"].items()
    ]


def plot_probe(result: Mapping[str, Any], path: Path) -> None:
    """Draws a probe: ASR and over-refusal of each row, with their intervals.

    Args:
        result: the content of a ``probe.json``.
        path: the PNG file to be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes, rows = figure.subplots(), result["rows"]
    for offset, key, label, colour in (
        (-0.2, "attack_success_rate", "ASR", "tab:red"),
        (0.2, "over_refusal_rate", "over-refusal", "tab:blue"),
    ):
        places = [place + offset for place in range(len(rows))]
        _draw_bars(axes, places, [row[key] for row in rows], label, colour)
    axes.set_xticks(range(len(rows)), [_probed(row).replace(", ", "\n") for row in rows])
    axes.set_ylim(0, 1)
    axes.set_ylabel("rate, with 95 % interval")
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=120)


def _probed(row: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (row["perturbation"], row["selection"])))


def _mean_text(mean: Mapping[str, Any]) -> str:
    text = f"{mean['mean']:.4f}"
    return text if mean["low"] is None else f"{text} [{mean['low']:.4f}, {mean['high']:.4f}]"
