"""Saved results as rows of text, for terminals and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

Row = tuple[str, ...]
Cells = Sequence[Mapping[str, Any]]
TOP_LAYERS = 5  # layers that a terminal shows
TOP_CATEGORIES = 12  # of requests
CUT_SHORT = "cut before their first sentence ended"


def comparison_rows(result: Mapping[str, Any]) -> list[Row]:
    """Lay out a run's figures before and after."""
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
    """Lay out how a model was judged before and after a change, with its loss on a task."""
    rows: list[Row] = [
        (title, rate_text(before[key]), rate_text(after[key]))
        for title, key in (
            ("ASR, harmful requests", "attack_success_rate"),
            ("over-refusal, benign requests", "over_refusal_rate"),
        )
    ]
    for title, key in (("invalid answers", "invalid"), (CUT_SHORT, "cut_short")):
        rows.append((title, str(before[key]), str(after[key])))
    if before["task_loss"] is not None:
        losses = f"{before['task_loss']:.4f}", f"{after['task_loss']:.4f}"
        rows.append(("loss on the task (nats/token)", *losses))
    return rows


def reproduction_rows(comparison: Mapping[str, Any]) -> list[Row]:
    """Lay out a run beside the same run made again."""
    rows: list[Row] = [("", "recorded", "made again", "")]
    for key, title in (("content_id", "content id"), ("merged_digest", "merged entries")):
        pair = [comparison[key][side] for side in ("recorded", "found")]
        short = (digest.removeprefix("sha256:")[:12] for digest in pair)
        rows.append((title, *short, "same" if pair[0] == pair[1] else "DIFFERS"))
    if entries := comparison["entries"]:
        overlap = f"{entries['shared']:,} in common, IoU {entries['iou']:.4f}"
        rows.append(("entries", f"{entries['recorded']:,}", f"{entries['found']:,}", overlap))
    for key, rates in comparison["rates"].items():
        stage, _, rate = key.partition(".")
        title = f"{'ASR' if rate == 'attack_success_rate' else 'over-refusal'} {stage}"
        verdict = "within the interval" if rates["within"] else "OUTSIDE the interval"
        rows.append((title, rate_text(rates["recorded"]), rate_text(rates["found"]), verdict))
    for key, value in comparison["environment"].items():
        rows.append((key, str(value["recorded"]), str(value["found"]), "another environment"))
    return rows


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Lay out one evaluation's figures."""
    harmful, benign, utility = (evaluation[key] for key in ("harmful", "benign", "utility"))
    rows: list[Row] = [
        ("ASR, harmful requests", rate_text(harmful["attack_success_rate"])),
        ("over-refusal, benign requests", rate_text(benign["over_refusal_rate"])),
        *((f"  {name}", rate_text(rate)) for name, rate in _worst(benign["categories"])),
        ("invalid answers", str(harmful["invalid"] + benign["invalid"])),
        (CUT_SHORT, str(harmful["cut_short"] + benign["cut_short"])),
        ("KL to the base (nats/token)", f"{utility['kl']:.4f}"),
        ("perplexity of the base's answers", f"{utility['perplexity']:.2f}"),
    ]
    if evaluation["task"]:
        rows.append(("loss on the task (nats/token)", f"{evaluation['task']['loss']:.4f}"))
    return rows


