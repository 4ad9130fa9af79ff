"""From two models to a patch: bit for bit, or a refusal, or a true account of what is lost."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from safeweights_peft.delta import Array
from safeweights_peft.errors import BaseMismatchError, MergeError
from safeweights_peft.fetching import resolve_base
from safeweights_peft.jobs.diff import diff
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import Verdict, verify
from safeweights_peft.modeling.loading import load_model
from safeweights_peft.patch.io import read_adapter, write_adapter, write_map
from tests.tiny_files import Tensors, as_map, copy_checkpoint, load_checkpoint
from tests.tiny_jobs import Recorder
from tests.tuner.patches import load_base, same_weights, save_patch
from tests.zoo.architectures import save_checkpoint

BASES = ["tiny_llama", "tiny_llama_bf16", "tiny_tied_llama", "tiny_mixtral", "tiny_qwen3_moe"]
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"

Edit = Callable[[Tensors], object]


@pytest.fixture
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(getattr(request, "param", "tiny_llama_bf16"))


def move(share: float) -> Edit:
    """Moves a share of all entries by a little, as fine-tuning does."""

    def edit(tensors: Tensors) -> None:
        random = np.random.default_rng(0)
        for key, tensor in tensors.items():
            moved = random.random(tensor.shape) < share
            step = np.where(moved, 0.01 * random.standard_normal(tensor.shape), 0)
            # What float32 training makes: a sum that float32 holds.
            tensors[key] = (tensor.astype(np.float32) + step.astype(np.float32)).astype(
                tensor.dtype
            )

    return edit


def put(key: str, values: dict[int, float]) -> Edit:
    """Sets a few entries of one tensor."""

    def edit(tensors: Tensors) -> None:
        for at, value in values.items():
            tensors[key].reshape(-1)[at] = value

    return edit


def both(first: Edit, second: Edit) -> Edit:
    return lambda tensors: (first(tensors), second(tensors))


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    left, right = load_checkpoint(found), load_checkpoint(expected)
    assert left.keys() == right.keys()
    assert [key for key in left if left[key].tobytes() != right[key].tobytes()] == []


def changes(base: Path, tuned: Path) -> dict[str, Array]:
    """The slow twin: how far each entry of dense models has moved, in float64."""
    before, after = load_checkpoint(base), load_checkpoint(tuned)
    return {key: after[key].astype(float) - before[key].astype(float) for key in before}


@pytest.mark.parametrize("base", BASES, indirect=True)
@pytest.mark.parametrize("share", [0.01, 1])
def test_a_merged_diff_is_the_tuned_checkpoint(base: Path, share: float, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(share))
    report = diff(Job(base), str(tuned), tmp_path / "patch")
    merge(base, tmp_path / "patch", tmp_path / "merged")
    assert_same_checkpoint(tmp_path / "merged", tuned)
    assert report["changed_entries"] == report["entries"] > 0
    assert (report["lost_entries"], report["lost_share"]) == (0, 0)


@pytest.mark.parametrize("base", ["tiny_tied_llama", "tiny_mixtral"], indirect=True)
def test_peft_makes_the_tuned_model_of_the_base_with_it(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.1))
    diff(Job(base), str(tuned), tmp_path / "patch")
    found = PeftModel.from_pretrained(load_base(base), tmp_path / "patch").merge_and_unload()
    assert same_weights(found, load_base(tuned))


def test_only_what_changed_is_in_it(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", put(UP, {3: 1, 5: -1}))
    report = diff(Job(base), str(tuned), tmp_path / "patch")
    adapter = read_adapter(tmp_path / "patch")
    assert {name: each.tolist() for name, each in adapter.indices.items()} == {UP: [3, 5]}
    assert (report["parameters"], report["entries"], report["changed_entries"]) == (1, 2, 2)
    assert adapter.metadata.base_model_name_or_path == str(base)
    assert adapter.metadata.selection["tuned"] == str(tuned)


def with_extra(tensors: Tensors) -> None:
    """Adds a layer for predicting several tokens, which transformers neither loads nor saves."""
    tensors["mtp.fc.weight"] = tensors[UP].copy()


def test_what_transformers_does_not_save_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    before = copy_checkpoint(base, tmp_path / "before", with_extra)
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.1))
    report = diff(Job(before), str(tuned), tmp_path / "patch")
    assert report["only_in_base"] == ["mtp.fc.weight"]
    merge(before, tmp_path / "patch", tmp_path / "merged")
    merged = load_checkpoint(tmp_path / "merged")
    assert np.array_equal(merged.pop("mtp.fc.weight"), load_checkpoint(base)[UP])
    after = load_checkpoint(tuned)
    assert merged.keys() == after.keys()
    assert [key for key in after if not np.array_equal(merged[key], after[key])] == []


def test_what_no_parameter_holds_may_not_have_changed(base: Path, tmp_path: Path) -> None:
    before = copy_checkpoint(base, tmp_path / "before", with_extra)
    tuned = copy_checkpoint(before, tmp_path / "tuned", put("mtp.fc.weight", {0: 9}))
    with pytest.raises(MergeError, match=r"mtp.fc.weight: .* a part that transformers doesn't"):
        diff(Job(before), str(tuned), tmp_path / "patch")


def test_a_parameter_that_the_tuned_model_lacks_is_refused(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", lambda tensors: tensors.pop(UP))
    with pytest.raises(MergeError, match=f"{UP}: expected it in {tuned}"):
        diff(Job(base), str(tuned), tmp_path / "patch")


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")  # of Llama 4's eyes
@pytest.mark.parametrize("architecture", ["llama4", "mllama"])
def test_a_text_tower_that_was_saved_by_itself_is_compared_with_that_of_the_model(
    architecture: str, tmp_path: Path
) -> None:
    base, tuned, patch = (tmp_path / name for name in ("base", "tuned", "patch"))
    save_checkpoint(architecture, base)
    model = load_model(resolve_base(str(base)))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.view(-1)[:3] = torch.randn(min(3, parameter.numel()))
    model.save_pretrained(tuned)
    stored, saved = load_checkpoint(base), load_checkpoint(tuned)
    eyes = {key for key in stored if "vision" in key or "projector" in key}
    assert eyes
    assert not stored.keys() & saved.keys()
    report = diff(Job(str(base)), str(tuned), patch)
    assert set(report["only_in_base"]) == eyes
    assert report["parameters"] == len(stored) - len(eyes)
    merge(base, patch, tmp_path / "merged")
    merged = load_model(resolve_base(str(tmp_path / "merged")))
    assert same_weights(merged, model)
    after = load_checkpoint(tmp_path / "merged")
    assert all(np.array_equal(after[key], stored[key]) for key in eyes)


@pytest.mark.parametrize("base", ["tiny_tied_llama"], indirect=True)
def test_a_saved_copy_of_a_tied_tensor_follows_it(base: Path, tmp_path: Path) -> None:
    def copy_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    before = copy_checkpoint(base, tmp_path / "before", copy_head)
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.1))
    assert diff(Job(before), str(tuned), tmp_path / "patch")["only_in_base"] == []
    merge(before, tmp_path / "patch", tmp_path / "merged")
    expected = copy_checkpoint(tuned, tmp_path / "expected", copy_head)
    assert_same_checkpoint(tmp_path / "merged", expected)


def test_a_zero_that_changed_its_sign_is_a_change(base: Path, tmp_path: Path) -> None:
    before = copy_checkpoint(base, tmp_path / "before", put(UP, {0: 0.0, 1: -0.0}))
    tuned = copy_checkpoint(base, tmp_path / "tuned", put(UP, {0: -0.0, 1: 0.0}))
    assert diff(Job(before), str(tuned), tmp_path / "patch")["entries"] == 2
    merge(before, tmp_path / "patch", tmp_path / "merged")
    assert_same_checkpoint(tmp_path / "merged", tuned)


def test_both_copies_of_a_tied_head_may_be_on_disk(tiny_tied_llama: Path, tmp_path: Path) -> None:
    embeddings = "model.embed_tokens.weight"

    def add_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[embeddings]

    base = copy_checkpoint(tiny_tied_llama, tmp_path / "base", add_head)
    tuned = copy_checkpoint(base, tmp_path / "tuned", both(put(embeddings, {7: 2}), add_head))
    diff(Job(base), str(tuned), tmp_path / "patch")
    merge(base, tmp_path / "patch", tmp_path / "merged")
    assert_same_checkpoint(tmp_path / "merged", tuned)
    untied = copy_checkpoint(base, tmp_path / "untied", put(embeddings, {7: 2}))
    with pytest.raises(MergeError, match=rf"^{embeddings}: expected lm_head.weight in .* a copy"):
        diff(Job(base), str(untied), tmp_path / "other")


def test_a_density_keeps_the_largest_changes_and_tells_what_is_lost(
    base: Path, tmp_path: Path
) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.5))
    report = diff(Job(base), str(tuned), tmp_path / "patch", density=0.01)
    moved = changes(base, tuned)
    sizes = [(-abs(size), key, at) for key in moved for at, size in enumerate(moved[key].flat)]
    most = sorted(sizes)[: round(0.01 * len(sizes))]
    kept = [(key, at) for _, key, at in most]
    adapter = read_adapter(tmp_path / "patch")
    assert sorted(kept) == [(k, i) for k, each in sorted(adapter.indices.items()) for i in each]
    lost = sorted(sizes)[len(kept) :]
    assert report["lost_entries"] == sum(size < 0 for size, *_ in lost)
    assert report["changed_entries"] == report["lost_entries"] + len(kept)
    square = sum(size**2 for size, *_ in sizes)
    assert report["lost_share"] == pytest.approx(sum(size**2 for size, *_ in lost) / square)


def test_what_is_kept_gets_the_tuned_bits(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.5))
    diff(Job(base), str(tuned), tmp_path / "patch", density=0.1)
    assert verify(tmp_path / "patch", base).ok
    assert verify(tmp_path / "patch", None, tuned).verdict is Verdict.UNKNOWN  # but not failed


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_llama_bf16"], indirect=True)
def test_a_density_of_one_keeps_all_and_loses_nothing(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.1))
    report = diff(Job(base), str(tuned), tmp_path / "patch", density=1)
    assert (report["lost_entries"], report["lost_share"]) == (0, 0)
    merge(base, tmp_path / "patch", tmp_path / "merged")
    assert_same_checkpoint(tmp_path / "merged", tuned)


def test_an_entry_that_no_value_leads_to_is_refused_by_name_and_nothing_is_written(
    base: Path, tmp_path: Path
) -> None:
    before = copy_checkpoint(base, tmp_path / "before", put(UP, {4: 1, 9: 1}))
    tuned = copy_checkpoint(base, tmp_path / "tuned", put(UP, {4: 1e-30, 9: 2}))
    (tmp_path / "out").mkdir()
    message = rf"^{UP}: .* found 1 of 2 changed ones .*, the first at index 4 from 1.* --density 1,"
    with pytest.raises(MergeError, match=message):
        diff(Job(before), str(tuned), tmp_path / "out" / "patch")
    assert list((tmp_path / "out").iterdir()) == []


def test_with_a_density_such_an_entry_gets_the_nearest_value_and_counts_as_lost(
    base: Path, tmp_path: Path
) -> None:
    before = copy_checkpoint(base, tmp_path / "before", put(UP, {4: 1, 9: 1}))
    tuned = copy_checkpoint(before, tmp_path / "tuned", put(UP, {4: 1e-30, 9: 2}))
    report = diff(Job(before), str(tuned), tmp_path / "patch", density=1)
    assert (report["entries"], report["lost_entries"]) == (2, 1)
    assert 0 < report["lost_share"] < 1e-50
    merge(before, tmp_path / "patch", tmp_path / "merged")
    assert load_checkpoint(tmp_path / "merged")[UP].reshape(-1)[[4, 9]].tolist() == [0, 2]


def map_of(base: Path, root: Path) -> tuple[Path, Array]:
    """Makes a safety map of random entries of one tensor of a base; tells which they are."""
    safety_map = as_map(read_adapter(save_patch(base, root / "for-map", names=[UP])))
    write_map(root / "map", safety_map)
    return root / "map", safety_map.indices[UP]


def test_a_map_restricts_it(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.5))
    safety_map, chosen = map_of(base, tmp_path)
    report = diff(Job(base), str(tuned), tmp_path / "patch", map_dir=safety_map)
    moved = np.flatnonzero(changes(base, tuned)[UP])
    adapter = read_adapter(tmp_path / "patch")
    assert adapter.indices.keys() == {UP}
    assert adapter.indices[UP].tolist() == sorted(set(chosen.tolist()) & set(moved.tolist()))
    assert report["lost_entries"] == report["changed_entries"] - report["entries"]


def test_a_density_chooses_among_the_maps_entries(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", both(move(1), put(DOWN, {0: 99})))
    safety_map, chosen = map_of(base, tmp_path)
    diff(Job(base), str(tuned), tmp_path / "patch", density=0.0005, map_dir=safety_map)
    sizes = np.abs(changes(base, tuned)[UP].reshape(-1)[chosen])
    total = sum(each.size for each in load_checkpoint(base).values())
    best = np.argsort(-sizes, kind="stable")[: round(0.0005 * total)]
    assert read_adapter(tmp_path / "patch").indices[UP].tolist() == sorted(chosen[best].tolist())


def test_a_map_of_another_base_is_refused(base: Path, tiny_llama: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.5))
    safety_map, _ = map_of(tiny_llama, tmp_path)
    with pytest.raises(BaseMismatchError, match=rf"^{UP}: expected"):
        diff(Job(base), str(tuned), tmp_path / "patch", map_dir=safety_map)


def widen(tensors: Tensors) -> None:
    tensors[UP] = np.concatenate([tensors[UP], tensors[UP]])


def retype(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].astype(np.float32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(UP), rf"^{UP}: expected it in .*tuned as in .*, found no such tensor"),
        (lambda t: t.update(new=t[UP]), r"^new: expected it in .*, found no such tensor"),
        (widen, rf"^{UP}: expected bfloat16 \[48, 32\] in .*, found bfloat16 \[96, 32\]"),
        (retype, rf"^{UP}: expected bfloat16 .*, found float32 .*saved in its dtype"),
        (put(UP, {2: np.nan}), rf"^{UP}: expected finite numbers .*, found nan at index 2 in"),
        (put(UP, {2: np.inf}), rf"^{UP}: expected finite numbers .*, found inf at index 2 in"),
        (lambda _: None, r"expected entries that differ from .*, found none"),
    ],
    ids=["missing", "new", "shape", "dtype", "NaN", "infinity", "the same"],
)
@pytest.mark.parametrize("density", [None, 0.5])
def test_what_is_no_tuned_copy_of_the_base_is_refused(
    density: float | None, edit: Edit, message: str, base: Path, tmp_path: Path
) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", edit)
    with pytest.raises(MergeError, match=message):
        diff(Job(base), str(tuned), tmp_path / "patch", density=density)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned"]


def test_a_nan_that_both_models_have_is_no_change(base: Path, tmp_path: Path) -> None:
    before = copy_checkpoint(base, tmp_path / "before", put(UP, {2: np.nan}))
    tuned = copy_checkpoint(before, tmp_path / "tuned", put(UP, {3: 1}))
    assert diff(Job(before), str(tuned), tmp_path / "patch")["entries"] == 1


def test_a_tensor_that_is_no_parameter_may_not_change(base: Path, tmp_path: Path) -> None:
    before = copy_checkpoint(base, tmp_path / "before", lambda t: t.update(steps=np.arange(3)))
    tuned = copy_checkpoint(base, tmp_path / "tuned", lambda t: t.update(steps=np.arange(3) * 2))
    with pytest.raises(MergeError, match=r"^steps: expected a parameter where the checkpoints"):
        diff(Job(before), str(tuned), tmp_path / "patch")


def test_a_patch_that_is_not_what_was_asked_for_is_never_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", put(UP, {3: 1}))
    other = copy_checkpoint(base, tmp_path / "other", put(UP, {3: 2}))
    diff(Job(base), str(other), tmp_path / "wrong")
    wrong = read_adapter(tmp_path / "wrong")
    monkeypatch.setattr(
        "safeweights_peft.jobs.diff.write_adapter",
        lambda path, _: write_adapter(path, wrong),
    )
    with pytest.raises(
        MergeError, match="expected 0 entries that the written patch misses, found 1"
    ):
        diff(Job(base), str(tuned), tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_an_existing_result_is_replaced_only_when_asked(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", put(UP, {3: 1}))
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "old").write_text("old")
    with pytest.raises(MergeError, match="give --overwrite to replace it"):
        diff(Job(base), str(tuned), tmp_path / "patch")
    diff(Job(base), str(tuned), tmp_path / "patch", overwrite=True)
    assert not (tmp_path / "patch" / "old").exists()


def test_the_inputs_are_never_replaced(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", put(UP, {3: 1}))
    with pytest.raises(MergeError, match="expected a directory apart from the tuned model"):
        diff(Job(base), str(tuned), tuned, overwrite=True)


def test_progress_tells_of_each_parameter_that_changed(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", both(put(UP, {3: 1}), put(DOWN, {3: 1})))
    told = Recorder()
    diff(Job(base, progress=told), str(tuned), tmp_path / "patch", density=1)
    assert told.tasks == [["Ranking changes", 2, 2], ["Writing down changes", 2, 2]]


def test_two_runs_write_the_same_bytes(base: Path, tmp_path: Path) -> None:
    tuned = copy_checkpoint(base, tmp_path / "tuned", move(0.1))
    for name in ("one", "two"):
        diff(Job(base), str(tuned), tmp_path / name, density=0.05)
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
