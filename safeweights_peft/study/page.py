"""A saved report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from safeweights_peft.tables import enriched_first, grid_rows, share_rows

TOP_EXPERTS = 20
"""Experts that the page lists; there can be thousands."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Where the safety weights are</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ padding: 0.15em 0.7em; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
.facts td {{ text-align: left; overflow-wrap: anywhere }}
img {{ max-width: 100% }}
</style>
</head>
<body>
<h1>Where the safety weights are</h1>
{facts}
<p>Enrichment is a share of the selected weights over the same weights' share of all weights: 1
where they were selected in proportion. A random selection among the eligible weights, which leave
out embeddings, norms, biases and routers, comes to {random:.2f} in each of them, and to 0
elsewhere.</p>
{body}
</body>
</html>
"""


def render_page(record: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """Write a report as a page with its pictures inside."""
    tables = {
        "Components": share_rows(enriched_first(record["components"]), "component"),
        "Layers": share_rows(record["layers"], "layer"),
        "Enrichment by layer and component": grid_rows(record["cells"], "component"),
    }
    if record["experts"]:
        experts = enriched_first(record["experts"])[:TOP_EXPERTS]
        tables[f"The {len(experts)} experts most enriched"] = share_rows(experts, "layer", "expert")
    body = [_figure(title, path) for title, path in pictures.items()]
    body += [f"<h2>{escape(title)}</h2>\n{_table(rows)}" for title, rows in tables.items()]
    return PAGE.format(
        facts=_facts(record), random=record["random_enrichment"], body="\n".join(body)
    )


def _facts(record: Mapping[str, Any]) -> str:
    facts = {
        record["artifact"]: record["map"],
        "base": record["base"],
        "revision": record["base_revision"],
        "weights": f"{record['parameters']:,}, of which {record['eligible']:,} eligible",
        "selected": f"{record['selected']:,} ({record['selected'] / record['parameters']:.3%})",
    }
    facts |= {f"selection: {key}": value for key, value in record["selection"].items()}
    rows = [
        f"<tr><td>{escape(key)}</td><td>{escape(_text(value))}</td></tr>"
        for key, value in facts.items()
        if value is not None
    ]
    return "\n".join(['<table class="facts">', *rows, "</table>"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _figure(title: str, path: Path) -> str:
    data = b64encode(path.read_bytes()).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{escape(title)}"></p>'


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(each)}</{tag}>" for each in row) + "</tr>")
    return "\n".join(["<table>", *lines, "</table>"])
