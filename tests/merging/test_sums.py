"""Several patches merged at once: their sum, rounded once, and a report of what they share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.delta import WEIGHT_DTYPES
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, MergeError
from safeweights_peft.merging.merge import merge, plan
from safeweights_peft.patch.io import read_metadata, write_adapter, write_map
from tests.merging.cases import (
    LAYOUTS,
    UP,
    Case,
    assert_same_tensors,
    plain_layout,
    slow_merge,
    tied_layout,
)
from tests.tiny_files import as_map, load_checkpoint, random_patch


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, tied_layout("bfloat16"), head=True, density=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
def test_patches_are_added_up_bitwise_as_entry_by_entry(tmp_path: Path, layout, dtype: str) -> None:
    case = Case(tmp_path, layout(dtype), shards=2, density=0.4, scale=0.3)
    second = case.add_patch(seed=2, density=0.5, values_dtype="bfloat16")
    third = case.add_patch("third", seed=3, density=0.5)
    chosen = [case.patch, (tmp_path / "second", -0.7), (tmp_path / "third", 0.1)]
    merge(case.base, chosen, case.out)
    expected = slow_merge(case.tensors, (case.adapter, 0.3), (second, -0.7), (third, 0.1))
    assert_same_tensors(load_checkpoint(case.out), expected)


def test_the_order_given_is_the_order_of_the_sum(case: Case, tmp_path: Path) -> None:
    second = case.add_patch(density=0.9)
    merge(case.base, [tmp_path / "second", case.patch], case.out)
    expected = slow_merge(case.tensors, (second, 1.0), (case.adapter, 1.0))
    assert_same_tensors(load_checkpoint(case.out), expected)


def test_a_patch_of_one_parameter_goes_with_a_patch_of_another(case: Case, tmp_path: Path) -> None:
    only = {name: record for name, record in case.records.items() if name != UP}
    write_adapter(case.patch, random_patch(only, case.tensors), overwrite=True)
    write_adapter(tmp_path / "other", random_patch({UP: case.records[UP]}, case.tensors))
    report = merge(case.base, [case.patch, tmp_path / "other"], case.out)
    assert report.overlap == ()
    assert report.tensors == 4
    assert report.entries == sum(patch.entries for patch in report.patches)


def test_shared_entries_are_counted_for_every_two_patches_and_every_parameter(
    case: Case, tmp_path: Path
) -> None:
    adapters = [case.adapter, case.add_patch(density=0.5), case.add_patch("third", 3, density=0.5)]
    paths = [case.patch, tmp_path / "second", tmp_path / "third"]
    report = merge(case.base, paths, case.out)
    found = {(part.left, part.right, part.tensor): part.entries for part in report.overlap}
    expected = {}
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for name in case.records:
            shared = set(adapters[i].indices[name].tolist()) & set(
                adapters[j].indices[name].tolist()
            )
            if shared:
                expected[str(paths[i]), str(paths[j]), name] = len(shared)
    assert found == expected
    assert plan(case.base, paths, case.out)["overlap"] == [vars(part) for part in report.overlap]


def test_entries_of_several_patches_are_counted_once(case: Case, tmp_path: Path) -> None:
    second = case.add_patch(density=0.5)
    report = merge(case.base, [case.patch, tmp_path / "second"], case.out)
    both = [
        set(case.adapter.indices[name].tolist()) | set(second.indices[name].tolist())
        for name in case.records
    ]
    assert report.entries == sum(map(len, both))


def test_an_overlap_can_be_refused_by_name(case: Case, tmp_path: Path) -> None:
    case.add_patch(density=0.9)
    with pytest.raises(MergeError, match=r"^model\..*: expected patches that change different"):
        merge(case.base, [case.patch, tmp_path / "second"], case.out, on_overlap="error")
    assert not case.out.exists()


def test_patches_without_an_overlap_pass_where_it_is_refused(case: Case, tmp_path: Path) -> None:
    write_adapter(case.patch, random_patch({UP: case.records[UP]}, case.tensors), overwrite=True)
    norm = {"model.norm.weight": case.records["model.norm.weight"]}
    write_adapter(tmp_path / "norm", random_patch(norm, case.tensors))
    assert (
        merge(case.base, [case.patch, tmp_path / "norm"], case.out, on_overlap="error").tensors == 2
    )


def test_another_word_for_what_to_do_about_overlap_is_refused(case: Case) -> None:
    with pytest.raises(MergeError, match="on_overlap: expected one of add, error, found 'Error'"):
        merge(case.base, case.patch, case.out, on_overlap="Error")  # type: ignore[arg-type]


def test_no_patch_is_refused(case: Case) -> None:
    with pytest.raises(MergeError, match=r"^adapters: expected at least one patch, found none"):
        merge(case.base, [], case.out)


def test_the_same_patch_twice_is_refused(case: Case, tmp_path: Path) -> None:
    write_adapter(tmp_path / "copy", case.adapter)
    with pytest.raises(MergeError, match="expected different patches, found the content of"):
        merge(case.base, [case.patch, (tmp_path / "copy", 0.5)], case.out)


def test_a_map_among_patches_is_refused(case: Case, tmp_path: Path) -> None:
    write_map(tmp_path / "map", as_map(case.adapter))
    with pytest.raises(MergeError, match=r"map: expected a safety patch, found a safety map"):
        merge(case.base, [case.patch, tmp_path / "map"], case.out)


def test_a_patch_of_another_base_is_refused(case: Case, tmp_path: Path) -> None:
    foreign = {key: np.asarray(-tensor) for key, tensor in case.tensors.items()}
    write_adapter(tmp_path / "foreign", random_patch(case.records, foreign, seed=4))
    with pytest.raises(BaseMismatchError, match="digest"):
        merge(case.base, [case.patch, tmp_path / "foreign"], case.out)
    assert not case.out.exists()


def test_a_base_that_holds_one_of_the_patches_is_refused(case: Case, tmp_path: Path) -> None:
    write_adapter(case.patch, random_patch({UP: case.records[UP]}, case.tensors), overwrite=True)
    norm = {"model.norm.weight": case.records["model.norm.weight"]}
    write_adapter(tmp_path / "norm", random_patch(norm, case.tensors))
    merge(case.base, tmp_path / "norm", case.out)
    with pytest.raises(AlreadyMergedError, match=r"found the values of .*norm already merged"):
        merge(case.out, [case.patch, tmp_path / "norm"], tmp_path / "again")


def test_two_layouts_of_one_tensor_are_refused_by_key(case: Case, tmp_path: Path) -> None:
    untied = replace(case.records["model.embed_tokens.weight"], tied_keys=())
    odd = random_patch({"model.other.weight": untied}, case.tensors)
    write_adapter(tmp_path / "odd", odd)
    with pytest.raises(MergeError, match=r"^model.embed_tokens.weight: expected one parameter and"):
        merge(case.base, [case.patch, tmp_path / "odd"], case.out)


def test_the_report_names_each_patch_by_its_content(case: Case, tmp_path: Path) -> None:
    case.add_patch()
    report = merge(case.base, [case.patch, (tmp_path / "second", 0.5)], case.out)
    for patch, path, scale in zip(
        report.patches, (case.patch, tmp_path / "second"), (1.0, 0.5), strict=True
    ):
        assert (patch.adapter, patch.scale) == (str(path), scale)
        assert patch.content_id == read_metadata(path).content_id
    assert report.patches[0].content_id != report.patches[1].content_id


def test_the_card_says_what_was_merged_onto_what(case: Case, tmp_path: Path) -> None:
    case.add_patch(density=0.9)
    report = merge(case.base, [case.patch, (tmp_path / "second", 0.5)], case.out)
    card = (case.out / "README.md").read_text()
    assert "base_model: someone/tiny\n" in card
    assert "commit 0123abc" in card
    first, second = report.patches
    assert f"| patch | `{first.content_id}` | 1 | {first.entries} |" in card
    assert f"| second | `{second.content_id}` | 0.5 | {second.entries} |" in card
    assert f"{sum(part.entries for part in report.overlap)} entries are changed by two" in card


def test_the_card_tells_no_path(tmp_path: Path) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"))
    local = replace(case.adapter.metadata, base_model_name_or_path=str(case.base), revision=None)
    write_adapter(case.patch, replace(case.adapter, metadata=local), overwrite=True)
    merge(case.base, case.patch, case.out)
    card = (case.out / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "base_model:" not in card
    assert "# base with safety patches" in card


def test_a_name_in_the_card_is_text_and_nothing_else(tmp_path: Path) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"))
    evil = "a\nlicense: mit\n---\n<script>|`x`"
    named = replace(case.adapter.metadata, base_model_name_or_path=evil)
    write_adapter(case.patch, replace(case.adapter, metadata=named), overwrite=True)
    merge(case.base, case.patch, case.out)
    card = (case.out / "README.md").read_text()
    assert "license: mit" not in card.splitlines()
    assert "<script>" not in card
    assert card.splitlines().count("---") == 2
