"""A shared patch as its repository is laid out, with results made by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

from safeweights_peft.patch.io import read_metadata
from tests.study.records import rate
from tests.tiny_files import edit_config

BASE = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "ann/tiny-patch"
NAMED = {
    "base_model_name_or_path": BASE,
    "revision": COMMIT,
    "selection": {"method": "esi", "total_parameters": 32_096},
}


def evaluation(content_id: str | None, **changes: Any) -> dict[str, Any]:
    """What `safeweights eval` writes: of a patch, or of the base if there is no content id."""
    of_patch = content_id is not None
    harmful, benign = (3, 12) if of_patch else (98, 0)
    result = {
        "kind": "evaluation",
        "base": {"name": BASE, "revision": COMMIT},
        "adapter": "patch" if of_patch else None,
        "content_id": content_id,
        "harmful": {
            "n": 101,
            "data_digest": "sha256:" + "a" * 64,
            "invalid": 2,
            "attack_success_rate": rate(harmful, 101, 0.0123, 0.9987),
        },
        "benign": {
            "n": 103,
            "data_digest": "sha256:" + "b" * 64,
            "invalid": 3,
            "over_refusal_rate": rate(benign, 103, 0.0456, 0.1944),
        },
        "utility": {
            "kl": 0.02634 if of_patch else 0.0,
            "perplexity": 2.2571 if of_patch else 2.1525,
            "tokens": 3454,
        },
        "task": None,
        "judge": "refusals",
        "decoding": "greedy, at most 32 tokens",
        "settings": {
            "harmful": "builtin:harmful_eval",
            "benign": "builtin:benign_eval",
            "task": None,
        },
        "date": "2026-11-25T22:04:08+00:00",
        "safeweights_peft_version": "0.1.0",
    }
    return result | changes


def record(content_id: str, **changes: Any) -> dict[str, Any]:
    """What a card reads of a run's record."""
    result = {
        "kind": "reproduction",
        "content_id": content_id,
        "base": {"name": "tiny", "revision": None},
        "data": {
            "score.harmful": {"name": "builtin:harmful_train"},
            "train.benign": {"name": "kind words.json"},
        },
        "environment": {
            "python": "3.11.7",
            "safeweights-peft": "0.1.0",
            "torch": "2.13.0+cpu",
            "transformers": "5.23.0",
            "peft": "0.21.2",
        },
    }
    return result | changes


def put_result(folder: Path, name: str, result: dict[str, Any]) -> None:
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / name).write_text(json.dumps(result), encoding="utf-8")


def lay_out(adapter: Path, folder: Path) -> Path:
    """Copy a patch or a map to the root of a repository, as one of a base on the Hub."""
    shutil.copytree(adapter, folder)
    edit_config(folder, lambda config: config.update(NAMED))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def put_results(folder: Path) -> str:
    """Put evaluations of the base and of the patch beside it, and the record; its content id."""
    content_id = read_metadata(folder).content_id
    put_result(folder, "before.json", evaluation(None))
    put_result(folder, "after.json", evaluation(content_id))
    put_result(folder, "reproduce.json", record(content_id))
    return content_id
