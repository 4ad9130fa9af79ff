"""The training job: from a map to a patch that PEFT loads, whole or not at all."""

import html
import json
import sys
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safeweights_peft.chat import PLAIN_TEMPLATE
from safeweights_peft.errors import BaseMismatchError, DataError, FormatError
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.train import train
from safeweights_peft.merging.verify import verify
from safeweights_peft.patch.io import inspect, read_adapter, read_map
from safeweights_peft.settings import ComputeSettings
from safeweights_peft.tuner.layer import layers
from tests.killing import Ending, end_at_every_write
from tests.patch.test_interruptions import PREPARE, is_old
from tests.tiny_jobs import BENIGN, HARMFUL, Interrupted, Recorder, Requests, content
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer


@pytest.fixture(scope="module")
def map_dir(tiny_llama: Path, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of the float32 Llama."""
    out = tmp_path_factory.mktemp("maps") / "map"
    score(Job(tiny_llama), out, requests.score())
    return out


def test_the_patch_changes_the_entries_of_the_map_and_no_others(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train())
    deltas, indices = read_adapter(tmp_path / "patch").deltas, read_map(map_dir).indices
    assert deltas.keys() == indices.keys()
    assert all(np.array_equal(deltas[name].indices, indices[name]) for name in indices)


def test_the_patch_says_what_of_the_chat_was_set_and_else_nothing(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text(PLAIN_TEMPLATE + "\n")
    prompt = "Be kind. " * 100
    compute = ComputeSettings(system_prompt=prompt, chat_template=str(tmp_path / "chat.jinja"))
    train(Job(tiny_llama, compute), map_dir, tmp_path / "patch", requests.train(steps=1))
    selection = read_map(map_dir).metadata.selection
    chat = {"system_prompt": prompt, "chat_template": PLAIN_TEMPLATE + "\n"}
    assert inspect(tmp_path / "patch")["selection"] == selection | {"chat": chat}
    card = html.unescape((tmp_path / "patch" / "README.md").read_text())
    assert "- system prompt: 'Be kind. Be kind. " in card
    assert len(card) < 2000
    train(Job(tiny_llama), map_dir, tmp_path / "bare", requests.train(steps=1))
    assert inspect(tmp_path / "bare")["selection"] == selection
    assert "prompt" not in (tmp_path / "bare" / "README.md").read_text()


def test_work_with_a_template_that_changed_since_is_not_resumed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(PLAIN_TEMPLATE)
    job = Job(tiny_llama, ComputeSettings(chat_template=str(template)))
    with suppress(Interrupted), job.work(tmp_path / "patch", {}) as work_dir:
        (work_dir / "losses").touch()
        raise Interrupted
    template.write_text(PLAIN_TEMPLATE + "\n")
    with pytest.raises(DataError, match="chat_template_digest"), job.work(tmp_path / "patch", {}):
        pass
    template.write_text(PLAIN_TEMPLATE)
    with job.work(tmp_path / "patch", {}) as again:
        assert again == work_dir


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama"])
def test_the_patch_fits_its_base_on_disk(
    base: str, requests: Requests, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(base)
    score(Job(path), tmp_path / "map", requests.score())
    train(Job(path), tmp_path / "map", tmp_path / "patch", requests.train())
    assert verify(tmp_path / "patch", path).ok


@pytest.mark.parametrize(
    ("base", "stored"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16")],
)
def test_values_are_stored_as_finely_as_the_base_is(
    base: torch.dtype, stored: str, requests: Requests, tmp_path: Path
) -> None:
    path = save_tiny_tokenizer(save_tiny_llama(tmp_path / "base", dtype=base))
    score(Job(path), tmp_path / "map", requests.score(density=0.01))
    train(Job(path), tmp_path / "map", tmp_path / "patch", requests.train(steps=1))
    adapter = read_adapter(tmp_path / "patch")
    assert adapter.metadata.values_dtype == stored
    assert {delta.values.dtype.name for delta in adapter.deltas.values()} == {stored}


def test_peft_loads_the_patch_with_the_values_on_disk(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train())
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, tmp_path / "patch")
    deltas = read_adapter(tmp_path / "patch").deltas
    for layer in layers(model, "default"):
        values = layer["default"].detach().numpy()
        assert np.array_equal(values, deltas[layer.name].values)
        assert values.any()


def test_the_record_beside_the_patch_is_what_was_returned(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    record = train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train(steps=3))
    stored = json.loads((tmp_path / "patch" / "training.json").read_text())
    assert stored == json.loads(json.dumps(record))
    assert [loss["step"] for loss in stored["losses"]] == [1, 2, 3]


def test_a_rate_that_is_found_is_told_and_gives_the_same_patch_by_hand(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    progress, settings = Recorder(), requests.train(learning_rate=None, step_gain=0.01)
    record = train(Job(tiny_llama, progress=progress), map_dir, tmp_path / "auto", settings)
    rate = record["learning_rate"]
    assert f"--lr {rate:g} gains 0.01 nats per step" in progress.notes
    by_hand = requests.train(learning_rate=rate)
    assert train(Job(tiny_llama), map_dir, tmp_path / "hand", by_hand)["learning_rate"] == rate
    auto, hand = (read_adapter(tmp_path / name).deltas for name in ("auto", "hand"))
    assert all(np.array_equal(auto[name].values, hand[name].values) for name in auto)


def write_benign(path: Path, categories: list[str | None]) -> str:
    rows = [{"instruction": text} for text in BENIGN[: len(categories)]]
    for row, category in zip(rows, categories, strict=True):
        row |= {"category": category} if category else {}
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("source", ["by their category", "by their source"])
def test_requests_that_look_harmful_are_drawn_by_their_fraction(
    source: str,
    tiny_llama: Path,
    map_dir: Path,
    requests: Requests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dealt, chat = [], Job(tiny_llama).chat
    monkeypatch.setattr(
        sys.modules[train.__module__],
        "train_to_refuse",
        lambda *given, boundary, **shown: dealt.append((given[3], boundary)) or [],
    )
    if source == "by their category":
        marks = [None, "looks-harmful", "other", None, "looks-harmful"]
        settings = requests.train(benign=write_benign(tmp_path / "all.json", marks))
        expected = [BENIGN[1], BENIGN[4]]
    else:
        write_benign(tmp_path / "more.json", ["other"])
        settings = requests.train(boundary=str(tmp_path / "more.json"))
        expected = [BENIGN[0]]
    for fraction in (None, 0.4):
        given = replace(settings, boundary_fraction=fraction)
        train(Job(tiny_llama), map_dir, tmp_path / str(fraction), given)
    (together, none), (others, boundary) = dealt
    assert none == []
    assert [row.prompt_ids for row in boundary] == [chat.encode_prompt(text) for text in expected]
    assert len(together) == len(others) + len(boundary)


@pytest.mark.parametrize("marks", [[None, None], ["looks-harmful", "looks-harmful"]])
def test_a_fraction_of_requests_of_one_kind_is_refused_before_the_base_is_loaded(
    marks: list[str | None], requests: Requests, map_dir: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    benign = write_benign(tmp_path / "benign.json", marks)
    settings = requests.train(benign=benign, boundary_fraction=0.4)
    job = Job(tiny_llama)
    with pytest.raises(DataError, match=r"^boundary_fraction: .* found [02] of 2 of it; give"):
        train(job, map_dir, tmp_path / "patch", settings)
    assert "model" not in vars(job)


def test_the_hinge_asks_for_longer_answers(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    settings = requests.train(steps=2, hinge_weight=1.0, hinge_tokens=9)
    record = train(Job(tiny_llama), map_dir, tmp_path / "patch", settings)
    assert [loss["hinge"] >= 0 for loss in record["losses"]] == [True, True]


def test_a_patch_says_how_its_entries_were_chosen(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train())
    told = read_adapter(tmp_path / "patch").metadata.selection
    assert told == read_map(map_dir).metadata.selection


def test_a_patch_holds_no_request(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train())
    for name, file in content(tmp_path / "patch").items():
        assert not any(text.encode() in file for text in HARMFUL), name


def test_nothing_but_the_patch_is_left(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train())
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


def broken(base: Path) -> Job:
    """A job that ends in the middle of the training."""
    return Job(base, progress=Recorder("Train", 4))


def test_an_interrupted_training_gives_the_same_patch_when_called_again(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "straight", requests.train())
    with pytest.raises(Interrupted):
        train(broken(tiny_llama), map_dir, tmp_path / "broken", requests.train())
    train(Job(tiny_llama), map_dir, tmp_path / "broken", requests.train())
    assert content(tmp_path / "broken") == content(tmp_path / "straight")


def test_an_interrupted_training_goes_on_from_its_checkpoint(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    rest = map_dir, tmp_path / "patch", requests.train()
    with pytest.raises(Interrupted):
        train(broken(tiny_llama), *rest)
    (work_dir,) = tmp_path.iterdir()
    (checkpoint,) = work_dir.glob("checkpoint-*")
    written = checkpoint.stat().st_mtime_ns

    class Watch(Recorder):
        def task(self, description: str, total: int) -> AbstractContextManager:
            if description == "Train":
                assert checkpoint.stat().st_mtime_ns == written
            return super().task(description, total)

    train(Job(tiny_llama, progress=Watch()), *rest)


def test_a_changed_setting_is_refused_and_starts_afresh_if_that_is_asked_for(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "straight", requests.train(seed=1))
    with pytest.raises(Interrupted):
        train(broken(tiny_llama), map_dir, tmp_path / "broken", requests.train(seed=0))
    left = content(tmp_path)
    with pytest.raises(DataError, match=r"found one with other seed \(0 there, 1 here\)"):
        train(Job(tiny_llama), map_dir, tmp_path / "broken", requests.train(seed=1))
    assert content(tmp_path) == left
    train(Job(tiny_llama), map_dir, tmp_path / "broken", requests.train(seed=1), overwrite=True)
    assert content(tmp_path / "broken") == content(tmp_path / "straight")


def test_a_map_of_another_base_is_refused_before_the_base_is_asked_anything(
    map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    other = save_tiny_tokenizer(save_tiny_llama(tmp_path / "other", seed=1))
    recorder = Recorder()
    with pytest.raises(BaseMismatchError, match=r"expected in .* the values with digest"):
        train(Job(other, progress=recorder), map_dir, tmp_path / "patch", requests.train())
    assert recorder.tasks == []
    assert not (tmp_path / "patch").exists()


def test_a_patch_in_place_of_a_map_is_refused(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train(steps=1))
    with pytest.raises(FormatError, match="expected a safety map, found a safety patch"):
        train(Job(tiny_llama), tmp_path / "patch", tmp_path / "again", requests.train())


def test_an_existing_result_is_refused_before_a_base_is_looked_for(
    map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match=r"give --overwrite to replace it$"):
        train(Job("no base is looked for"), map_dir, tmp_path, requests.train())


def test_an_existing_result_is_replaced_when_asked(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = Job(tiny_llama), map_dir, tmp_path / "patch"
    train(*job, requests.train(seed=0))
    before = content(tmp_path)
    train(*job, requests.train(seed=1), overwrite=True)
    assert content(tmp_path).keys() == before.keys()
    assert content(tmp_path) != before


@pytest.mark.parametrize("shared", ["base", "map"])
def test_a_patch_in_place_of_an_input_is_refused(
    shared: str, tiny_llama: Path, map_dir: Path, requests: Requests
) -> None:
    out = {"base": tiny_llama, "map": map_dir}[shared]
    before = content(out)
    with pytest.raises(FormatError, match=f"a directory apart from the {shared}"):
        train(Job(tiny_llama), map_dir, out, requests.train(), overwrite=True)
    assert content(out) == before


def test_progress_reaches_its_totals(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    recorder = Recorder()
    train(Job(tiny_llama, progress=recorder), map_dir, tmp_path / "patch", requests.train(steps=3))
    assert recorder.tasks == [
        ["Ask the base benign requests", 6, 6],
        ["Train", 3, 3],
        ["Read the base's answers", 6, 6],
    ]


IMPORTS = """
import torch
torch.set_num_threads(1)
from safeweights_peft.jobs.train import _save
from tests.tuner.patches import load_base, patch_model, save_patch
base = Path({base!r})
save_patch(base, Path(root, "template"), seed=1)
Path(root, "template", "kept").touch()
model = patch_model(load_base(base), base, seed=2)
metadata = model.peft_config["default"].to_metadata("here")
"""
SAVE = "_save(model, metadata, folder / 'patch', {'losses': []}, True)"
SIZES = range(1000, 31000, 6000)  # of tensors of 26,000 bytes


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["kill", "full"])
def test_training_that_ends_while_it_saves_leaves_the_old_patch_or_the_new_one(
    ending: Ending, tiny_llama: Path, tmp_path: Path
) -> None:
    imports = IMPORTS.format(base=str(tiny_llama))
    folders = end_at_every_write(tmp_path, ending, imports, PREPARE, SAVE, SIZES)
    outcomes = [is_old(folder) for folder in folders]
    assert 0 < sum(outcomes) < len(outcomes)
    if ending == "full":
        assert outcomes == [(folder / "error").exists() for folder in folders]
        told = {
            (folder / "error").read_text().split(":")[0] for folder in folders if is_old(folder)
        }
        assert told == {"FormatError"}
