"""Every card is made of its template; whatever stands in a file of a stranger stays plain text."""

import html
from pathlib import Path
from typing import Any

import pytest
import yaml
from jinja2 import UndefinedError
from markupsafe import Markup

import safeweights_peft.cards
from safeweights_peft.cards import escape, render_card, write_exactly
from safeweights_peft.hub.card import VERSIONS
from safeweights_peft.hub.layout import Base
from safeweights_peft.hub.results import Evaluation, Measured, Requests
from safeweights_peft.rates import Rate

EVIL = "x\n---\nlicense: mit\n# Owned\n| [a](b) <script>`{{ 7 * 7 }}`' \" |"
WORDS = ("license: mit", "# Owned", "[a](b)", "<script>", "49", "{{")


def requests(text: str) -> Requests:
    return Requests(text, text, Rate(1, 2, 0.5, 0.1, 0.9), 0)


def measured(text: str) -> list[Measured]:
    evaluation = Evaluation(
        *(text, Base(text, text), requests(text), requests(text), text, text),
        *(1.0, 1.0, 1.0, 1000),
        *(text, text, text, text),
    )
    return [Measured(evaluation, evaluation), Measured(None, evaluation)]


def facts(text: str) -> dict[str, dict[str, Any]]:
    """What each card is told, with this text wherever there is text."""
    counts = {"entries": 12_345, "tensors": 3}
    chat = [("system prompt", text)]
    merged = {"name": text, "content_id": "sha256:0", "scale": 0.5, "entries": 1}
    return {
        "patch": counts | {"chat": chat},
        "lora": counts | {"artifact": text, "is_corrected": True, "held": 12},
        "preserved": counts | {"artifact": text, "held": 12},
        "merged": {"patches": [merged, merged], "shared": 1000},
        "shared": counts
        | {
            "card_data": "library_name: peft",
            **dict.fromkeys(("repo_id", "method", "licence"), text),
            "is_patch": True,
            "total": 100_000,
            "size_bytes": 1_234_567,
            "content_id": "sha256:0",
            "measured": measured(text),
            "pictures": ["heatmap.png", "experts.png", "result.png"],
            "has_map": True,
            "chat": chat,
            "scale": 0.5,
            "picked": {"scale": 0.75, "max_asr": 0.1},
            "versions": dict.fromkeys(VERSIONS, text),
            "data_files": [text],
        },
    }


CARDS = sorted(facts(""))


def test_every_template_is_tried_here() -> None:
    folder = Path(safeweights_peft.cards.__file__).with_name("templates")
    assert sorted(path.name for path in folder.glob("*.md.jinja")) == [
        f"{name}.md.jinja" for name in CARDS
    ]


@pytest.mark.parametrize("name", CARDS)
def test_text_of_strangers_is_text_and_nothing_else(name: str) -> None:
    card = render_card(name, EVIL, EVIL, **facts(EVIL)[name])
    assert [word for word in WORDS if word in card] == []
    assert card.splitlines().count("---") == 2
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] in ("peft", "transformers")
    assert "license" not in metadata


@pytest.mark.parametrize("name", CARDS)
def test_a_base_on_the_hub_is_named_by_its_id_and_commit(name: str) -> None:
    card = render_card(name, "ann/model", "0123abc", **facts("word")[name])
    assert "ann/model" in card
    assert "12,345" in card or name == "merged"


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("base", ["/home/ann/secret/model", "secret/model"])
def test_of_a_base_in_a_directory_the_last_part_is_named_alone(name: str, base: str) -> None:
    card = render_card(name, base, None, **facts("word")[name])
    assert "model" in card
    assert "secret" not in card
    assert "base_model:" not in card


def test_a_base_without_a_name_has_a_card_too() -> None:
    assert "# Safety patch for a base model\n" in render_card(
        "patch", None, None, **facts("")["patch"]
    )


def test_a_fact_that_is_not_told_is_noticed() -> None:
    with pytest.raises(UndefinedError, match="'tensors' is undefined"):
        render_card("patch", "ann/model", None, entries=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b/c-d_e.f, 1+1", "a b/c-d_e.f, 1+1"),
        ("<b>`x`|\n[y](z)", "_b__x____y__z_"),
        ("https://a.b:~!$#*&", "https_//a.b_______"),
        (Markup("`|`"), "`|`"),
        (None, "None"),
    ],
)
def test_only_what_cannot_be_markup_is_kept(text: object, expected: str) -> None:
    assert escape(text) == expected


@pytest.mark.parametrize("text", ["</think>\n\n", "**a** | _b_ `c` [d](e) <f> &lt; é", "plain"])
def test_a_text_that_must_be_exact_has_all_characters_and_no_markup(text: str) -> None:
    written = write_exactly(text)
    assert html.unescape(written) == text
    assert not set("_*`|<>[]()\n") & {*written}
