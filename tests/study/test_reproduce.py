"""A run's record, and the run made again: same settings, same data, and what came out compared."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import safeweights_peft
from safeweights_peft.errors import BaseMismatchError, DataError, ModelError, SettingsError
from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.jobs.record import read_record
from safeweights_peft.patch.io import read_adapter, read_metadata, write_adapter
from safeweights_peft.settings import RunSettings, restore
from safeweights_peft.sources import BUILTIN_SETS, source_digest
from safeweights_peft.study.reproduce import find_recorded, reproduce
from safeweights_peft.tables import reproduction_rows
from tests.jobs.conftest import Run
from tests.tiny_files import copy_checkpoint, edit_config
from tests.tiny_guards import save_byte_level_tokenizer, save_tiny_guard
from tests.tiny_jobs import Recorder, Requests, content

Edit = Callable[[dict[str, Any]], object]


def edit_record(folder: Path, edit: Edit) -> None:
    path = folder / "reproduce.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return shutil.copytree(run.out, tmp_path / "copied")


@pytest.fixture
def alone(run: Run, tmp_path: Path) -> Path:
    """The run's record without the run, as it comes to another machine."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return Path(shutil.copy(run.out / "reproduce.json", folder))


class Again(NamedTuple):
    """The run made again.

    Attributes:
        out: its directory.
        found: what comparing found.
    """

    out: Path
    found: dict[str, Any]


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Again:
    out = tmp_path_factory.mktemp("made") / "again"
    return Again(out, reproduce(find_recorded(run.out), out))


@pytest.fixture
def again(made: Again, tmp_path: Path) -> Path:
    """The run made again, so that making it again is comparing alone."""
    return shutil.copytree(made.out, tmp_path / "again")


def data_of(requests: Requests) -> list[Path]:
    return [Path(requests.harmful), Path(requests.benign)]


def test_a_record_names_the_patch_and_what_it_merges_to(run: Run) -> None:
    record = read_record(run.out / "reproduce.json")
    assert record.content_id == read_metadata(run.out / "patch").content_id
    assert record.merged_digest.startswith("sha256:")
    assert {**asdict(record.after), "cut_in_thought": 0} == run.result["after"]


def test_a_record_holds_the_settings_with_names_for_paths(run: Run, requests: Requests) -> None:
    settings = read_record(run.out / "reproduce.json").settings
    assert settings.base == run.base.name
    own = {"harmful": "harmful.json", "benign": "benign.jsonl"}
    assert settings.score == replace(requests.score(), **own)
    assert settings.train == requests.train(steps=20, **own)


def test_a_record_knows_neither_paths_nor_the_host(run: Run, requests: Requests) -> None:
    text = (run.out / "reproduce.json").read_text()
    places = [
        run.base.parent,
        run.out.parent,
        Path(requests.harmful).parent,
        Path.home(),
        Path.cwd(),
    ]
    assert [place for place in places if str(place) in text] == []
    assert socket.gethostname() not in text
    assert os.sep not in text.replace("\\/", "/").replace("sha256", "")


def test_a_record_has_the_digest_of_every_file_of_requests(run: Run, requests: Requests) -> None:
    data = read_record(run.out / "reproduce.json").data
    assert set(data) == {
        "score.harmful",
        "score.benign",
        "train.harmful",
        "train.benign",
        "evaluate.harmful",
        "evaluate.benign",
    }
    assert data["train.benign"].digest == source_digest(requests.benign)


@pytest.mark.parametrize("name", BUILTIN_SETS)
def test_built_in_requests_have_the_digest_of_their_file(name: str) -> None:
    path = Path(safeweights_peft.__file__).with_name("prompts") / f"{name}.json"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_digest(f"builtin:{name}") == f"sha256:{digest}"


def test_a_record_tells_what_bits_can_depend_on(run: Run) -> None:
    environment = read_record(run.out / "reproduce.json").environment
    for name in ("python", "torch", "transformers", "peft", "numpy", "safeweights-peft"):
        assert environment[name]
    assert environment["threads"] == 1
    assert environment["dtype"] == "float32"


