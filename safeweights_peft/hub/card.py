"""The card of a shared patch or map: what it is, how to use it, what was measured, what it isn't.

Here results and descriptions are put into the template ``card.md.jinja``; reading the results, and
what the Hub makes of them, is in ``results``. The card of a merged model is the matter of
``merge``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from safeweights_peft.errors import HubError
from safeweights_peft.fetching import patiently
from safeweights_peft.files import read_json
from safeweights_peft.hub.layout import CARD, IMAGES, MAP, RESULTS
from safeweights_peft.hub.listing import TAG
from safeweights_peft.hub.results import (
    REPRODUCE,
    Asked,
    Evaluation,
    Measured,
    model_index,
    read_results,
    source_title,
    write_eval_results,
)
from safeweights_peft.merging.card import base_name, plain
from safeweights_peft.patch.io import inspect, read_artifact
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.records import Mode
from safeweights_peft.rates import Rate

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PICTURES = {
    "heatmap.png": "Enrichment by layer and component",
    "experts.png": "Enrichment by layer and expert",
}
CONTROLS = ("random", "bottom")
USE_PATCH = """\
import safeweights_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base})
tokenizer = AutoTokenizer.from_pretrained({base})
model = PeftModel.from_pretrained(model, "{repo}")
model = model.merge_and_unload()
model.save_pretrained("merged")
tokenizer.save_pretrained("merged")"""
USE_MAP = """\
import safeweights_peft
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
PeftModel.from_pretrained(model, "{repo}", is_trainable=True)"""
JUDGES = {
    "refusal openings": (
        "refusal openings: phrases with which a refusal begins",
        ", which reads how an answer begins and not what it says",
    )
}
"""What is to be said of a judge in the table, and as its limit."""
LICENCE_KEYS = ("license", "license_name", "license_link")


def write_card(folder: Path, repo_id: str) -> Path:
    """Write a repository's card, and its results as the Hub reads them."""
    metadata = read_artifact(folder).metadata  # with a content id, even of format 1.0
    base = metadata.base_model_name_or_path, metadata.revision
    measured = read_results(folder, metadata.content_id, base)
    licence = find_licence(metadata)
    data = _card_data(metadata, measured, licence, repo_id)
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE), **_told(folder, metadata, measured, licence, repo_id)
    )
    write_eval_results(folder, measured, repo_id)
    card.save(folder / CARD)
    return folder / CARD


def find_licence(metadata: AdapterMetadata) -> dict[str, str]:
    """Look the base's licence up in its card."""
    try:
        found = _metadata_on_hub(str(metadata.base_model_name_or_path), metadata.revision)
    except Exception:  # not to be reached, or its author wrote no YAML there: the new card says so
        found = {}
    if not isinstance(found.get("license"), str):
        return {}
    return {key: found[key] for key in LICENCE_KEYS if isinstance(found.get(key), str)}


def _metadata_on_hub(repo_id: str, revision: str | None) -> dict[str, Any]:
    card = patiently(lambda: HfApi().model_info(repo_id, revision=revision)).card_data
    return card.to_dict() if card else {}


def _card_data(
    metadata: AdapterMetadata, measured: list[Measured], licence: dict[str, str], repo_id: str
) -> ModelCardData:
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=metadata.base_model_name_or_path,
        base_model_relation="adapter",
        tags=[TAG, metadata.mode.artifact.replace(" ", "-"), "safety"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=model_index(measured, repo_id) or None,
    )
    for key, value in licence.items():
        data[key] = value
    return data


def _told(
    folder: Path,
    metadata: AdapterMetadata,
    measured: list[Measured],
    licence: dict[str, str],
    repo_id: str,
) -> dict[str, Any]:
    """Gather what the template says."""
    content, selection = inspect(folder), metadata.selection
    total, method = selection.get("total_parameters"), selection.get("method")
    images = folder / IMAGES
    return {
        "is_patch": metadata.mode is Mode.SET,
        "by_impact": method == "esi",
        "trained": method != "diff",
        "control": method if method in CONTROLS else None,
        "base_name": base_name(metadata),
        "commit": plain(str(metadata.revision)),
        "entries": f"{content['entries']:,}",
        "tensors": content["parameters"],
        "share": _share(content["entries"], total),
        "size": f"{content['size_bytes'] / 1e6:,.2f} MB",
        "content_id": metadata.content_id,
        "licence": _licence_text(licence),
        "snippet": _snippet(metadata, repo_id),
        "measured": [_measured(each) for each in measured],
        "pictures": [
            (title, f"{IMAGES}/{name}")
            for name, title in PICTURES.items()
            if (images / name).is_file()
        ],
        "run_picture": f"{IMAGES}/result.png" if (images / "result.png").is_file() else None,
        "has_map": (folder / MAP).is_dir(),
        **_recorded(folder),
    }