def _worst(categories: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Pick the categories with the highest rates."""
    ordered = sorted(categories.items(), key=lambda item: -item[1]["rate"])
    return ordered[:TOP_CATEGORIES]


def judge_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Lay out what each of several judges says, and how far each two agree; none for one judge."""
    parts = {"ASR": evaluation["harmful"], "over-refusal": evaluation["benign"]}
    rates = {"ASR": "attack_success_rate", "over-refusal": "over_refusal_rate"}
    if all(len(part["judges"]) == 1 for part in parts.values()):
        return []
    rows: list[Row] = [("", "judge", "rate", "invalid")]
    for title, part in parts.items():
        for name, figures in part["judges"].items():
            rate = rate_text(figures[rates[title]])
            rows.append((title, name, rate, str(figures["invalid"])))
    for title, part in parts.items():
        for pair in part["agreement"]:
            kappa = "undefined" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
            text = f"kappa {kappa}, same {pair['same']} of {pair['n']}"
            rows.append((title, " and ".join(pair["judges"]), text, ""))
    return rows


def rate_text(rate: Mapping[str, Any]) -> str:
    """Write a rate with its interval and counts."""
    return f"{_interval_text(rate)} ({rate['count']}/{rate['n']})"


def _interval_text(rate: Mapping[str, Any]) -> str:
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def size_text(size_bytes: float) -> str:
    """Write a size in the largest decimal unit that leaves at least 1."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size_bytes /= 1000
        if size_bytes < 999.95:  # from there on it would be written as 1000.0
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1000:.1f} TB"


def overlap_rows(result: Mapping[str, Any]) -> list[Row]:
    """Lay out the overlap of safety maps: the maps by number, then each two of them."""
    maps, pairs = result["maps"], result["pairs"]
    numbers = combinations(range(1, len(maps) + 1), 2)
    return [
        ("map", "kind", "entries", "base", ""),
        *(
            (f"{n}: {m['path']}", m["artifact"], f"{m['entries']:,}", str(m["base"]), "")
            for n, m in enumerate(maps, 1)
        ),
        ("",) * 5,
        ("maps", "shared", "IoU", "by chance", "by chance, tensor by tensor"),
        *(
            (
                f"{first} and {second}",
                f"{pair['shared']:,}",
                f"{pair['iou']:.4f}",
                f"{pair['expected_iou']:.4f}",
                f"{pair['expected_iou_within_tensors']:.4f}",
            )
            for (first, second), pair in zip(numbers, pairs, strict=True)
        ),
    ]


def pattern_rows(record: Mapping[str, Any]) -> list[Row]:
    """Lay out where a map's entries lie: all components, and the most enriched layers."""
    components = share_rows(enriched_first(record["components"]), "component")
    layers = share_rows(enriched_first(record["layers"])[:TOP_LAYERS], "layer")
    return [*components, ("",) * len(components[0]), *layers]


def enriched_first(cells: Cells) -> Cells:
    """Sort cells by enrichment, the highest first; equal ones stay in order."""
    return sorted(cells, key=lambda cell: -cell["enrichment"])


def share_rows(cells: Cells, *keys: str) -> list[Row]:
    """Lay out fractions of the selected weights beside fractions of all weights."""
    return [
        (*keys, "weights", "share", "selected", "share", "enrichment"),
        *(
            (
                *("outside layers" if cell[key] is None else str(cell[key]) for key in keys),
                f"{cell['parameters']:,}",
                f"{cell['parameter_share']:.2%}",
                f"{cell['selected']:,}",
                f"{cell['selected_share']:.2%}",
                f"{cell['enrichment']:.2f}",
            )
            for cell in cells
        ),
    ]


def grid(
    cells: Cells, key: str
) -> tuple[list[int], list[str | int], dict[tuple[int, str | int], float]]:
    """Arrange enrichments by layer and another key: layers, columns, values by both."""
    enrichments = {
        (cell["layer"], cell[key]): cell["enrichment"]
        for cell in cells
        if cell["layer"] is not None and (cell["eligible"] or cell["selected"])
    }
    columns = list(dict.fromkeys(column for _, column in enrichments))
    return sorted({layer for layer, _ in enrichments}), columns, enrichments


def grid_rows(cells: Cells, key: str) -> list[Row]:
    """Lay out enrichments by layer and another key."""
    layers, columns, enrichments = grid(cells, key)
    texts = {place: f"{enrichment:.2f}" for place, enrichment in enrichments.items()}
    return [
        ("layer", *map(str, columns)),
        *((str(layer), *(texts.get((layer, c), "") for c in columns)) for layer in layers),
    ]


def probe_rows(result: Mapping[str, Any]) -> list[Row]:
    """Lay out a probe's figures: one row for the base, one for each perturbed selection."""
    keys = ("attack_success_rate", "over_refusal_rate", "invalid_rate")
    return [
        ("", "draws", "ASR", "over-refusal", "invalid answers", "KL (nats/token)"),
        *(
            (
                name_row(row),
                str(len(row["draws"])),
                *(_interval_text(row[key]) for key in keys),
                _mean_text(row["kl"]),
            )
            for row in result["rows"]
        ),
    ]


def verdict_lines(result: Mapping[str, Any]) -> list[str]:
    """Write a probe's verdicts, a sentence each."""
    titles = {"noise": "With noise at the map's weights", "zero": "With the map's weights at zero"}
    return [
        f"{titles[perturbation]}: {judged['verdict']}: {judged['reason']}."
        for perturbation, judged in result["verdicts"].items()
    ]


def name_row(row: Mapping[str, Any]) -> str:
    """Name a row of a probe."""
    return ", ".join(filter(None, (row["perturbation"], row["selection"])))


def _mean_text(mean: Mapping[str, Any]) -> str:
    text = f"{mean['mean']:.4f}"
    return text if mean["low"] is None else f"{text} [{mean['low']:.4f}, {mean['high']:.4f}]"
