"""The preserving job: from a base, a map and data to a fine-tuned model, whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeweights_peft.chat import Chat
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    DataError,
    EvaluationError,
    FormatError,
    ModelError,
)
from safeweights_peft.jobs.evaluate import evaluate, pick_figures
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.preserve import preserve_model
from safeweights_peft.jobs.score import score
from safeweights_peft.jobs.train import train
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import verify
from safeweights_peft.patch.io import read_artifact, read_map
from safeweights_peft.progress import Advance, Progress
from safeweights_peft.settings import ComputeSettings, PreserveSettings
from safeweights_peft.sources import read_rows
from safeweights_peft.training.finetune import fine_tune
from tests.tiny_jobs import Interrupted, Recorder, Requests, content
from tests.tiny_models import save_tiny_llama, save_tiny_tokenizer

BASES = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral"]


@pytest.fixture(scope="module")
def map_dir(tiny_llama: Path, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of the float32 Llama."""
    out = tmp_path_factory.mktemp("maps") / "map"
    score(Job(tiny_llama), out, requests.score())
    return out


def call(
    base: str,
    map_dir: Path,
    data: str,
    out: Path,
    settings: PreserveSettings | None = None,
    compute: ComputeSettings | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs one job."""
    job = Job(base, compute, progress)
    return preserve_model(job, map_dir, data, out, settings, overwrite=overwrite)


def frozen_bytes(path: Path, map_dir: Path) -> dict[str, bytes]:
    """Reads a checkpoint's entries at the indices of a map or a patch."""
    artifact, reader = read_artifact(map_dir), CheckpointReader(path)
    return {
        name: gather_entries(reader, name, record, artifact.indices[name]).tobytes()
        for name, record in artifact.metadata.tensors.items()
    }


def layout(path: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Tells each tensor's dtype, shape and shard."""
    reader = CheckpointReader(path)
    found = {key: reader.info(key) for key in reader.keys()}
    return {key: (info.dtype, info.shape, info.shard) for key, info in found.items()}


@pytest.mark.parametrize("base", BASES)
def test_the_saved_models_frozen_entries_are_the_bases_bit_for_bit(
    base: str, requests: Requests, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(base)
    score(Job(path), tmp_path / "map", requests.score())
    job = str(path), tmp_path / "map", requests.lessons, tmp_path / "model", requests.preserve()
    call(*job)
    assert frozen_bytes(tmp_path / "model", tmp_path / "map") == frozen_bytes(path, job[1])
    before, after = (
        load_file(folder / "model.safetensors") for folder in (path, tmp_path / "model")
    )
    assert all(not np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("base", BASES)
def test_the_saved_model_is_the_trained_one_in_the_dtype_of_its_base(
    base: str, requests: Requests, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(base)
    score(Job(path), tmp_path / "map", requests.score())
    settings = requests.preserve()
    job = str(path), tmp_path / "map", requests.lessons, tmp_path / "model", settings
    losses = call(*job)["losses"]
    twin = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    examples = [
        Chat(tokenizer).encode_example(row.instruction, row.output, settings.max_answer_tokens)
        for row in read_rows(requests.lessons)
    ]
    pad, safety_map = tokenizer.pad_token_id, read_map(tmp_path / "map")
    assert losses == fine_tune(twin, pad, examples, safety_map, settings, tmp_path / "twin")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name).to(parameter.dtype)), name
    assert layout(tmp_path / "model") == layout(path)


def test_tensors_of_other_dtypes_keep_their_own(
    tiny_llama_bf16: Path, requests: Requests, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama_bf16, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    score(Job(base), tmp_path / "map", requests.score())
    job = str(base), tmp_path / "map", requests.lessons, tmp_path / "model", requests.preserve()
    call(*job)
    assert layout(tmp_path / "model")["model.norm.weight"][0] == "float32"
    assert layout(tmp_path / "model") == layout(base)


def test_shards_stay_the_bases(requests: Requests, tmp_path: Path) -> None:
    base = save_tiny_tokenizer(save_tiny_llama(tmp_path / "base", max_shard_size="40KB"))
    score(Job(base), tmp_path / "map", requests.score())
    job = str(base), tmp_path / "map", requests.lessons, tmp_path / "model", requests.preserve()
    call(*job)
    assert len({shard for _, _, shard in layout(base).values()}) > 1
    assert layout(tmp_path / "model") == layout(base)
    assert verify(tmp_path / "map", tmp_path / "model").ok


def test_what_set_has_made_safe_and_merged_is_what_stays(
    tiny_llama_bf16: Path, requests: Requests, tmp_path: Path
) -> None:
    base, patch, merged = tiny_llama_bf16, tmp_path / "patch", tmp_path / "merged"
    score(Job(base), tmp_path / "map", requests.score())
    train(Job(base), tmp_path / "map", patch, requests.train())
    merge(base, patch, merged)
    record = call(str(merged), patch, requests.lessons, tmp_path / "model", requests.preserve())
    assert frozen_bytes(tmp_path / "model", patch) == frozen_bytes(merged, patch)
    assert frozen_bytes(tmp_path / "model", patch) != frozen_bytes(base, patch)
    assert record["artifact"] == "safety patch"


def test_a_patch_that_is_not_merged_is_refused_and_nothing_is_left(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    train(Job(tiny_llama), map_dir, tmp_path / "patch", requests.train())
    job = str(tiny_llama), tmp_path / "patch", requests.lessons, tmp_path / "model"
    with pytest.raises(BaseMismatchError, match="without; give the checkpoint"):
        call(*job, requests.preserve())
    assert [path.name for path in tmp_path.iterdir()] == ["patch"]


def test_what_loading_needs_comes_along_from_the_base(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "LICENSE").write_text("Do as you like")
    (base / "README.md").write_text("The base's own card")
    job = str(base), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    call(*job)
    before, after = content(base), content(tmp_path / "model")
    assert after.keys() == before.keys() | {"preserving.json"}
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"model.safetensors", "README.md"}


def test_the_card_says_what_was_frozen_and_how_to_check_it(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    record = call(*job)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"# {tiny_llama.name}, fine-tuned" in card
    assert f"{record['frozen_entries']:,} weights in" in card
    assert "safeweights verify path/of/the/map --merged" in card
    assert str(tmp_path) not in card


def test_the_record_beside_the_model_is_what_was_returned(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    record = call(*job)
    stored = json.loads((tmp_path / "model" / "preserving.json").read_text())
    assert stored == json.loads(json.dumps(record))
    assert len(stored["losses"]) == 7
    assert stored["settings"]["weight_decay"] == 0.1
    assert stored["artifact"] == "safety map"


def test_products_may_be_computed_in_bfloat16(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    compute = ComputeSettings(device="cpu", dtype="bfloat16")
    job = str(tiny_llama), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    call(*job, compute)
    assert frozen_bytes(tmp_path / "model", map_dir) == frozen_bytes(tiny_llama, map_dir)
    assert layout(tmp_path / "model") == layout(tiny_llama)


def test_float16_on_a_cpu_is_refused(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    with pytest.raises(ModelError, match="choose float32 or bfloat16"):
        call(*job, ComputeSettings(device="cpu", dtype="float16"))


def test_an_interrupted_job_gives_the_same_model_when_called_again(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.lessons
    call(*job, tmp_path / "straight", requests.preserve())
    with pytest.raises(Interrupted):
        call(*job, tmp_path / "broken", requests.preserve(), progress=Recorder("Fine-tune", 5))
    assert not (tmp_path / "broken").exists()
    call(*job, tmp_path / "broken", requests.preserve())
    assert content(tmp_path / "broken") == content(tmp_path / "straight")
    assert {path.name for path in tmp_path.iterdir()} == {"straight", "broken"}


def test_an_interrupted_job_goes_on_from_its_checkpoint(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    with pytest.raises(Interrupted):
        call(*job, progress=Recorder("Fine-tune", 5))
    steps: list[int] = []

    class Steps(Recorder):
        @contextmanager
        def task(self, description: str, total: int) -> Iterator[Advance]:
            yield lambda done, /, **figures: steps.append(done)

    resumed = Steps()
    call(*job, progress=resumed)
    assert steps == [5, 1, 1]
    assert resumed.notes[-1] == "Fine-tune: resumed at step 5"


def test_progress_reaches_its_total(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    recorder = Recorder()
    call(*job, progress=recorder)
    assert recorder.tasks == [["Fine-tune", 7, 7]]


@pytest.mark.parametrize("change", ["setting", "weights"])
def test_a_changed_setting_or_base_is_refused_and_starts_afresh_if_that_is_asked_for(
    change: str, tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    job = str(base), map_dir, requests.lessons, tmp_path / "model"
    with pytest.raises(Interrupted):
        call(*job, requests.preserve(), progress=Recorder("Fine-tune", 5))
    settings = requests.preserve(seed=1) if change == "setting" else requests.preserve()
    if change == "weights":
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"] *= 2  # no map selects from it
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        DataError, match=r"found one with other (seed |files of the base, so it can)"
    ):
        call(*job, settings)
    call(*job, settings, overwrite=True)
    straight = str(base), map_dir, requests.lessons, tmp_path / "straight"
    call(*straight, settings)
    assert content(tmp_path / "model") == content(tmp_path / "straight")


def test_a_map_of_another_base_is_refused_and_nothing_is_left(
    map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    other = save_tiny_tokenizer(save_tiny_llama(tmp_path / "other", seed=1))
    job = str(other), map_dir, requests.lessons, tmp_path / "model", requests.preserve()
    with pytest.raises(
        BaseMismatchError, match=r"\(another model\); .*; or give the patch as --map"
    ):
        call(*job)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_rows_without_answers_are_refused(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.benign, tmp_path / "model", requests.preserve()
    with pytest.raises(DataError, match="expected a column of answers"):
        call(*job)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_base_and_result_are_measured_as_eval_does(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path, method: str
) -> None:
    measure, out = requests.evaluate(), tmp_path / "out"
    settings = requests.preserve(method=method, steps=2)
    record = preserve_model(Job(tiny_llama), map_dir, requests.lessons, out, settings, measure)
    assert json.loads((out / "preserving.json").read_text()) == record
    assert record["before"] == pick_figures(evaluate(Job(tiny_llama), None, measure))
    base, adapter = (out, None) if method == "full" else (tiny_llama, out)
    assert record["after"] == pick_figures(evaluate(Job(base), adapter, measure))


def test_a_judge_that_can_not_judge_is_refused_before_the_training(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    recorder, measure = Recorder(), requests.evaluate(judge=("nobody",))
    job = Job(tiny_llama, progress=recorder)
    with pytest.raises(EvaluationError, match="--judge nobody"):
        preserve_model(job, map_dir, requests.lessons, tmp_path / "out", None, measure)
    assert recorder.tasks == []


def test_an_existing_result_is_refused_before_a_base_is_looked_for(
    map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"give --overwrite to replace it$"):
        call("no base is looked for", map_dir, requests.lessons, tmp_path)


def test_an_existing_result_is_replaced_when_asked(
    tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    job = str(tiny_llama), map_dir, requests.lessons, tmp_path / "model"
    call(*job, requests.preserve(seed=0))
    before = content(tmp_path)
    call(*job, requests.preserve(seed=1), overwrite=True)
    assert content(tmp_path).keys() == before.keys()
    assert content(tmp_path) != before


@pytest.mark.parametrize("shared", ["base", "map"])
def test_a_result_in_place_of_an_input_is_refused(
    shared: str, tiny_llama: Path, map_dir: Path, requests: Requests, tmp_path: Path
) -> None:
    inputs = {
        "base": shutil.copytree(tiny_llama, tmp_path / "base"),
        "map": shutil.copytree(map_dir, tmp_path / "map"),
    }
    job = str(inputs["base"]), inputs["map"], requests.lessons, inputs[shared], requests.preserve()
    with pytest.raises(CheckpointError, match=f"a directory apart from the {shared}"):
        call(*job, overwrite=True)


def test_a_model_in_place_of_a_map_is_refused(
    tiny_llama: Path, requests: Requests, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match="expected a directory with adapter_config"):
        call(str(tiny_llama), tiny_llama, requests.lessons, tmp_path / "model")