def test_the_same_run_gives_the_same_patch(made: Again) -> None:
    found = made.found
    assert found["same"]
    assert found["content_id"]["recorded"] == found["content_id"]["found"]
    assert found["entries"]["iou"] == 1
    assert found["environment"] == {}
    assert read_metadata(made.out / "patch").content_id == found["content_id"]["found"]


def test_a_record_alone_is_enough_with_base_and_data(
    alone: Path, run: Run, requests: Requests, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.json"
    shutil.copy(requests.harmful, moved)
    recorded = find_recorded(alone, str(run.base), [moved, Path(requests.benign)])
    found = reproduce(recorded, tmp_path / "again")
    assert found["same"]
    assert found["entries"] is None


def test_a_shared_patch_is_compared_entry_by_entry(
    run: Run, requests: Requests, tmp_path: Path
) -> None:
    shared = shutil.copytree(run.out / "patch", tmp_path / "shared")
    (shared / "results").mkdir()
    shutil.copy(run.out / "reproduce.json", shared / "results")
    recorded = find_recorded(shared, data=data_of(requests))  # the base is what the patch names
    assert recorded.patch == shared
    assert recorded.settings.base == str(run.base)


def test_a_base_on_the_hub_is_taken_at_its_commit(
    copied: Path, run: Run, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(name: str, revision: str | None = None) -> Any:
        asked.append((name, revision))
        raise ModelError("offline")

    def move(record: dict[str, Any]) -> None:
        record["base"] |= {"name": "someone/tiny", "revision": "0123abc"}
        record["settings"]["base"] = "someone/tiny"

    edit_record(copied, move)
    monkeypatch.setattr("safeweights_peft.study.reproduce.resolve_base", resolve)
    with pytest.raises(ModelError, match="offline"):
        find_recorded(copied, data=data_of(requests))
    assert asked == [("someone/tiny", "0123abc")]


def test_an_interrupted_reproduction_goes_on(run: Run, again: Path) -> None:
    (again / "result.json").unlink()
    recorder = Recorder()
    assert reproduce(find_recorded(run.out), again, recorder)["same"]
    assert recorder.tasks == []


def test_another_seed_differs_and_the_entries_in_common_are_counted(
    copied: Path, tmp_path: Path
) -> None:
    (copied / "settings.json").unlink()

    def reseed(record: dict[str, Any]) -> None:
        record["settings"]["score"] |= {"method": "random", "seed": 1}

    edit_record(copied, reseed)
    settings = json.loads((copied / "result.json").read_text())["settings"]
    data = {Path(settings["score"]["harmful"]), Path(settings["train"]["benign"])}
    found = reproduce(find_recorded(copied, settings["base"], sorted(data)), tmp_path / "again")
    assert not found["same"]
    assert found["content_id"]["recorded"] != found["content_id"]["found"]
    assert 0 < found["entries"]["iou"] < 1


def test_a_rate_outside_the_recorded_interval_differs(copied: Path, again: Path) -> None:
    def worsen(record: dict[str, Any]) -> None:
        record["after"]["attack_success_rate"] |= {"rate": 0.9, "low": 0.8, "high": 1.0}

    edit_record(copied, worsen)
    found = reproduce(find_recorded(copied), again)
    assert not found["same"]
    within = {key: each["within"] for key, each in found["rates"].items()}
    assert within == dict.fromkeys(within, True) | {"after.attack_success_rate": False}


def name_scale(out: Path, scale: object, again: Path) -> None:
    """Let a run name a scale, with the figures that the run made again has there."""
    settings = restore(RunSettings, json.loads((again / "settings.json").read_text()), "settings")
    swept = enhance(settings, again, max_asr=1.0)["sweep"] | {"scale": scale}
    path = out / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sweep": swept}))


def test_a_scale_that_the_run_names_is_compared_too(copied: Path, again: Path) -> None:
    name_scale(copied, 0.75, again)
    found = reproduce(find_recorded(copied), again)
    assert found["same"]
    rates = found["rates"]
    assert list(rates)[-2] == "at scale 0.75.attack_success_rate"
    assert "ASR at scale 0.75" in [row[0] for row in reproduction_rows(found)]
    path = copied / "result.json"
    result = json.loads(path.read_text())
    row = next(row for row in result["sweep"]["rows"] if row["scale"] == 0.75)
    row["attack_success_rate"] |= {"rate": 2.0, "low": 1.5, "high": 3.0}
    path.write_text(json.dumps(result))
    found = reproduce(find_recorded(copied), again)
    assert not found["same"]
    assert [key for key, rate in found["rates"].items() if not rate["within"]] == [
        "at scale 0.75.attack_success_rate"
    ]
    del result["sweep"]["max_asr"]
    path.write_text(json.dumps(result))
    with pytest.raises(DataError, match=r"sweep: expected rows, scale and max_asr, found KeyError"):
        find_recorded(copied)


@pytest.mark.parametrize("scale", [None, 0.0, 1.0])
def test_a_run_that_names_no_other_scale_is_compared_at_1_alone(
    scale: float | None, copied: Path, again: Path
) -> None:
    name_scale(copied, scale, again)
    assert find_recorded(copied).picked is None


def test_another_environment_is_named(copied: Path, again: Path) -> None:
    edit_record(copied, lambda record: record["environment"].update(torch="2.6.0", threads=64))
    found = reproduce(find_recorded(copied), again)
    assert found["same"]
    assert {key: each["recorded"] for key, each in found["environment"].items()} == {
        "threads": 64,
        "torch": "2.6.0",
    }


def test_changed_data_is_found_before_anything_is_computed(
    alone: Path, run: Run, requests: Requests, tmp_path: Path
) -> None:
    changed = tmp_path / "harmful.json"
    changed.write_text(Path(requests.harmful).read_text() + "\n")
    with pytest.raises(
        DataError, match=r"^score\.harmful: harmful\.json: expected sha256:.*--data"
    ):
        find_recorded(alone, str(run.base), [changed, Path(requests.benign)])


def test_changed_built_in_requests_are_those_of_another_version(
    copied: Path, requests: Requests
) -> None:
    (copied / "settings.json").unlink()

    def change(record: dict[str, Any]) -> None:
        record["settings"]["score"]["harmful"] = "builtin:harmful_train"

    edit_record(copied, change)
    edit_record(copied, lambda r: r["data"]["score.harmful"].update(digest="sha256:0"))
    with pytest.raises(DataError, match="install the recorded version"):
        find_recorded(copied, data=data_of(requests))


def test_data_that_the_record_does_not_vouch_for_is_refused(
    copied: Path, requests: Requests
) -> None:
    edit_record(copied, lambda record: record["data"].pop("evaluate.benign"))
    with pytest.raises(DataError, match="ask for a whole record"):
        find_recorded(copied, data=data_of(requests))


def test_another_base_is_refused_by_its_files(
    alone: Path, run: Run, requests: Requests, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2

    other = copy_checkpoint(run.base, tmp_path / "other", change)
    with pytest.raises(BaseMismatchError, match=r"another or no model\.safetensors; give"):
        find_recorded(alone, str(other), data_of(requests))


def test_a_base_that_is_nowhere_is_asked_for(alone: Path, requests: Requests) -> None:
    with pytest.raises(ModelError, match="give it by --base"):
        find_recorded(alone, data=data_of(requests))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda r: r.update(kind="training"), "kind: expected 'reproduction', found 'training'"),
        (lambda r: r.pop("environment"), "use the version of safeweights-peft that wrote it"),
        (lambda r: r.update(more=1), "use the version of safeweights-peft that wrote it"),
        (lambda r: r["settings"]["score"].update(examples="64"), "score.examples: expected int"),
        (
            lambda r: r["settings"]["score"].update(method="best"),
            "score.method: expected one of esi",
        ),
        (lambda r: r["settings"]["train"].update(steps=True), "steps: expected int"),
        (lambda r: r["settings"].update(train=[]), r"train: expected harmful, benign, boundary"),
        (lambda r: r["base"].update(files=[]), "base.files: expected"),
        (lambda r: r["base"]["files"].update(x=None), "base.files.x: expected str"),
        (lambda r: r["after"]["attack_success_rate"].update(low="0"), "low: expected float"),
        (lambda r: r["data"].update(a=1), "data.a: expected name, digest"),
    ],
)
def test_a_record_with_other_fields_or_types_is_refused(
    edit: Edit, told: str, copied: Path
) -> None:
    edit_record(copied, edit)
    with pytest.raises((DataError, SettingsError), match=told):
        find_recorded(copied)


