"""Safety patches and safety maps as directories; ``docs/format.md`` is the normative text."""
