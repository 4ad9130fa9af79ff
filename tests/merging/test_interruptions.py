"""Calls cut off at every write: what is left is whole, or the next call finishes or undoes it."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from safeweights_peft.checkpoint.writer import CheckpointDraft
from safeweights_peft.errors import CheckpointError, MergeError
from safeweights_peft.merging.in_place import merge_in_place, unmerge
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.undo import UNDO_DIR
from tests.merging.cases import Case, assert_same_tensors, slow_merge, tied_layout
from tests.tiny_files import Tensors, load_checkpoint


class Killed(BaseException):
    """The process ends here; nothing catches it."""


class Death:
    """Ends a call at the n-th of its writes, half of which is done; nothing runs after it.

    Writes are what reaches the disk: entries of tensors and files, syncs, renames, removals.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left, self.dead = at, False
        patch_tensor = CheckpointDraft.patch

        def half_a_patch(draft: CheckpointDraft, key: str, indices, entries) -> None:
            half = (len(indices) + 1) // 2
            patch_tensor(draft, key, indices[:half], entries[:half])
            self.count()
            patch_tensor(draft, key, indices[half:], entries[half:])

        monkeypatch.setattr(CheckpointDraft, "patch", half_a_patch)
        self.wrap(monkeypatch, os, "fsync")
        self.wrap(monkeypatch, Path, "rename")
        self.wrap(monkeypatch, Path, "replace")
        self.wrap(monkeypatch, Path, "mkdir")
        self.wrap(monkeypatch, Path, "write_text")
        self.wrap(monkeypatch, os, "unlink")
        self.wrap(monkeypatch, os, "rmdir")
        self.wrap(monkeypatch, shutil, "rmtree")

    def count(self) -> None:
        """Die, if this is the write; a dead process does nothing, so neither do its clean-ups."""
        self.left -= 1
        if self.left < 0:
            self.dead = True
            raise Killed

    def wrap(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: object, **options: object) -> object:
            if self.dead:
                if name == "rmtree":
                    return None  # in a finally, which a killed process never comes to
                raise Killed
            self.count()
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)


def cut_off(call: Callable[[], object], at: int) -> bool:
    """Make a call that ends at its n-th write; tell whether it ended before."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        death = Death(monkeypatch, at)
        try:
            call()
        except Killed:
            return False
        return not death.dead


def every_moment(make: Callable[[int], tuple[Case, Callable[[], object]]]) -> list[Case]:
    """Cut a call off at each of its writes, each time in a case of its own."""
    cases: list[Case] = []
    while True:
        case, call = make(len(cases))
        if cut_off(call, len(cases)):
            return cases
        cases.append(case)


def new_case(root: Path, number: int) -> Case:
    return Case(root / str(number), tied_layout("bfloat16"), head=True, shards=2, density=0.3)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Bases in which a merge was cut off, at each of its writes."""

    def make(number: int) -> tuple[Case, Callable[[], object]]:
        case = new_case(tmp_path, number)
        return case, lambda: merge_in_place(case.base, case.patch)

    return every_moment(make)


def holds(case: Case, expected: Tensors) -> bool:
    found = load_checkpoint(case.base)
    return all(found[key].tobytes() == expected[key].tobytes() for key in expected)


def is_merged(case: Case) -> bool:
    return holds(case, slow_merge(case.tensors, (case.adapter, 1.0)))


def leftovers(case: Case) -> list[str]:
    return [path.name for path in case.base.iterdir() if path.name.startswith(".")]


def test_until_the_journal_is_whole_no_byte_of_a_shard_is_changed(cases: list[Case]) -> None:
    without = [case for case in cases if not (case.base / UNDO_DIR).exists()]
    assert 5 < len(without) < len(cases) - 5
    for case in without:
        assert_same_tensors(load_checkpoint(case.base), case.tensors)


def test_the_same_merge_again_finishes_it(cases: list[Case]) -> None:
    for case in cases:
        merge_in_place(case.base, case.patch)
        assert is_merged(case)
        assert leftovers(case) == []


def test_an_unmerge_undoes_what_a_merge_has_begun(cases: list[Case], tmp_path: Path) -> None:
    whole = new_case(tmp_path, 999).files()
    for case in cases:
        if (case.base / UNDO_DIR).exists():
            unmerge(case.base)
        else:
            with pytest.raises(MergeError, match="found none"):
                unmerge(case.base)
        assert case.files() == whole


def test_an_unfinished_merge_is_no_base_for_anything_else(cases: list[Case]) -> None:
    half = [case for case in cases if not holds(case, case.tensors) and not is_merged(case)]
    assert len(half) >= 4
    for case in half:
        case.add_patch()
        second = case.patch.with_name("second")
        with pytest.raises(MergeError, match=r"found the unfinished merge of .*; unmerge it first"):
            merge_in_place(case.base, second)
        with pytest.raises(CheckpointError, match="found an unfinished merge; run `safeweights un"):
            merge(case.base, second, case.out)
        assert not case.out.exists()


def test_a_merge_that_is_cut_off_again_and_again_is_still_finished_or_undone(
    cases: list[Case], tmp_path: Path
) -> None:
    whole = new_case(tmp_path, 999).files()
    for number, case in enumerate(cases):
        for at in range(number % 7, 20, 7):
            cut_off(lambda here=case: merge_in_place(here.base, here.patch), at)
            if (case.base / UNDO_DIR).exists():
                cut_off(lambda here=case: unmerge(here.base), at)
        merge_in_place(case.base, case.patch)
        assert is_merged(case)
        unmerge(case.base)
        assert case.files() == whole


def test_an_unmerge_that_is_cut_off_is_finished_by_the_next(tmp_path: Path) -> None:
    def make(number: int) -> tuple[Case, Callable[[], object]]:
        case = new_case(tmp_path, number)
        merge_in_place(case.base, case.patch)
        return case, lambda: unmerge(case.base)

    whole = new_case(tmp_path, 999).files()
    cases = every_moment(make)
    assert len(cases) > 8
    for case in cases:
        if (case.base / UNDO_DIR).exists():
            unmerge(case.base)
        else:
            with pytest.raises(MergeError, match="found none"):
                unmerge(case.base)
        assert case.files() == whole


def test_a_merge_elsewhere_that_is_cut_off_leaves_no_model(tmp_path: Path) -> None:
    def make(number: int) -> tuple[Case, Callable[[], object]]:
        case = new_case(tmp_path, number)
        return case, lambda: merge(case.base, case.patch, case.out)

    whole = new_case(tmp_path, 999)
    cases = every_moment(make)
    assert len(cases) > 10
    for case in cases:
        assert case.files() == whole.files()
        if case.out.exists():  # all that was left to do was to bring its parent to the disk
            expected = slow_merge(case.tensors, (case.adapter, 1.0))
            assert_same_tensors(load_checkpoint(case.out), expected)


def test_restored_shards_are_on_the_disk_before_the_journal_goes(tmp_path: Path) -> None:
    case = new_case(tmp_path, 0)
    merge_in_place(case.base, case.patch)
    order: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = sys.modules["safeweights_peft.merging.undo"]
        monkeypatch.setattr(module, "sync", lambda path: order.append(path.name))
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda old, new: [order.append(old.name), rename(old, new)][1]
        )
        unmerge(case.base)
    shards = sorted(path.name for path in case.base.glob("*.safetensors"))
    assert sorted(order[:-2]) == shards
    assert order[-2:] == [UNDO_DIR, "base"]