def test_a_part_of_a_run_leads_to_the_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"expected reproduce\.json, found none; give {run.out}$"):
        find_recorded(run.out / "patch")
    with pytest.raises(DataError, match=r"found none; give the directory of a run$"):
        find_recorded(tmp_path)


def test_the_recorded_run_itself_is_not_a_place_for_the_new_one(copied: Path) -> None:
    before = content(copied)
    with pytest.raises(DataError, match="found the recorded run itself"):
        reproduce(find_recorded(copied), copied)
    assert content(copied) == before


def test_a_patch_of_other_content_beside_the_record_is_not_compared_with(copied: Path) -> None:
    adapter = read_adapter(copied / "patch")
    shutil.rmtree(copied / "patch")
    write_adapter(copied / "patch", replace(adapter, metadata=replace(adapter.metadata, scale=2.0)))
    assert find_recorded(copied).patch is None


def test_a_broken_patch_beside_the_record_is_not_compared_with(copied: Path) -> None:
    edit_config(copied / "patch", lambda config: config.update(mode="?"))
    assert find_recorded(copied).patch is None


def test_the_models_that_judge_are_recorded_without_their_places_and_held_to_their_digests(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    guard = save_tiny_guard(save_byte_level_tokenizer(tmp_path / "guard"))
    profile = {"safe": ["s"], "unsafe": ["u"], "template": "{request}|{answer}|"}
    (tmp_path / "mine.json").write_text(json.dumps(profile))
    judges = ("refusals", f"guard:{guard}={tmp_path / 'mine.json'}")
    settings = requests.run(tiny_llama, steps=1, evaluate=requests.evaluate(judge=judges))
    enhance(settings, tmp_path / "run")
    text = (tmp_path / "run" / "reproduce.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["settings"]["evaluate"]["judge"][1] == "guard:guard=mine.json"
    assert find_recorded(tmp_path / "run").settings.evaluate.judge == judges
    own = (tmp_path / "mine.json").read_bytes()
    recorded = json.loads(text)["data"]["evaluate.judge.1"]
    digest = f"sha256:{hashlib.sha256(own).hexdigest()}"
    assert recorded == {"name": "mine.json", "digest": digest}
    (tmp_path / "mine.json").write_text(json.dumps(profile | {"safe": ["t"]}))
    with pytest.raises(DataError, match=rf"^evaluate\.judge\.1: .*mine\.json: expected {digest}"):
        find_recorded(tmp_path / "run")
    (tmp_path / "kept.json").write_bytes(own)
    found = find_recorded(tmp_path / "run", data=[tmp_path / "kept.json"]).settings.evaluate.judge
    assert found == ("refusals", f"guard:{guard}={tmp_path / 'kept.json'}")
    (tmp_path / "mine.json").write_bytes(own)
    save_tiny_guard(guard, torch.bfloat16)
    with pytest.raises(BaseMismatchError, match=r"^evaluate\.judge\.1: .*model\.safetensors"):
        find_recorded(tmp_path / "run")