def _share(entries: int, total: object) -> str | None:
    return f"{100 * entries / total:.2f} %" if isinstance(total, int) and total > 0 else None


def _recorded(folder: Path) -> dict[str, Any]:
    """Tell what the run's record says about making the adapter again."""
    path = folder / RESULTS / REPRODUCE
    if not path.is_file():
        return {"recorded": None}
    record = read_json(path, HubError)
    try:
        environment = {str(key): plain(str(each)) for key, each in record["environment"].items()}
        sources = record["data"].values()
        files = {
            plain(each["name"]) for each in sources if each["name"].endswith((".json", ".jsonl"))
        }
        return {
            "recorded": environment,
            "recorded_data": [quote(each) for each in sorted(files)],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{RESULTS}/{REPRODUCE}: expected a run's record, found {type(error).__name__}: "
            f"{error}; take it from the run again"
        ) from error


def _measured(measured: Measured) -> dict[str, Any]:
    """Lay one evaluation out, with the base's beside it."""
    after, before = measured.after, measured.before
    files = [f"`{RESULTS}/{each.file}`" for each in (before, after) if each]
    judge, limit = JUDGES.get(after.judge, (plain(after.judge), ""))
    return {
        "rows": _rows(after, before),
        "harmful": plain(source_title(after.harmful.source)),
        "benign": plain(source_title(after.benign.source)),
        "judge": judge,
        "judge_limit": limit,
        "decoding": plain(after.decoding),
        "date": plain(after.date[:10]),
        "version": plain(after.version),
        "files": " and ".join(files),
        "n": f"{after.harmful.rate.n} + {after.benign.rate.n}",
        "price": _price(after, before),
        "short_asr": _change(after.harmful, before.harmful if before else None),
        "short_price": _change(after.benign, before.benign if before else None),
    }


def _rows(after: Evaluation, before: Evaluation | None) -> list[tuple[str, str, str, str]]:
    """Make the rows of (figure, base, patched, n), as text."""
    harmful, benign = after.harmful.rate.n, after.benign.rate.n
    told: list[tuple[str, Callable[[Evaluation], str], str]] = [
        ("ASR, harmful requests", lambda each: _rate_text(each.harmful.rate), str(harmful)),
        ("over-refusal, harmless requests", lambda each: _rate_text(each.benign.rate), str(benign)),
        (
            "answers that could not be judged",
            lambda each: str(each.harmful.invalid + each.benign.invalid),
            str(harmful + benign),
        ),
        ("KL to the base (nats/token)", lambda each: f"{each.kl:.4f}", f"{after.tokens:,} tokens"),
        (
            "perplexity of the base's answers",
            lambda each: f"{each.perplexity:.2f}",
            f"{after.tokens:,} tokens",
        ),
    ]
    if after.task:
        title = f"loss on {plain(source_title(after.task[0]))} (nats/token)"
        told.append((title, lambda each: f"{each.task_loss:.4f}", ""))
    return [
        (title, text(before) if before else "not measured", f"**{text(after)}**", n)
        for title, text, n in told
    ]


def _rate_text(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _change(after: Asked, before: Asked | None) -> str:
    now = f"{100 * after.rate.rate:.1f} %"
    return f"{100 * before.rate.rate:.1f} → {now}" if before else now


def _price(after: Evaluation, before: Evaluation | None) -> str:
    """Tell what harmless requests pay."""
    rate = after.benign.rate
    was = f", and {before.benign.rate.count} by the base alone" if before else ""
    return f"{rate.count} of {rate.n}{was}"


def _licence_text(licence: dict[str, str]) -> str:
    name = licence.get("license_name") or licence.get("license")
    if name is None:
        return "the base's, which could not be looked up; its terms hold"
    return f"{plain(name)}, the base's"


def _snippet(metadata: AdapterMetadata, repo_id: str) -> str:
    """Write what a newcomer pastes: at most ten lines."""
    pinned = f'"{metadata.base_model_name_or_path}", revision="{metadata.revision}"'
    template = USE_PATCH if metadata.mode is Mode.SET else USE_MAP
    return template.format(base=pinned, repo=repo_id)
