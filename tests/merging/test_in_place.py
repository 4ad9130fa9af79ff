"""Merging into a checkpoint where it lies: the same bits, taken back bit for bit, or a refusal."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.delta import WEIGHT_DTYPES
from safeweights_peft.errors import (
    AlreadyMergedError,
    BaseMismatchError,
    CheckpointError,
    MergeError,
)
from safeweights_peft.merging.in_place import merge_in_place, unmerge
from safeweights_peft.merging.merge import merge, plan
from safeweights_peft.merging.undo import UNDO_DIR
from safeweights_peft.merging.verify import verify
from safeweights_peft.patch.io import write_adapter
from safeweights_peft.patch.records import TensorRecord
from tests.merging.cases import LAYOUTS, UP, Case, assert_same_tensors, slow_merge, tied_layout
from tests.tiny_files import Tensors, edit_config, load_checkpoint, random_patch, save_checkpoint


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, tied_layout("bfloat16"), head=True, shards=2, density=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
@pytest.mark.parametrize("window_bytes", [16, 2**25])
def test_a_merge_in_place_is_bitwise_the_obvious_one_and_unmerging_restores_every_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Callable[[str], dict[str, TensorRecord]],
    dtype: str,
    window_bytes: int,
) -> None:
    monkeypatch.setattr("safeweights_peft.checkpoint.reader.WINDOW_BYTES", window_bytes)
    case = Case(tmp_path, layout(dtype), shards=2, scale=0.3, density=0.3)
    before = case.files()
    merge_in_place(case.base, case.patch)
    expected = slow_merge(case.tensors, (case.adapter, 0.3))
    assert_same_tensors(load_checkpoint(case.base), expected)
    unmerge(case.base)
    assert case.files() == before


def test_the_journal_tells_patches_and_no_path(case: Case, tmp_path: Path) -> None:
    report = merge_in_place(case.base, [(case.patch, 0.5)])
    text = (case.base / UNDO_DIR / "journal.json").read_text()
    (patch,) = json.loads(text)["patches"]
    assert (patch["adapter"], patch["scale"]) == ("patch", 0.5)
    assert patch["content_id"] == report.patches[0].content_id
    assert str(tmp_path) not in text


def test_several_patches_merge_in_place_as_they_do_elsewhere(case: Case, tmp_path: Path) -> None:
    case.add_patch(density=0.5)
    patches = [case.patch, (tmp_path / "second", -0.5)]
    apart = merge(case.base, patches, case.out)
    before = case.files()
    here = merge_in_place(case.base, patches)
    assert_same_tensors(load_checkpoint(case.base), load_checkpoint(case.out))
    assert (here.patches, here.overlap, here.tensors, here.entries, here.size_bytes) == (
        *(apart.patches, apart.overlap, apart.tensors, apart.entries, apart.size_bytes),
    )
    assert here.out_dir == str(case.base)
    unmerge(case.base)
    assert case.files() == before


def test_verify_knows_the_merged_and_the_restored_state(case: Case) -> None:
    merge_in_place(case.base, case.patch)
    assert verify(case.patch, case.base).checks[-1].detail.startswith("holds the merged values")
    unmerge(case.base)
    assert verify(case.patch, case.base).ok


def test_a_restored_base_can_be_merged_again(case: Case) -> None:
    for _ in range(2):
        merge_in_place(case.base, case.patch)
        unmerge(case.base)
    merge_in_place(case.base, [(case.patch, 0.5)])
    assert_same_tensors(load_checkpoint(case.base), slow_merge(case.tensors, (case.adapter, 0.5)))


def test_the_report_of_an_unmerge_counts_what_was_restored(case: Case) -> None:
    merged = merge_in_place(case.base, case.patch)
    report = unmerge(case.base)
    head = case.adapter.deltas["model.embed_tokens.weight"].count
    assert (report.directory, report.tensors) == (str(case.base), merged.tensors)
    assert report.entries == merged.entries + head


def test_values_that_change_nothing_are_merged_and_taken_back(case: Case) -> None:
    before = case.files()
    merge_in_place(case.base, [(case.patch, 1e-30)])
    assert_same_tensors(load_checkpoint(case.base), case.tensors)
    unmerge(case.base)
    assert case.files() == before


def test_the_same_merge_again_changes_nothing(case: Case) -> None:
    first = merge_in_place(case.base, case.patch)
    after = case.files()
    again = merge_in_place(case.base, case.patch)
    assert (again.patches, again.tensors, again.entries) == (
        *(first.patches, first.tensors, first.entries),
    )
    assert case.files() == after


def test_a_base_that_was_merged_elsewhere_is_refused(case: Case) -> None:
    merge(case.base, case.patch, case.out)
    with pytest.raises(AlreadyMergedError, match="already merged into it"):
        merge_in_place(case.out, case.patch)
    assert not (case.out / UNDO_DIR).exists()


def test_a_merge_over_another_one_is_refused(case: Case, tmp_path: Path) -> None:
    merge_in_place(case.base, case.patch)
    case.add_patch()
    for other in ([tmp_path / "second"], [(case.patch, 0.5)], [case.patch, tmp_path / "second"]):
        after = case.files()
        with pytest.raises(MergeError, match=r"found the merge of .*patch; unmerge it first"):
            merge_in_place(case.base, other)
        assert case.files() == after


def test_a_checkpoint_without_a_journal_cannot_be_unmerged(case: Case) -> None:
    with pytest.raises(MergeError, match=f"expected the undo journal {UNDO_DIR}, found none"):
        unmerge(case.base)


def test_what_merge_wrote_elsewhere_cannot_be_unmerged(case: Case) -> None:
    merge_in_place(case.base, case.patch)
    unmerge(case.base)
    merge(case.base, case.patch, case.out)
    with pytest.raises(MergeError, match="found none"):
        unmerge(case.out)


def test_a_copy_of_a_checkpoint_merged_in_place_has_no_journal(case: Case, tmp_path: Path) -> None:
    for name, parameter in (("up", UP), ("norm", "model.norm.weight")):
        one = random_patch({parameter: case.records[parameter]}, case.tensors)
        write_adapter(tmp_path / name, one)
    merge_in_place(case.base, tmp_path / "up")
    merge(case.base, tmp_path / "norm", case.out)
    assert not (case.out / UNDO_DIR).exists()
    assert verify(tmp_path / "up", case.out).checks[-1].detail.startswith("holds the merged values")


def change_an_entry(tensors: Tensors, case: Case) -> None:
    tensors[UP].reshape(-1)[int(case.adapter.deltas[UP].indices[0])] = 9


def transpose(tensors: Tensors, case: Case) -> None:
    tensors[UP] = tensors[UP].T.copy()


def rename(tensors: Tensors, case: Case) -> None:
    tensors["other"] = tensors.pop(UP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_an_entry, f"{UP}: expected the entries from before the merge or after it, found"),
        (transpose, f"expected {UP} as it is in .*, found it laid out in another way"),
        (rename, "expected (only tensors of|.* as it is in) .*; do not use this checkpoint"),
    ],
)
def test_a_checkpoint_that_was_changed_since_is_refused_and_left_alone(
    case: Case, change: Callable[[Tensors, Case], None], message: str
) -> None:
    merge_in_place(case.base, case.patch)
    tensors = {key: np.array(tensor) for key, tensor in load_checkpoint(case.base).items()}
    change(tensors, case)
    save_checkpoint(case.base, tensors, shards=2)
    after = case.files()
    for attempt in (unmerge, lambda base: merge_in_place(base, case.patch)):
        with pytest.raises(CheckpointError, match=message):
            attempt(case.base)
    assert case.files() == after


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda journal: journal.update(version=2), "expected version 1, found 2"),
        (lambda journal: journal.update(tensors=[]), "expected tensors and patches"),
        (lambda journal: journal.update(patches=[1]), "expected a description of each patch"),
        (lambda journal: journal["tensors"].update({UP: 3}), "found it laid out in another way"),
        (lambda journal: journal["tensors"][UP].update(offset=0), "found it laid out in another"),
        (lambda journal: journal["tensors"][UP].update(count=-1), "with a count and a start"),
        (lambda journal: journal["tensors"][UP].update(start=True), "with a count and a start"),
        (lambda journal: journal["tensors"][UP].update(start=0), "with digest sha256:"),
        (lambda journal: journal["tensors"][UP].update(count=2**60), "with a count and a start"),
        (lambda journal: journal["tensors"][UP].pop("digest"), "with digest None"),
    ],
)
def test_a_damaged_journal_is_refused_and_nothing_is_changed(
    case: Case, edit: Callable[[dict], object], message: str
) -> None:
    merge_in_place(case.base, case.patch)
    file = case.base / UNDO_DIR / "journal.json"
    journal = json.loads(file.read_text())
    edit(journal)
    file.write_text(json.dumps(journal))
    after = case.files()
    with pytest.raises(CheckpointError, match=message):
        unmerge(case.base)
    assert case.files() == after


@pytest.mark.parametrize("position", [0, -1])
def test_a_damaged_byte_of_the_journals_entries_is_noticed(case: Case, position: int) -> None:
    merge_in_place(case.base, case.patch)
    file = case.base / UNDO_DIR / "entries.bin"
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    after = case.files()
    with pytest.raises(CheckpointError, match=r"expected entries of .* with digest sha256:"):
        unmerge(case.base)
    assert case.files() == after


def as_links(base: Path) -> None:
    for shard in base.glob("*.safetensors"):
        blob = base.parent / f"blob-{shard.name}"
        shard.rename(blob)
        shard.symlink_to(blob)


def as_other_names(base: Path) -> None:
    for shard in base.glob("*.safetensors"):
        os.link(shard, base.parent / f"other-{shard.name}")


@pytest.mark.parametrize("share", [as_links, as_other_names])
def test_shards_that_other_places_share_are_refused(
    case: Case, share: Callable[[Path], None]
) -> None:
    share(case.base)
    before = case.files()
    for attempt in (merge_in_place, lambda base, patch: plan(base, patch, None)):
        with pytest.raises(MergeError, match=r"expected a file of its own, found a link, as in"):
            attempt(case.base, case.patch)
    assert case.files() == before


def test_shards_that_came_to_be_shared_are_not_unmerged(case: Case) -> None:
    merge_in_place(case.base, case.patch)
    as_other_names(case.base)
    after = case.files()
    with pytest.raises(MergeError, match="expected a file of its own"):
        unmerge(case.base)
    assert case.files() == after


def test_shards_that_may_not_be_changed_are_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def guarded(self: Path, mode: str = "r", *rest: object, **options: object):
        if mode == "r+b":
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", guarded)
    before = case.files()
    with pytest.raises(MergeError, match=r"expected a file that may be changed, found .*denied"):
        merge_in_place(case.base, case.patch)
    assert case.files() == before


def test_another_base_is_refused_and_left_alone(case: Case) -> None:
    case.change_base(lambda tensors: change_an_entry(tensors, case))
    for index in case.base.glob("*.index.json"):
        index.unlink()
    before = case.files()
    with pytest.raises(BaseMismatchError, match="digest"):
        merge_in_place(case.base, case.patch)
    assert case.files() == before


def test_a_patch_that_contradicts_itself_is_refused_and_the_base_left_alone(case: Case) -> None:
    lie = "sha256:" + "0" * 64
    edit_config(case.patch, lambda config: config["tensors"][UP].update(merged_digest=lie))
    before = case.files()
    with pytest.raises(MergeError, match=f"expected merged entries with digest {lie}"):
        merge_in_place(case.base, case.patch)
    assert case.files() == before
    assert sorted(path.name for path in case.base.iterdir() if path.name.startswith(".")) == []


def test_an_overlap_can_be_refused_in_place_too(case: Case, tmp_path: Path) -> None:
    case.add_patch(density=0.9)
    before = case.files()
    patches = [case.patch, tmp_path / "second"]
    for attempt in (
        merge_in_place,
        lambda base, adapters, **how: plan(base, adapters, None, **how),
    ):
        with pytest.raises(MergeError, match="expected patches that change different entries"):
            attempt(case.base, patches, on_overlap="error")
    assert case.files() == before


def test_a_plan_in_place_foretells_the_journal(case: Case) -> None:
    planned = plan(case.base, case.patch, None)
    report = merge_in_place(case.base, case.patch)
    assert planned["write_bytes"] == (case.base / UNDO_DIR / "entries.bin").stat().st_size
    assert (planned["tensors"], planned["entries"]) == (report.tensors, report.entries)
