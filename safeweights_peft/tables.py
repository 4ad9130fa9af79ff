"""Saved results as rows of text, for terminals and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, zip_longest
from typing import Any

from safeweights_peft.judge_names import short_judge

Row = tuple[str, ...]
Cells = Sequence[Mapping[str, Any]]
SHOWN_CHARACTERS = 40  # of a request
CHAT_CHARACTERS = 80  # of a system prompt and its like
TOP_LAYERS = 5  # layers that a terminal shows
TOP_CATEGORIES = 12  # of requests
CUT_SHORT = "cut before a sentence ended"
CUT_IN_THOUGHT = "cut in their thought"
CUT_REQUESTS = "requests without their middle"
GAP = "  "  # between two columns
LEAST_WIDTH = 8  # of a column, however narrow the terminal


def lay_out(rows: Sequence[Row], width: int | None = None) -> list[str]:
    """Write rows as aligned lines; cells are folded, never cut, where a line would be wider."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        _narrow(widths, width - len(GAP) * (len(widths) - 1))
    lines = []
    for row in rows:
        folded = [_fold(cell, most) for cell, most in zip(row, widths, strict=True)]
        for parts in zip_longest(*folded, fillvalue=""):
            cells = (part.ljust(most) for part, most in zip(parts, widths, strict=True))
            lines.append(GAP.join(cells).rstrip())
    return lines


def _narrow(widths: list[int], total: int) -> None:
    """Take from the widest column, the last of equal ones, until the columns fit."""
    while sum(widths) > total and max(widths) > LEAST_WIDTH:
        widest = max(range(len(widths)), key=lambda place: (widths[place], place))
        widths[widest] -= 1


def _fold(cell: str, width: int) -> list[str]:
    """Fold a cell, behind a space, slash or hyphen if there is one in a line's second half."""
    lines = []
    while len(cell) > width:
        end = max(cell.rfind(" ", 0, width + 1), *(cell.rfind(c, 0, width) for c in "/-")) + 1
        end = end if end > width // 2 else width
        lines.append(cell[:end].rstrip())
        cell = cell[end:]
    return [*lines, cell]


def comparison_rows(result: Mapping[str, Any]) -> list[Row]:
    """Lay out a run's figures: before, after, and at the scale that was picked, if one was."""
    patch, picked = result["patch"], picked_row(result)
    stages = [result["before"], result["after"], *([picked] if picked else [])]
    changed = f"{patch['entries']:,} ({patch['share_of_weights']:.2%})"
    changes = ["0", changed, *([changed] if picked else [])]
    title = f"at scale {picked['scale']:g}" if picked else ""
    return [
        ("", "before", "after", *([title] if picked else [])),
        *judged_rows(*stages),
        ("KL to the base, nats/token", *(f"{stage['kl']:.4f}" for stage in stages)),
        ("perplexity, base's answers", *(f"{stage['perplexity']:.2f}" for stage in stages)),
        ("weights changed", *changes),
        ("patch size", "", *[size_text(patch["size_bytes"])] * (len(stages) - 1)),
    ]


