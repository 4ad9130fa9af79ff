"""Model cards, made from the templates in ``templates/`` and facts that callers give."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

CARD_FILE = "README.md"

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
"""What a repository of the Hub is called: ``USER/NAME``."""


def render_card(template: str, base: str | None, commit: str | None, **facts: Any) -> str:
    """Fill in a template with facts and with what an adapter records of its base, all escaped."""
    # A base without a commit is a directory; where that is on this machine stays out of the card.
    hub_id = base if base and commit and HUB_ID.fullmatch(base) else None
    name = hub_id or Path(base or "a base model").name
    card = _TEMPLATES.get_template(f"{template}.md.jinja")
    return card.render(base=name, hub_id=hub_id, commit=commit, **facts)


def escape(value: object) -> str:
    """Keep text from being read as Markdown, HTML or YAML, or as the end of a table's cell."""
    # Names in an adapter come from strangers, and Jinja's own escaping knows HTML alone. What a
    # template calls safe, or a macro has made of escaped parts, is Markup and passes.
    return value if isinstance(value, Markup) else re.sub(r"[^\w.,+/ -]", "_", str(value))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=escape,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_exactly(text: str) -> Markup:
    """Keep all characters of a text that must be told from others; none of them is markup."""
    # A character given by its number is text to Markdown and HTML, and ends no cell.
    return Markup(re.sub(r"[^\w.,+/ -]|_", lambda match: f"&#{ord(match[0])};", text))


_TEMPLATES.filters["exact"] = write_exactly
_TEMPLATES.filters["commas"] = "{:,}".format
_TEMPLATES.filters["shell"] = lambda name: Markup(quote(escape(name)))
