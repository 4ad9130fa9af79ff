"""Another encoding of the same adapter: the merged bits, the identity and the checks stay."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.delta import DTYPES, WEIGHT_DTYPES, bits_differ
from safeweights_peft.errors import AlreadyMergedError, BaseMismatchError, FormatError, MergeError
from safeweights_peft.merging.convert import convert
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.merging.in_place import merge_in_place, unmerge
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import verify
from safeweights_peft.patch.groups import Group
from safeweights_peft.patch.io import (
    inspect,
    read_adapter,
    read_artifact,
    read_map,
    read_metadata,
    write_adapter,
    write_map,
)
from safeweights_peft.patch.placement import Coding
from safeweights_peft.patch.records import Encoding, TensorRecord
from safeweights_peft.study.compare import compare
from tests.merging.cases import (
    EXPERTS,
    LAYOUTS,
    UP,
    Case,
    assert_same_tensors,
    plain_layout,
    slow_merge,
)
from tests.tiny_files import (
    as_map,
    dense,
    edit_config,
    edit_tensors,
    grouped_patch,
    load_checkpoint,
    random_checkpoint,
    save_checkpoint,
)


def wide_layout(dtype: str) -> dict[str, TensorRecord]:
    """A matrix that is large enough for every stream to be smaller compact."""
    return {UP: dense(UP, (64, 48), dtype)}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, wide_layout("bfloat16"))


@pytest.fixture
def compact(case: Case) -> Path:
    convert(case.patch, "compact", case.patch.with_name("compact"), case.base)
    return case.patch.with_name("compact")


def codings(path: Path) -> list[Coding]:
    record = read_metadata(path).tensors[UP]
    return [record.stream("indices").coding, record.stream("values").coding]


@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
@pytest.mark.parametrize("values_dtype", list(DTYPES))
@pytest.mark.parametrize("layout", [wide_layout, *LAYOUTS])
def test_a_compact_patch_merges_to_the_same_bits(
    tmp_path: Path,
    layout: Callable[[str], dict[str, TensorRecord]],
    values_dtype: str,
    dtype: str,
) -> None:
    case = Case(tmp_path, layout(dtype), values_dtype=values_dtype, density=0.5)
    compact, again = tmp_path / "compact", tmp_path / "again"
    report = convert(case.patch, "compact", compact, case.base)
    merge(case.base, compact, case.out)
    assert_same_tensors(load_checkpoint(case.out), slow_merge(case.tensors, (case.adapter, 1.0)))
    back = convert(compact, Encoding.PLAIN, again, case.base)
    assert {r.encoding for r in read_metadata(again).tensors.values()} == {Encoding.PLAIN}
    assert back.changed_values == 0
    ids = {read_artifact(path).metadata.content_id for path in (case.patch, compact, again)}
    assert ids == {report.content_id, back.content_id}
    merged = [
        [record.merged_digest for record in read_metadata(path).tensors.values()]
        for path in (case.patch, compact, again)
    ]
    assert merged[0] == merged[1] == merged[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_values_become_steps_where_the_base_is_narrow(tmp_path: Path, dtype: str) -> None:
    case = Case(tmp_path, wide_layout(dtype))
    report = convert(case.patch, "compact", tmp_path / "compact", case.base)
    assert codings(tmp_path / "compact")[1] in (Coding.STEPS8, Coding.STEPS16)
    assert report.after_bytes_per_entry < report.before_bytes_per_entry / 2
    assert report.before_bytes_per_entry > 8
    assert report.before_bytes == inspect(case.patch)["size_bytes"]
    assert report.after_bytes == inspect(tmp_path / "compact")["size_bytes"]
    assert report.changed_values > 0
    assert read_metadata(tmp_path / "compact").needs_base


def test_values_on_the_bases_grid_survive_both_ways(case: Case, tmp_path: Path) -> None:
    convert(case.patch, "compact", tmp_path / "compact", case.base)
    convert(tmp_path / "compact", "plain", tmp_path / "grid", case.base)  # differences, by now
    report = convert(tmp_path / "grid", "compact", tmp_path / "second", case.base)
    assert report.changed_values == 0
    convert(tmp_path / "second", "plain", tmp_path / "again", case.base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "grid" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("values_dtype", list(DTYPES))
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_values_keep_their_bits_without_a_base_or_at_another_scale(
    tmp_path: Path, values_dtype: str, scale: float
) -> None:
    case = Case(tmp_path, wide_layout("bfloat16"), values_dtype=values_dtype, scale=scale)
    base = case.base if scale != 1.0 else None
    report = convert(case.patch, "compact", tmp_path / "compact", base)
    assert (report.changed_values, report.content_id) == (
        0,
        read_metadata(case.patch).content_id,
    )
    assert not read_metadata(tmp_path / "compact").needs_base
    found = read_adapter(tmp_path / "compact").deltas[UP].values
    assert found.tobytes() == case.adapter.deltas[UP].values.tobytes()
    assert report.after_bytes_per_entry < report.before_bytes_per_entry


def test_an_unknown_encoding_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="encoding: expected one of plain, compact, found 'zip'"):
        convert(case.patch, "zip", tmp_path / "out", case.base)


def test_a_map_survives_both_ways(case: Case, tmp_path: Path) -> None:
    safety_map = as_map(case.adapter)
    before = write_map(tmp_path / "map", safety_map)
    report = convert(tmp_path / "map", "compact", tmp_path / "compact")
    found = read_map(tmp_path / "compact")
    assert found.metadata.tensors[UP].stream("scores").coding is Coding.PLANES
    assert found.scores[UP].tobytes() == safety_map.scores[UP].tobytes()
    assert found.indices[UP].tobytes() == safety_map.indices[UP].tobytes()
    assert report.content_id == before.content_id == found.metadata.content_id
    convert(tmp_path / "compact", "plain", tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "map" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_is_not_smaller_stays_plain(tmp_path: Path) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"))
    convert(case.patch, "compact", tmp_path / "compact", case.base)
    assert read_metadata(tmp_path / "compact").tensors["model.norm.weight"].streams == {}


def test_steps_need_their_base(case: Case, compact: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{UP}: expected the base that its values are steps"):
        read_adapter(compact)
    with pytest.raises(FormatError, match="expected the base that its values are steps"):
        convert(compact, "plain", tmp_path / "new-plain")
    case.change_base(lambda tensors: tensors.update({UP: tensors[UP] + tensors[UP]}))
    # By the names that were given, not by those of drafts.
    message = f"{UP}: expected in {case.base} the values with digest [0-9a-f]{{12}} \\("
    for patch, encoding in ((compact, "plain"), (case.patch, "compact")):
        with pytest.raises(BaseMismatchError, match=message) as refused:
            convert(patch, encoding, tmp_path / f"new-{encoding}", case.base)
        assert ".tmp" not in str(refused.value)
    assert not list(tmp_path.glob("new-*"))


def test_the_base_is_read_once(
    case: Case, compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather, read = CheckpointReader.gather_pieces, []

    def count(reader: CheckpointReader, pieces: dict[str, object], *others: object) -> object:
        read.extend(pieces)
        return gather(reader, pieces, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointReader, "gather_pieces", count)
    convert(case.patch, "compact", tmp_path / "again", case.base)
    assert read == [UP]
    convert(compact, "plain", tmp_path / "plain", case.base)
    assert read == [UP, UP]


def test_a_merged_base_is_no_base(case: Case, compact: Path, tmp_path: Path) -> None:
    merge(case.base, case.patch, case.out)
    with pytest.raises(AlreadyMergedError, match=f"{UP}: expected the base's entries, found"):
        read_adapter(compact, partial(gather_entries, CheckpointReader(case.out)))
    with pytest.raises(AlreadyMergedError, match="already merged"):
        merge(case.out, compact, tmp_path / "twice")


def test_steps_that_lead_elsewhere_are_noticed_by_a_merge(case: Case, compact: Path) -> None:
    def forge(config: dict[str, dict[str, dict[str, str]]]) -> None:
        config["tensors"][UP]["merged_digest"] = "sha256:" + "0" * 64

    edit_config(compact, forge)
    with pytest.raises(MergeError, match="contradicts itself"):
        merge(case.base, compact, case.out)


def test_a_compact_patch_is_merged_in_place_and_taken_back(case: Case, compact: Path) -> None:
    files = case.files()
    merge_in_place(case.base, compact)
    merged = case.files()
    merge_in_place(case.base, compact)  # its base is gone, and not needed
    assert case.files() == merged
    unmerge(case.base)
    assert case.files() == files
    merge_in_place(case.base, case.patch)
    assert case.files()["model.safetensors"] == merged["model.safetensors"]


@pytest.mark.parametrize("group", ["row", "column"])
@pytest.mark.parametrize("dtype", list(WEIGHT_DTYPES))
def test_rows_and_columns_become_compact_for_readers_of_format_1_1(
    tmp_path: Path, group: Group, dtype: str
) -> None:
    layout = {**wide_layout(dtype), EXPERTS: dense(EXPERTS, (3, 8, 9), dtype)}
    tensors = random_checkpoint(layout)
    base = save_checkpoint(tmp_path / "base", tensors)
    write_adapter(tmp_path / "patch", grouped_patch(layout, tensors, group))
    report = convert(tmp_path / "patch", "compact", tmp_path / "compact", base)
    records = read_metadata(tmp_path / "compact").tensors.values()
    assert {record.encoding for record in records} == {Encoding.COMPACT}
    assert verify(tmp_path / "compact", base).ok
    back = convert(tmp_path / "compact", "plain", tmp_path / "plain", base)
    records = read_metadata(tmp_path / "plain").tensors.values()
    assert {record.encoding for record in records} == {Encoding(f"{group}s")}
    assert back.content_id == report.content_id


def test_the_same_patch_in_both_encodings_is_given_twice(case: Case, compact: Path) -> None:
    with pytest.raises(MergeError, match="expected different patches, found the content of"):
        merge(case.base, [case.patch, compact], case.out)


def test_other_commands_take_the_compact_form(case: Case, compact: Path) -> None:
    assert verify(compact, case.base).ok
    assert compare([case.patch, compact])["pairs"][0]["iou"] == 1.0
    plain, told = inspect(case.patch), inspect(compact)
    assert told["content_id"] == plain["content_id"] == read_metadata(compact).content_id
    assert told["size_bytes"] < plain["size_bytes"]


def test_a_failed_conversion_leaves_the_old_directory(case: Case, compact: Path) -> None:
    kept = shutil.copytree(compact, compact.with_name("kept"))
    edit_tensors(case.patch, lambda tensors: tensors.popitem())
    with pytest.raises(FormatError):
        convert(case.patch, "compact", compact, case.base, overwrite=True)
    for file in kept.iterdir():
        assert (compact / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(FormatError, match="give --overwrite to replace it"):
        convert(case.patch, "compact", compact, case.base)
    with pytest.raises(FormatError, match="a directory apart from"):
        convert(compact, "plain", compact, case.base, overwrite=True)


def test_a_files_config_is_enough_to_know_its_tensors(compact: Path) -> None:
    config = json.loads((compact / "adapter_config.json").read_text())
    streams = config["tensors"][UP]["streams"]
    assert config["format_minor"] == 2
    assert list(streams) == ["indices", "values"]
    sizes = [sum(stream["bytes"]) for stream in streams.values()]
    data = (compact / "adapter_model.safetensors").read_bytes()
    assert len(data) == 8 + int.from_bytes(data[:8], "little") + sum(sizes)


def test_a_conversion_is_deterministic(case: Case, compact: Path, tmp_path: Path) -> None:
    convert(case.patch, "compact", tmp_path / "other", case.base)
    for file in compact.iterdir():
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()


def test_a_value_may_be_another_number_with_the_same_result(case: Case, compact: Path) -> None:
    base = partial(gather_entries, CheckpointReader(case.base))
    before, after = case.adapter.deltas[UP].values, read_adapter(compact, base).deltas[UP].values
    assert bits_differ(before, after).any()
    assert np.abs(before - after).max() < 2**-9
