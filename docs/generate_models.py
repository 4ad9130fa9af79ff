"""Write docs/models.md from the results of `make zoo`, kept in docs/models.json.

python docs/generate_models.py RESULTS   take the results in a folder, then write the page
python docs/generate_models.py           write the page from the results that are kept
python docs/generate_models.py --check   exit with 1 if the page isn't that of the kept results
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("models.md")
KEPT = Path(__file__).with_name("models.json")
KINDS = ("Dense", "Mixture of experts", "State space and hybrid", "With images")
HEADER = """\
# Models

Written by `docs/generate_models.py` from the results of `make zoo`, which sends a tiny random
model of every architecture in transformers through all that this package does, and compares bits:
{versions}.

Architectures tried: {total}. All works: {works}. Some of it is refused, in the line shown, and the
rest works: {refused}. Wrong somewhere: {wrong}.
{faults}{unbuilt}{not_run}
The steps: {steps}.
"""
NOTES = {
    "faults": "{} {} wrong somewhere, where **fault** stands below: {}.",
    "unbuilt": "{} {} not tried, as the zoo builds no small model (the last table says why): {}.",
    "not_run": "{} {} not run: {}.",
}

Result = dict[str, Any]


def take(folder: Path) -> None:
    """Keep the results of a run: outcomes, without times, that are not ok."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    if not results:
        sys.exit(f"{folder}: expected results, found none; run `make zoo`")
    sys.path.insert(0, str(PAGE.parents[1]))
    from tests.zoo.architectures import list_architectures

    kept = {
        "not_run": sorted(set(list_architectures()) - {each["name"] for each in results}),
        "versions": results[0]["versions"],
        "steps": max(([each["step"] for each in r["outcomes"]] for r in results), key=len),
        "architectures": [shorten(each) for each in sorted(results, key=lambda each: each["name"])],
    }
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def shorten(result: Result) -> Result:
    """Keep what the page says of an architecture."""
    outcomes = [
        {key: outcome[key] for key in ("step", "status", "message")}
        for outcome in result["outcomes"]
        if outcome["status"] not in ("ok", "not reached")
    ]
    return {"name": result["name"], "kind": result["kind"], "outcomes": outcomes}


def render() -> str:
    """Render the page as Markdown."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    unbuilt = [each for each in kept["architectures"] if not each["kind"]]
    tried = [each for each in kept["architectures"] if each["kind"]]
    return "\n".join([render_header(kept, tried, unbuilt), *render_tables(tried, unbuilt)])


def render_header(kept: Result, tried: list[Result], unbuilt: list[Result]) -> str:
    """Say how many architectures there are of each outcome."""
    faults = [each for each in tried if has_fault(each)]
    not_built = [each["name"] for each in unbuilt]
    return HEADER.format(
        versions=", ".join(f"{name} {number}" for name, number in kept["versions"].items()),
        total=len(tried),
        works=sum(not each["outcomes"] for each in tried),
        refused=sum(bool(each["outcomes"]) and not has_fault(each) for each in tried),
        wrong=len(faults),
        faults=note("faults", [each["name"] for each in faults]),
        unbuilt=note("unbuilt", not_built),
        not_run=note("not_run", kept["not_run"]),
        steps=", ".join(f"`{step}`" for step in kept["steps"]),
    )


def note(kind: str, names: list[str]) -> str:
    """Say of which architectures something holds, if of any."""
    if not names:
        return ""
    count, verb = len(names), "is" if len(names) == 1 else "are"
    return "\n" + NOTES[kind].format(count, verb, ", ".join(f"`{name}`" for name in names)) + "\n"


def render_tables(tried: list[Result], unbuilt: list[Result]) -> Iterator[str]:
    """Render a table for each kind of architecture, and one of those without a model."""
    for kind in KINDS:
        yield f"## {kind}\n\n| architecture | works | what doesn't, and why |\n|---|---|---|"
        yield from (render_row(each) for each in tried if each["kind"] == kind)
        yield ""
    if unbuilt:
        yield "## Not tried\n\n| architecture | why |\n|---|---|"
        yield from (f"| {each['name']} | {render_reasons(each)} |" for each in unbuilt)


def render_row(result: Result) -> str:
    """Render what works of an architecture, and the message of each step that doesn't."""
    works = "in part" if result["outcomes"] else "yes"
    return f"| {result['name']} | {works} | {render_reasons(result)} |"


def render_reasons(result: Result) -> str:
    """Render the message of each step that didn't work, on one line of a table."""
    return "<br>".join(
        f"{'**fault** ' if each['status'] == 'fault' else ''}`{each['step']}`: "
        + html.escape(" ".join(each["message"].split()), quote=False).replace("|", "\\|")
        for each in result["outcomes"]
    )


def has_fault(result: Result) -> bool:
    """Tell whether a step of an architecture is wrong."""
    return any(each["status"] == "fault" for each in result["outcomes"])


def run(arguments: list[str]) -> None:
    """Take results where a folder is given; write the page, or compare it."""
    if arguments and arguments != ["--check"]:
        take(Path(arguments[0]))
    page = render()
    if arguments != ["--check"]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE}: expected the page of {KEPT.name}, found other text; run `make docs`")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(f"usage: {sys.argv[0]} [RESULTS | --check]")
    run(sys.argv[1:])
