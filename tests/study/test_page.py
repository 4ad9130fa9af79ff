"""A report as a page: complete in itself, without scripts, and nothing in it runs or loads."""

from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safeweights_peft.study.page import render_page
from tests.study.records import record_of

EVIL = "<script>alert(1)</script>\"'&{x}"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would make of a page.

    Attributes:
        tags: every tag that opens, with its attributes.
        cells: the text of every cell of a table.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"td", "th"}:
            self.cells[-1] += data


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    paths = {f"picture {n}": tmp_path / f"{n}.png" for n in range(2)}
    for number, path in enumerate(paths.values()):
        path.write_bytes(bytes([number, 255, 10, 13]))
    return paths


def test_a_page_holds_every_picture_byte_for_byte(pictures: dict[str, Path]) -> None:
    page = Page(render_page(record_of(2), pictures))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == list(pictures)
    for image, path in zip(images, pictures.values(), strict=True):
        kind, _, data = str(image["src"]).partition(",")
        assert (kind, b64decode(data)) == ("data:image/png;base64", path.read_bytes())


def test_a_page_loads_nothing_and_runs_nothing(pictures: dict[str, Path]) -> None:
    html = render_page(record_of(2, experts=2), pictures)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "class", "src", "alt"}
    assert "://" not in html
    assert "url(" not in html


def test_a_page_tells_what_was_selected_and_how(pictures: dict[str, Path]) -> None:
    cells = Page(render_page(record_of(2), pictures)).cells
    facts = dict(zip(cells[::2], cells[1::2], strict=False))
    assert facts["safety map"] == "run/map"
    assert facts["base"] == "someone/tiny"
    assert facts["selection: method"] == "esi"
    assert facts["selection: density"] == "0.01"
    assert "revision" not in facts


def test_a_page_has_every_component_and_every_layer(pictures: dict[str, Path]) -> None:
    cells = Page(render_page(record_of(12), pictures)).cells
    assert {"q", "down", "norms", "embeddings", "outside layers"} <= set(cells)
    assert {str(layer) for layer in range(12)} <= set(cells)


@pytest.mark.parametrize(("experts", "listed"), [(0, 0), (4, 8), (90, 20)])
def test_a_page_lists_the_experts_most_enriched(
    experts: int, listed: int, pictures: dict[str, Path]
) -> None:
    record = record_of(2, experts)
    html = render_page(record, pictures)
    assert html.count("experts most enriched") == bool(listed)
    if listed:
        rows = html.split("experts most enriched")[1].count("<tr>") - 1
        best = max(cell["enrichment"] for cell in record["experts"])
        assert rows == listed
        assert f"<td>{best:.2f}</td></tr>" in html.split("experts most enriched")[1]


@pytest.mark.parametrize(
    "change",
    [
        {"map": EVIL},
        {"base": EVIL},
        {"base_revision": EVIL},
        {"selection": {EVIL: 1}},
        {"selection": {"method": EVIL}},
        {"selection": {"method": [{EVIL: EVIL}]}},
    ],
)
def test_what_comes_from_files_stays_text(
    change: dict[str, Any], pictures: dict[str, Path]
) -> None:
    page = Page(render_page(record_of(2) | change, pictures))
    assert "script" not in {tag for tag, _ in page.tags}
    assert any("<script>alert(1)</script>" in cell for cell in page.cells)


def test_names_of_components_and_titles_of_pictures_stay_text_too(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"")
    record = record_of(2)
    record["components"][0]["component"] = record["cells"][1]["component"] = EVIL
    page = Page(render_page(record, {EVIL: tmp_path / "p.png"}))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.cells.count(EVIL) == 2
    assert EVIL in [attributes.get("alt") for _, attributes in page.tags]
