"""The model card of a merged checkpoint: what was merged onto what, to be checked by digests."""

import re
from collections.abc import Sequence
from pathlib import Path

from safeweights_peft.merging.patches import Overlap, Patch
from safeweights_peft.patch.metadata import AdapterMetadata

CARD_FILE = "README.md"

HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def card(patches: Sequence[Patch], overlap: Sequence[Overlap]) -> str:
    """Write the card of a merged checkpoint.

    Paths of this machine stay out of it: of a directory it tells the name alone.
    """
    metadata = patches[0].adapter.metadata
    lines = ["---", "library_name: transformers", "tags:", "- safeweights"]
    if hub_id := base_hub_id(metadata):
        lines += [f"base_model: {hub_id}", "base_model_relation: finetune"]
    lines += [
        "---",
        "",
        f"# {base_name(metadata)} with safety patches",
        "",
        f"Base: {base_name(metadata)}"
        + (f", commit {metadata.revision}" if metadata.revision else "")
        + ". Only the entries that the patches name differ from it.",
        "",
        "| patch | content | scale | entries |",
        "|---|---|---|---|",
    ]
    for patch in patches:
        told = patch.described
        lines.append(
            f"| {plain(Path(told.adapter).resolve().name)} | `{told.content_id}` | {told.scale:g} "
            f"| {told.entries:,} |"
        )
    if overlap:
        shared = sum(each.entries for each in overlap)
        lines += ["", f"{shared:,} entries are changed by two patches each; these add up."]
    lines += [
        "",
        "Merged from file to file by `safeweights merge`. For one patch at its own scale, "
        "`safeweights verify PATCH --base BASE --merged MODEL` tells whether a model is the base "
        "with this patch and nothing else.",
    ]
    return "\n".join(lines) + "\n"


def base_hub_id(metadata: AdapterMetadata) -> str | None:
    """Find the base's id on the Hub."""
    name = metadata.base_model_name_or_path or ""
    return name if metadata.revision and HUB_ID.fullmatch(name) else None


def base_name(metadata: AdapterMetadata) -> str:
    """Name the base for people."""
    path = metadata.base_model_name_or_path or "a base model"
    return base_hub_id(metadata) or plain(Path(path).name)


def plain(text: str) -> str:
    """Keep what stands in a table's cell from being read as Markdown or HTML."""
    return re.sub(r"[^\w.,+/ -]", "_", text)
