"""The card of a shared patch: every figure from a result, every line true, the snippet runs."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from safeweights_peft.errors import HubError
from safeweights_peft.hub.card import write_card
from safeweights_peft.hub.pull import find_on_hub
from safeweights_peft.hub.push import push_to_hub
from safeweights_peft.merging.merge import merge
from safeweights_peft.patch.io import inspect, read_adapter, read_metadata, write_map
from tests.hub.repositories import (
    BASE,
    COMMIT,
    REPO,
    evaluation,
    lay_out,
    put_result,
    put_results,
    record,
)
from tests.hub_server import HubServer
from tests.tiny_files import as_map, edit_config
from tests.tuner.patches import save_patch

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)*")
WORDING = {"2604.08297", "95", "256"}
"""Numbers of the template's own: the paper, the level of intervals, sha256."""
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def patch(tiny_llama_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_patch(tiny_llama_bf16, tmp_path_factory.mktemp("card") / "patch")


@pytest.fixture
def folder(patch: Path, tmp_path: Path) -> Path:
    """A repository with a patch and all that belongs to it."""
    folder = lay_out(patch, tmp_path / "repository")
    put_results(folder)
    return folder


@pytest.fixture
def bare(patch: Path, tmp_path: Path) -> Path:
    """A repository with a patch alone."""
    return lay_out(patch, tmp_path / "repository")


def card_of(folder: Path) -> str:
    return write_card(folder, REPO).read_text(encoding="utf-8")


def body_of(folder: Path) -> str:
    """The card without its metadata, on one line."""
    return " ".join(ModelCard(card_of(folder)).text.split())


def numbers_in(value: object) -> Iterator[float]:
    """Find every number in JSON, those in texts included."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield float(value)


def spellings(folder: Path) -> set[str]:
    """Every way in which the card may write a number of the files: rounded, or in percent."""
    files = [*(folder / "results").glob("*.json"), folder / "adapter_config.json"]
    contents = [json.loads(path.read_text()) for path in files]
    described = inspect(folder)
    numbers = {*numbers_in(contents), *numbers_in(described), described["size_bytes"] / 1e6}
    numbers |= {described["entries"] / 32_096}
    texts = set(NUMBER.findall(" ".join(map(json.dumps, contents))))
    written = {
        f"{x:,.{n}f}" for number in numbers for x in (number, 100 * number) for n in range(5)
    }
    return texts | written | set(NUMBER.findall(f"{REPO} {read_metadata(folder).content_id}"))


def test_every_number_is_in_the_files_beside_it(folder: Path) -> None:
    written = {*NUMBER.findall(ModelCard(card_of(folder)).text)} - WORDING
    sums = {str(2 + 3), str(101 + 103)}  # the invalid answers to both kinds, all requests
    assert written - sums - spellings(folder) == set()


def test_every_number_of_the_metadata_is_in_the_files_beside_it(folder: Path) -> None:
    write_card(folder, REPO)
    (index,) = metadata_load(folder / "README.md")["model-index"]
    files = [json.loads(path.read_text()) for path in (folder / "results").glob("*.json")]
    assert {*numbers_in(index["results"])} <= {*numbers_in(files)}


def test_another_figure_in_the_result_is_another_one_in_the_card(folder: Path) -> None:
    content_id = read_metadata(folder).content_id
    assert "2.26" in body_of(folder)
    utility = {"kl": 0.02634, "perplexity": 7.7777, "tokens": 3454}
    put_result(folder, "after.json", evaluation(content_id, utility=utility))
    body = body_of(folder)
    assert "7.78" in body
    assert "2.26" not in body


def test_the_table_sets_base_and_patch_side_by_side(folder: Path) -> None:
    body = card_of(folder)
    assert "| ASR, harmful requests | 97.0 % [1.2, 99.9] | **3.0 % [1.2, 99.9]** | 101 |" in body
    assert "| over-refusal, harmless requests | 0.0 % [4.6, 19.4] | **11.7 % [" in body
    assert "| KL to the base (nats/token) | 0.0000 | **0.0263** | 3,454 tokens |" in body
    assert "| perplexity of the base's answers | 2.15 | **2.26** | 3,454 tokens |" in body


def test_it_says_how_was_measured(folder: Path) -> None:
    card = card_of(folder)
    assert "| harmful requests | harmful_eval, built into safeweights-peft |" in card
    assert "| judge | refusals: phrases with which a refusal begins |" in card
    assert "| decoding | greedy, at most 32 tokens |" in card
    assert f"| base commit | {COMMIT} |" in card
    assert "| date | 2026-11-25, safeweights-peft 0.1.0 |" in card
    assert "| results | `results/before.json` and `results/after.json` |" in card


def test_it_begins_with_what_it_does_and_the_price(folder: Path) -> None:
    body = body_of(folder)
    # The interval, up to 99.9 %, doesn't tell the rates apart.
    assert "**In short: no better.** ASR 97.0 → 3.0 %, over-refusal 0.0 → 11.7 %, on 101" in body
    assert "**Don't rely on this patch.** ASR 97% -> 3%: the intervals overlap; try" in body


def test_a_patch_measured_without_its_base_says_so(folder: Path) -> None:
    (folder / "results" / "before.json").unlink()
    assert "| ASR, harmful requests | not measured | **3.0 % [1.2, 99.9]** | 101 |" in card_of(
        folder
    )


def test_a_loss_on_a_task_is_told_too(folder: Path) -> None:
    content_id, counts = read_metadata(folder).content_id, {"data_digest": "sha256:c", "tokens": 9}
    settings = evaluation(None)["settings"] | {"task": "/home/ann/lessons.json"}
    for name, owner, loss in (("before", None, 1.5), ("after", content_id, 1.25)):
        task = counts | {"loss": loss}
        result = evaluation(owner, task=task, settings=settings)
        put_result(folder, f"{name}.json", result)
    assert "| loss on lessons.json (nats/token) | 1.5000 | **1.2500** |" in card_of(folder)


def test_a_patch_without_results_claims_nothing(bare: Path) -> None:
    card = card_of(bare)
    assert "**Not measured.**" in card
    assert "model-index" not in card
    assert "ASR" not in card


def test_it_names_the_price_and_the_limits(folder: Path) -> None:
    body = body_of(folder)
    assert "Harmless requests refused: 12 of 103, and 0 by the base alone." in body
    assert "**101 + 103 requests, one judge.**" in body
    assert "reads how an answer begins and not what it says" in body
    assert "not a filter and not a guarantee" in body


def test_a_judge_that_it_does_not_know_is_named_alone(folder: Path) -> None:
    content_id = read_metadata(folder).content_id
    for name, owner in (("before.json", None), ("after.json", content_id)):
        put_result(folder, name, evaluation(owner, judge="some guard"))
    body = body_of(folder)
    assert "| judge | some guard |" in body
    assert "how an answer begins" not in body


def test_it_says_exactly_what_it_is(folder: Path) -> None:
    card, content = card_of(folder), inspect(folder)
    assert f"| content id | `{read_metadata(folder).content_id}` |" in card
    assert f"| base | {BASE} |" in card
    assert f"| weights | {content['entries']:,} in {content['parameters']} tensors |" in card


def test_it_names_the_scale_of_its_values_unless_that_is_1(
    tiny_llama_bf16: Path, folder: Path, tmp_path: Path
) -> None:
    assert "| scale |" not in card_of(folder)
    patch = save_patch(tiny_llama_bf16, tmp_path / "half", scale=0.5)
    body = body_of(lay_out(patch, tmp_path / "scaled"))
    assert "| scale | 0.5 of its values, wherever it is loaded, measured or merged |" in body


def test_it_says_how_it_was_asked_where_that_was_set(folder: Path) -> None:
    assert "prompt" not in body_of(folder)
    chat = {"system_prompt": "Be kind.", "answer_prefix": "</think>", "others": 1}
    edit_config(folder, lambda config: config["selection"].update(chat=chat))
    body = html.unescape(body_of(folder))
    assert "| system prompt | 'Be kind.' | | answer prefix | '</think>' |" in body
    assert "others" not in body


@pytest.mark.parametrize("sweep", [None, {"scale": 0.75, "max_asr": 0.1}])
def test_it_says_at_which_scale_its_run_found_it_safe_enough(
    sweep: dict | None, folder: Path
) -> None:
    content_id = read_metadata(folder).content_id
    result = {"kind": "enhancement", "content_id": content_id, "sweep": sweep}
    put_result(folder, "result.json", result)
    body = body_of(folder)
    assert ("figures are at scale 1" in body) == bool(sweep)
    if sweep:
        assert "names scale 0.75 as the smallest with an ASR of at most 10 %" in body
        assert f"safeweights merge {BASE} {REPO}@0.75 --out merged" in body


@pytest.mark.parametrize("scale", [None, 0.0, 1.0])
def test_a_run_that_picked_no_other_scale_says_nothing_of_one(
    scale: float | None, folder: Path
) -> None:
    sweep = {"scale": scale, "max_asr": 0.1}
    content_id = read_metadata(folder).content_id
    result = {"kind": "enhancement", "content_id": content_id, "sweep": sweep}
    put_result(folder, "result.json", result)
    assert "figures are at scale 1" not in body_of(folder)


@pytest.mark.parametrize("method", ["random", "bottom"])
def test_a_control_says_that_it_is_one(method: str, folder: Path) -> None:
    edit_config(folder, lambda config: config["selection"].update(method=method))
    assert f"**A control, made for comparison:** its weights were selected by `{method}`" in (
        body_of(folder)
    )


def test_pictures_are_shown_where_there_are_some(folder: Path) -> None:
    assert "![" not in card_of(folder)
    (folder / "images").mkdir()
    for name in ("heatmap.png", "result.png"):
        (folder / "images" / name).write_bytes(b"\x89PNG")
    card = card_of(folder)
    assert "![Enrichment by layer and component](images/heatmap.png)" in card
    assert "the losses over the steps](images/result.png)" in card


def test_it_says_how_to_make_it_again(folder: Path) -> None:
    body = body_of(folder)
    assert (
        "safeweights reproduce results/reproduce.json --data 'kind words.json' --out again" in body
    )
    assert "torch 2.13.0+cpu, transformers 5.23.0, peft 0.21.2, Python 3.11.7" in body


def test_without_a_record_it_says_that_there_is_none(bare: Path) -> None:
    assert "How it was made is not recorded here" in body_of(bare)


def test_a_broken_record_is_refused(folder: Path) -> None:
    content_id = read_metadata(folder).content_id
    put_result(folder, "reproduce.json", record(content_id, data=[]))
    with pytest.raises(HubError, match=r"^results/reproduce\.json: expected a run's record, found"):
        write_card(folder, REPO)


def test_the_metadata_says_what_it_belongs_to(folder: Path) -> None:
    write_card(folder, REPO)
    data = metadata_load(folder / "README.md")
    assert data["library_name"] == "peft"
    assert data["base_model"] == BASE
    assert data["base_model_relation"] == "adapter"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["safeweights", "safety-patch", "safety"]


def test_the_metadata_survives_huggingface_hubs_own_reading(folder: Path) -> None:
    card = ModelCard.load(write_card(folder, REPO))
    assert card.data.to_dict() == metadata_load(folder / "README.md")
    assert ModelCardData(**card.data.to_dict()).eval_results == card.data.eval_results
    assert [result.metric_type for result in card.data.eval_results] == [
        "attack_success_rate",
        "over_refusal_rate",
        "kl_divergence",
        "perplexity",
    ]


def test_the_metadata_passes_huggingface_hubs_validation(hub: HubServer, folder: Path) -> None:
    ModelCard.load(write_card(folder, REPO)).validate()
    assert "POST /api/validate-yaml" in hub.log


@pytest.mark.parametrize("source", ["a|b.json", "<script>.json", "[x](y).json", "`.json"])
def test_names_from_files_are_not_markup(source: str, folder: Path) -> None:
    content_id = read_metadata(folder).content_id
    settings = evaluation(None)["settings"] | {"harmful": source}
    for name, owner in (("before.json", None), ("after.json", content_id)):
        put_result(folder, name, evaluation(owner, settings=settings))
    body = ModelCard(card_of(folder)).text
    assert source not in body
    assert "| harmful requests | _" in body or "| harmful requests | a_b.json |" in body


@pytest.fixture
def licensed(hub: HubServer, bare: Path) -> Callable[[str], Path]:
    """Let the base's card begin with a text, and give a patch of that commit."""

    def with_card(text: str) -> Path:
        hub.add_repo(BASE, {"README.md": text.encode(), "config.json": b"{}"})
        commit = hub.repos[BASE].refs["main"]
        edit_config(bare, lambda config: config.update(revision=commit))
        return bare

    return with_card


def test_the_licence_is_that_of_the_bases_card(licensed: Callable[[str], Path]) -> None:
    card = card_of(licensed("---\nlicense: apache-2.0\n---\n"))
    assert "\nlicense: apache-2.0\n" in card
    assert "| licence | apache-2.0, the base's |" in card


def test_a_licence_of_its_own_is_told_by_name(licensed: Callable[[str], Path]) -> None:
    folder = licensed("---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\n---\n")
    card = card_of(folder)
    data = metadata_load(folder / "README.md")
    assert [data["license"], data["license_name"]] == ["other", "tiny-1"]
    assert "| licence | tiny-1, the base's |" in card


@pytest.mark.parametrize("text", ["hi", "---\nlicense: [a, b]\n---\n"])
def test_a_licence_that_cannot_be_known_is_left_out_and_that_is_said(
    text: str, licensed: Callable[[str], Path]
) -> None:
    card = card_of(licensed(text))
    assert "license" not in card
    assert "| licence | the base's, which could not be looked up; its terms hold |" in card


def paste(card: str, folder: Path) -> None:
    """Run the card's snippet as it is, in a folder."""
    (snippet,) = SNIPPET.findall(card)
    assert len(snippet.splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_the_snippet_leads_to_the_merged_model_as_pasted(
    patch: Path, tiny_llama_bf16: Path, folder: Path, tmp_path: Path
) -> None:
    card = card_of(folder)
    shutil.copytree(tiny_llama_bf16, tmp_path / BASE)  # what stands for the Hub: ids that are paths
    shutil.copytree(folder, tmp_path / REPO)
    paste(card, tmp_path)
    merge(tiny_llama_bf16, patch, tmp_path / "by file")
    weights = "model.safetensors"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert (tmp_path / "merged" / weights).read_bytes() == (
        tmp_path / "by file" / weights
    ).read_bytes()


@pytest.fixture
def shared_map(patch: Path, tmp_path: Path) -> Path:
    write_map(tmp_path / "map", as_map(read_adapter(patch)))
    return lay_out(tmp_path / "map", tmp_path / "repository")


def test_a_map_has_a_card_of_its_own(shared_map: Path) -> None:
    card = card_of(shared_map)
    assert "# Safety map for someone/tiny" in card
    assert "- safety-map" in card
    assert "What it does" not in card
    assert "It changes nothing by itself" in " ".join(card.split())


def test_the_snippet_of_a_map_runs_as_pasted(
    shared_map: Path, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    card = card_of(shared_map)
    shutil.copytree(tiny_llama_bf16, tmp_path / BASE)
    shutil.copytree(shared_map, tmp_path / REPO)
    paste(card, tmp_path)


def test_a_pushed_run_has_its_card_and_is_found_with_its_results(
    run: Path, base: str, hub: HubServer
) -> None:
    named = {"name": BASE, "revision": base}
    content_id = read_metadata(run / "patch").content_id
    for name, owner in (("before.json", None), ("after.json", content_id)):
        (run / name).write_text(json.dumps(evaluation(owner, base=named)), encoding="utf-8")
    push_to_hub(run, REPO)
    assert b"| **3.0 % [1.2, 99.9]** | 101 |" in hub.repos[REPO].files()["README.md"]
    (shared,) = find_on_hub(BASE)
    assert ("ASR", 3 / 101) in [(claim.metric, claim.value) for claim in shared.results]


def test_a_run_measured_on_another_patch_is_not_pushed(run: Path, hub: HubServer) -> None:
    result = evaluation("sha256:" + "0" * 64)
    (run / "after.json").write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(HubError, match=r"^results/after\.json: content_id: expected"):
        push_to_hub(run, REPO)
    assert REPO not in hub.repos
