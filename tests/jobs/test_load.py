"""Loading a patched model: the weights are those of the merged checkpoint, bit by bit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from safeweights_peft import load_model
from safeweights_peft.cli import main
from safeweights_peft.errors import (
    AlreadyMergedError,
    BaseMismatchError,
    MergeError,
    ModelError,
    SettingsError,
)
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs.job import Job
from safeweights_peft.jobs.load import load_patched
from safeweights_peft.merging.merge import merge
from safeweights_peft.patch.io import read_adapter, write_adapter
from tests.tiny_jobs import content
from tests.tiny_models import save_tiny_llama
from tests.tuner.patches import edit_config, load_base, logits, same_weights, save_patch, twin

BASES = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(getattr(request, "param", "tiny_llama_bf16"))


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    return save_patch(base, tmp_path / "patch")


@pytest.fixture
def cached(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Puts a base's commit, and another model as its main branch, into an empty Hub cache."""

    def put(other: Path) -> str:
        repo = tmp_path / "hub" / "models--someone--tiny"
        shutil.copytree(base, repo / "snapshots" / COMMIT)
        shutil.copytree(other, repo / "snapshots" / COMMIT[::-1])
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT[::-1])
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        return "someone/tiny"

    return put


def test_a_patch_is_loaded_at_a_scale(base: Path, patch: Path, tmp_path: Path) -> None:
    merge(base, [(patch, 0.5)], tmp_path / "merged")
    expected = load_base(tmp_path / "merged")
    assert same_weights(load_model(base, f"{patch}@0.5"), expected)
    wrapped = load_model(base, [f"{patch}@0.5"], merge=False)
    assert torch.equal(logits(wrapped), logits(expected))
    with pytest.raises(SettingsError, match="at least -10 and at most 10"):
        load_model(base, f"{patch}@1e30")