def picked_row(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find the figures at the scale that a run or a sweep picked; None if none, or the base."""
    swept = result.get("sweep", result)
    if not swept or "rows" not in swept or swept["scale"] == 0:
        return None
    return next((row for row in swept["rows"] if row["scale"] == swept["scale"]), None)


def judged_rows(*stages: Mapping[str, Any]) -> list[Row]:
    """Lay out how a model was judged before and after a change, with its loss on a task."""
    rows: list[Row] = [
        (
            f"{title}, {stages[0][key]['n']} {kind}",
            *(_interval_text(stage[key]) for stage in stages),
        )
        for title, kind, key in (
            ("ASR", "harmful", "attack_success_rate"),
            ("over-refusal", "harmless", "over_refusal_rate"),
        )
    ]
    for title, key in (("invalid answers", "invalid"), (CUT_SHORT, "cut_short")):
        rows.append((title, *(str(stage[key]) for stage in stages)))
    cut = [stage.get("cut_in_thought", 0) for stage in stages]  # not in older results
    rows += [(CUT_IN_THOUGHT, *map(str, cut))] if any(cut) else []
    if stages[0]["task_loss"] is not None:
        losses = (f"{stage['task_loss']:.4f}" for stage in stages)
        rows.append(("loss on the task, nats/token", *losses))
    return rows


def sweep_rows(rows: Sequence[Mapping[str, Any]], cut_requests: int = 0) -> list[Row]:
    """Lay out what a patch does at each scale."""
    asr, refused = (rows[0][key]["n"] for key in ("attack_success_rate", "over_refusal_rate"))
    kl = "KL (nats/token)"
    table = [
        ("scale", f"ASR, {asr} harmful", f"over-refusal, {refused} harmless", kl, "invalid"),
        *(
            (
                f"{row['scale']:g}",
                _interval_text(row["attack_success_rate"]),
                _interval_text(row["over_refusal_rate"]),
                f"{row['kl']:.4f}",
                str(row["invalid"]),
            )
            for row in rows
        ),
    ]
    return _with_cut(table, [row.get("cut_in_thought", 0) for row in rows], cut_requests)


def _with_cut(table: Sequence[Row], in_thought: Sequence[int], cut_requests: int) -> list[Row]:
    """Add columns of what was cut, where anything was."""
    columns: list[Row] = [(CUT_IN_THOUGHT, *map(str, in_thought))] if any(in_thought) else []
    columns += [(CUT_REQUESTS, *[str(cut_requests)] * len(in_thought))] if cut_requests else []
    return [(*row, *(column[place] for column in columns)) for place, row in enumerate(table)]


_LABELS = {
    "out_dir": "path",
    "directory": "path",
    "entries": "weights",
    "changed_entries": "weights that changed",
    "lost_entries": "changes that are lost",
    "lost_share": "of all change lost",
    "stored_entries": "weights with padding",
    "differing_entries": "other bits once merged",
    "changed_values": "values stored as other numbers, merged to the same bits",
    "size_bytes": "size",
    "write_bytes": "to write",
    "memory_bytes": "memory",
    "free_bytes": "free",
    "fits": "fits on the disk",
    "before_bytes": "size before",
    "after_bytes": "size after",
    "before_bytes_per_entry": "bytes a weight, before",
    "after_bytes_per_entry": "bytes a weight, after",
    "seconds": "time",
}


def field_rows(result: Mapping[str, Any]) -> list[Row]:
    """Lay out a flat result in words."""
    return [
        (_LABELS.get(name, name.replace("_", " ")), _value_text(name, value))
        for name, value in result.items()
    ]


def _value_text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name.endswith("_bytes"):
        return size_text(value)
    if name.endswith("_share"):
        if 0 < value < 0.0001:  # never a rounded 0: something is lost
            return "less than 0.01%"
        return f"{value:.3g}" if value > 1 else f"{value:.2%}"
    if name == "seconds":
        return f"{value:.1f} s"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    return short_digest(str(value))


def shorten(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    """Shorten a request or an answer to part of one line."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def chat_rows(chat: Mapping[str, str]) -> list[Row]:
    """Lay out what of the chat is set."""
    return [(key.replace("_", " "), quote_text(text)) for key, text in chat.items()]


def quote_text(text: str | None) -> str:
    """Write a setting of the chat on one line: exactly, or the beginning of a long one."""
    if text is None:
        return "not set"
    return repr(text if len(text) <= CHAT_CHARACTERS else shorten(text, CHAT_CHARACTERS))


def short_digest(text: str) -> str:
    """Shorten a digest to what tells it from others; JSON has all of it."""
    return text.removeprefix("sha256:")[:12] if text.startswith("sha256:") else text


def reproduction_rows(comparison: Mapping[str, Any]) -> list[Row]:
    """Lay out a run beside the same run made again."""
    rows: list[Row] = [("", "recorded", "made again", "")]
    for key, title in (("content_id", "content id"), ("merged_digest", "merged entries")):
        pair = [comparison[key][side] for side in ("recorded", "found")]
        rows.append((title, *map(short_digest, pair), "same" if pair[0] == pair[1] else "DIFFERS"))
    if entries := comparison["entries"]:
        overlap = f"{entries['shared']:,} in common, IoU {entries['iou']:.4f}"
        rows.append(("entries", f"{entries['recorded']:,}", f"{entries['found']:,}", overlap))
    for key, rates in comparison["rates"].items():
        stage, _, rate = key.rpartition(".")
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
    cut = sum(part.get("cut_in_thought", 0) for part in (harmful, benign))
    rows += [(CUT_IN_THOUGHT, str(cut))] if cut else []
    if requests := evaluation.get("cut_requests"):
        rows.append((CUT_REQUESTS, str(requests)))
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
    names = {name: short_judge(name) for part in parts.values() for name in part["judges"]}
    if len({*names.values()}) < len(names):  # one classifier, read in two ways
        names = {name: name for name in names}
    rows: list[Row] = [("", "judge", "rate", "invalid")]
    for title, part in parts.items():
        for name, figures in part["judges"].items():
            rate = rate_text(figures[rates[title]])
            rows.append((title, names[name], rate, str(figures["invalid"])))
    for title, part in parts.items():
        for pair in part["agreement"]:
            # One verdict for all has no kappa; and garbage is judged by neither.
            kappa = "" if pair["kappa"] is None else f"kappa {pair['kappa']:.2f}, "
            same = f"{kappa}same {pair['same']} of {pair['n']}"
            text = same if pair["n"] else "no answer that both could judge"
            rows.append((title, " and ".join(names[name] for name in pair["judges"]), text, ""))
    return rows


def rate_text(rate: Mapping[str, Any]) -> str:
    """Write a rate with its interval and counts."""
    return f"{_interval_text(rate)} ({rate['count']}/{rate['n']})"


def _interval_text(rate: Mapping[str, Any]) -> str:
    # Whole percents: a decimal would promise more than such intervals hold.
    return f"{100 * rate['rate']:.0f} % [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def size_text(size_bytes: float) -> str:
    """Write a size in the largest decimal unit that leaves at least 1."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size_bytes /= 1000
        if size_bytes < 999.95:  # from there on it would be written as 1000.0
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1000:.1f} TB"


def overlap_rows(result: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Lay out the overlap of safety maps: the maps by number, then each two of them."""
    maps, pairs = result["maps"], result["pairs"]
    numbers = combinations(range(1, len(maps) + 1), 2)
    return [
        ("map", "kind", "selected by", "weights", "base"),
        *(
            (
                f"{n}: {m['path']}",
                m["artifact"],
                f"{m['method'] or '?'}, {m['granularity']}",
                f"{m['entries']:,}",
                str(m["base"]),
            )
            for n, m in enumerate(maps, 1)
        ),
    ], [
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


def pattern_rows(record: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Lay out where a map's entries lie: all components, and the most enriched layers."""
    layers = enriched_first([row for row in record["layers"] if row["layer"] is not None])
    (_, *titles), *rows = share_rows(layers[:TOP_LAYERS], "layer")
    shown = f"layer ({len(rows)} of {len(layers)})" if len(rows) < len(layers) else "layer"
    components = share_rows(enriched_first(record["components"]), "component")
    return components, [(shown, *titles), *rows]


def enriched_first(cells: Cells) -> Cells:
    """Sort cells by enrichment, the highest first; equal ones stay in order."""
    return sorted(cells, key=lambda cell: -cell["enrichment"])


def share_rows(cells: Cells, *keys: str) -> list[Row]:
    """Lay out fractions of the selected weights beside fractions of all weights."""
    lines = [kind for kind in ("rows", "columns") if any(cell.get(kind) for cell in cells)]
    return [
        (*keys, "weights", "share", "selected", "share", "enrichment", *lines),
        *(
            (
                *("outside layers" if cell[key] is None else str(cell[key]) for key in keys),
                f"{cell['parameters']:,}",
                f"{cell['parameter_share']:.2%}",
                f"{cell['selected']:,}",
                f"{cell['selected_share']:.2%}",
                f"{cell['enrichment']:.2f}",
                *(f"{cell[kind]:,}" for kind in lines),
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
    table = [
        ("", "draws", "ASR", "over-refusal", "invalid", "KL (nats/token)"),
        *(
            (
                name_row(row),
                str(len(row["draws"])),
                *(_interval_text(row[key]) for key in ("attack_success_rate", "over_refusal_rate")),
                f"{row['invalid_rate']['rate']:.0%}",
                _mean_text(row["kl"]),
            )
            for row in result["rows"]
        ),
    ]
    in_thought = [
        sum(draw.get("cut_in_thought", 0) for draw in row["draws"]) for row in result["rows"]
    ]
    return _with_cut(table, in_thought, result.get("cut_requests", 0))


def name_row(row: Mapping[str, Any]) -> str:
    """Name a row of a probe."""
    return ", ".join(filter(None, (row["perturbation"], row["selection"])))


def _mean_text(mean: Mapping[str, Any]) -> str:
    text = f"{mean['mean']:.4f}"
    return text if mean["low"] is None else f"{text} ± {mean['high'] - mean['mean']:.4f}"


def linear_rows(result: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """Lay out a linear reading: what it is, and what it refuses at each ASR."""
    learned, auc, at = result["training"], result["auc"], result["at"]
    held_out = {key: at[0][key]["n"] for key in ("attack_success_rate", "over_refusal_rate")}
    rows: list[Row] = [
        ("at an ASR of at most", *(f"{100 * row['asr']:g} %" for row in at)),
        (
            f"ASR, {held_out['attack_success_rate']} harmful",
            *(_interval_text(row["attack_success_rate"]) for row in at),
        ),
        (
            f"over-refusal, {held_out['over_refusal_rate']} harmless",
            *(_interval_text(row["over_refusal_rate"]) for row in at),
        ),
    ]
    for name, _ in _worst(at[0]["categories"]):
        rows.append((f"  {name}", *(_interval_text(row["categories"][name]) for row in at)))
    return [
        ("layer", f"{result['layer']} of {result['layers']}"),
        ("learned from", f"{learned['harmful']:,} harmful and {learned['benign']:,} harmless"),
        ("AUC", f"{auc['auc']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]"),
    ], rows


def linear_line(result: Mapping[str, Any]) -> str:
    """Write what a linear reading means for patches of the base."""
    at = result["at"][0]
    return (
        f"Expect a patch of this base that reaches an ASR of {100 * at['asr']:g} % on such "
        f"requests to refuse about {100 * at['over_refusal_rate']['rate']:.0f} % of the harmless "
        "ones: other training rows or a larger base change that, other weights hardly do."
    )