@pytest.mark.parametrize("base", BASES, indirect=True)
def test_merging_while_loading_gives_the_bits_of_every_other_way(
    base: Path, tmp_path: Path
) -> None:
    patch = save_patch(base, tmp_path / "patch", scale=0.7)
    found = load_model(base, patch)
    assert same_weights(found, PeftModel.from_pretrained(load_base(base), patch).merge_and_unload())
    merge(base, patch, tmp_path / "merged")
    assert same_weights(found, load_base(tmp_path / "merged"))
    assert same_weights(found, twin(base, patch))
    assert not same_weights(found, load_base(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["tiny_llama_bf16", "tiny_mixtral"], indirect=True)
def test_in_a_dtype_of_choice_the_model_is_the_merged_checkpoint_in_that_dtype(
    dtype: torch.dtype, base: Path, patch: Path, tmp_path: Path
) -> None:
    merge(base, patch, tmp_path / "merged")
    found, merged = (
        load_model(base, patch, dtype=dtype),
        load_base(tmp_path / "merged", dtype=dtype),
    )
    assert same_weights(found, merged)
    assert torch.equal(logits(found), logits(merged))


def test_the_base_s_files_stay_as_they_are(base: Path, patch: Path) -> None:
    before = content(base)
    load_model(base, patch)
    assert content(base) == before


def test_a_merged_model_is_a_plain_one_for_inference(base: Path, patch: Path) -> None:
    found = load_model(base, patch)
    assert type(found) is type(load_base(base))
    assert not found.training
    assert not any(each.requires_grad for each in found.parameters())


def test_patches_add_up_and_are_rounded_once(base: Path, tmp_path: Path) -> None:
    patches = [save_patch(base, tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    first, second = (read_adapter(each).indices for each in patches)
    assert any(np.isin(first[name], second[name]).any() for name in first)
    assert same_weights(load_model(base, patches), twin(base, *patches))


def test_unmerged_patches_are_all_active_and_can_be_switched_off(
    base: Path, tmp_path: Path
) -> None:
    patches = [save_patch(base, tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    found = load_model(base, patches, merge=False)
    assert isinstance(found, PeftModel)
    assert not any(each.requires_grad for each in found.parameters())
    assert torch.equal(logits(found), logits(twin(base, *patches)))
    with found.disable_adapter():
        assert torch.equal(logits(found), logits(load_base(base)))


@pytest.mark.parametrize("merged", [True, False])
def test_without_a_base_the_one_that_the_patch_names_is_loaded(
    merged: bool, base: Path, patch: Path
) -> None:
    assert torch.equal(logits(load_model(None, patch, merged)), logits(twin(base, patch)))


@pytest.mark.parametrize("given", [None, "someone/tiny"])
def test_the_base_is_taken_at_the_commit_that_the_patch_records(
    given: str | None, base: Path, patch: Path, cached: Callable[[Path], str], tmp_path: Path
) -> None:
    name = cached(save_tiny_llama(tmp_path / "other", seed=1))
    edit_config(patch, base_model_name_or_path=name, revision=COMMIT)
    assert same_weights(load_model(given, patch), twin(base, patch))


@pytest.mark.parametrize(
    ("command", "job"),
    [
        ("eval BASE --adapter PATCH", "evaluate.evaluate"),
        ("train BASE --map PATCH --out out", "train.train"),
        ("preserve BASE --map PATCH --data rows.json --out out", "preserve.preserve_model"),
        ("diff BASE tuned --map PATCH --out out", "diff.diff"),
        ("protect --tuned . --base BASE --map PATCH --out out", "protect.protect_tuned"),
    ],
)
def test_a_command_takes_the_commit_that_an_adapter_records(
    *, command: str, job: str, patch: Path, cached: Callable[[Path], str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name = cached(save_tiny_llama(tmp_path / "other", dtype=torch.bfloat16, seed=1))
    edit_config(patch, base_model_name_or_path=name, revision=COMMIT)
    jobs = []

    def start(job: Job, *_: object, **__: object) -> None:
        jobs.append(job)
        raise ModelError("started")

    monkeypatch.setattr(f"safeweights_peft.jobs.{job}", start)
    monkeypatch.chdir(tmp_path)
    arguments = [{"BASE": name, "PATCH": str(patch)}.get(part, part) for part in command.split()]
    assert "started" in CliRunner().invoke(main, arguments).output
    assert jobs[0].base.revision == COMMIT


def test_the_main_branch_of_a_base_that_has_moved_on_is_refused(
    patch: Path, cached: Callable[[Path], str], tmp_path: Path
) -> None:
    name = cached(save_tiny_llama(tmp_path / "other", dtype=torch.bfloat16, seed=1))
    with pytest.raises(BaseMismatchError, match=r"expected in .* the values with digest"):
        load_model(name, patch)


def test_a_merged_base_is_refused(base: Path, patch: Path, tmp_path: Path) -> None:
    merge(base, patch, tmp_path / "merged")
    with pytest.raises(AlreadyMergedError, match="already merged into it; use it as it is"):
        load_model(tmp_path / "merged", patch)


def test_a_patch_whose_result_is_not_the_promised_one_is_refused(base: Path, patch: Path) -> None:
    tensors = read_adapter(patch).metadata.to_config()["tensors"]
    name = next(iter(tensors))
    tensors[name]["merged_digest"] = "sha256:" + "0" * 64
    edit_config(patch, tensors=tensors)
    with pytest.raises(MergeError, match=f"^{name}: .* the adapter contradicts itself"):
        load_model(base, patch)


def test_patches_that_place_a_parameter_differently_are_not_merged_together(
    tmp_path: Path, tiny_mixtral: Path
) -> None:
    patches = [save_patch(tiny_mixtral, tmp_path / f"{seed}", seed=seed) for seed in (0, 1)]
    tensors = read_adapter(patches[1]).metadata.to_config()["tensors"]
    name = next(name for name, record in tensors.items() if len(record["blocks"]) > 1)
    tensors[name]["blocks"].reverse()
    edit_config(patches[1], tensors=tensors)
    message = f"one parameter and layout in all patches, found {name} in {patches[0]} and {name} in"
    with pytest.raises(MergeError, match=message):
        load_model(tiny_mixtral, patches)


def test_no_adapter_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match=r"^adapters: expected at least one, found none"):
        load_model(base, [])


def test_a_patch_that_names_no_base_asks_for_one(base: Path, patch: Path) -> None:
    adapter = read_adapter(patch)
    edit_config(patch, base_model_name_or_path=None)
    assert adapter.metadata.base_model_name_or_path == str(base)
    with pytest.raises(ModelError, match="the name of its base, found none; give the base"):
        load_model(None, patch)


@pytest.mark.parametrize("merged", [True, False])
def test_a_dtype_may_be_named(merged: bool, base: Path, patch: Path) -> None:
    by_name = load_model(base, patch, merged, dtype="float16")
    assert same_weights(by_name, load_model(base, patch, merged, dtype=torch.float16))
    with pytest.raises(ModelError, match="expected auto, float32, bfloat16, float16, found int8"):
        load_model(base, patch, merged, dtype="int8")


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16])
def test_a_correction_is_merged_before_the_lora_that_it_stands_in(
    dtype: str | torch.dtype, base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    lora = tmp_path / "lora"
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_base(base), config).save_pretrained(lora)
    correction = save_patch(base, tmp_path / "correction")
    write_adapter(lora / "correction", read_adapter(correction))
    by_hand = PeftModel.from_pretrained(load_model(base, correction), lora).merge_and_unload()
    found = load_patched(resolve_base(str(base)), [lora], dtype, torch.device("cpu"))
    by_hand.save_pretrained(tmp_path / "by hand")
    expected = load_base(tmp_path / "by hand", dtype=dtype)
    assert same_weights(found, expected)
    assert torch.equal(logits(found), logits(expected))
