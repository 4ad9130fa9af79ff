"""What can be wrong with an adapter, a base or a merged model is found, and called by its name."""

import filecmp
import json
import re
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.delta import digest
from safeweights_peft.errors import MergeError
from safeweights_peft.merging.in_place import merge_in_place
from safeweights_peft.merging.merge import merge
from safeweights_peft.merging.verify import Verdict, VerifyReport, verify
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import read_adapter, read_metadata, write_adapter, write_map
from safeweights_peft.patch.records import TensorRecord
from tests.merging.cases import (
    EMBEDDINGS,
    LAYOUTS,
    UP,
    Case,
    count_work,
    plain_layout,
    tied_layout,
)
from tests.tiny_files import (
    Tensors,
    as_map,
    edit_config,
    edit_tensors,
    load_checkpoint,
    save_checkpoint,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A base in one file, a patch, and the merged model."""
    case = Case(tmp_path, plain_layout("bfloat16"))
    merge(case.base, case.patch, case.out)
    return case


def verify_all(case: Case) -> VerifyReport:
    return verify(case.patch, case.base, case.out)


def change(path: Path, edit: Callable[[Tensors], object], shards: int = 1) -> None:
    """Change the tensors of a checkpoint in place."""
    tensors = {key: np.array(value) for key, value in load_checkpoint(path).items()}
    edit(tensors)
    side_files = {file: file.read_bytes() for file in path.iterdir() if file.suffix != ""}
    for shard in path.glob("*.safetensors*"):
        shard.unlink()
    save_checkpoint(path, tensors, shards)
    for file, content in side_files.items():
        if ".safetensors" not in file.name:
            file.write_bytes(content)


def touched(case: Case) -> int:
    return int(case.adapter.deltas[UP].indices[0])


def untouched(case: Case) -> int:
    indices = set(case.adapter.deltas[UP].indices.tolist())
    return next(index for index in range(72) if index not in indices)


def flip(tensor: np.ndarray, index: int) -> None:
    """Turn over the lowest bit of one entry."""
    tensor.reshape(-1).view(f"u{tensor.dtype.itemsize}")[index] ^= 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_a_merged_model_of_every_layout_is_verified(
    layout: Callable[[str], dict[str, TensorRecord]], dtype: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, layout(dtype), shards=2, head=layout is tied_layout)
    merge(case.base, case.patch, case.out)
    report = verify_all(case)
    assert report.verdict is Verdict.VERIFIED, report
    names = ["config", "tensors", "base", "result", "layout", "weights", "files"]
    assert [check.name for check in report.checks] == names
    assert report.content_id == read_metadata(case.patch).content_id


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_may_be_cut_in_another_way(shards: int, case: Case) -> None:
    change(case.out, lambda tensors: None, shards)
    assert verify_all(case).ok


def test_a_model_that_was_merged_in_place_is_verified(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.base, tmp_path / "here")
    merge_in_place(tmp_path / "here", case.patch)
    assert verify(case.patch, case.base, tmp_path / "here").ok


def swap(tensors: Tensors) -> None:
    tensors["untouched.weight"] = np.flip(tensors["untouched.weight"]).copy()


def reshape(tensors: Tensors) -> None:
    tensors["untouched.weight"] = tensors["untouched.weight"].reshape(5, 3)


def widen(tensors: Tensors) -> None:
    tensors[UP] = tensors[UP].astype(np.float32)


def add(tensors: Tensors) -> None:
    tensors["another.weight"] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("edit", "check", "complaint"),
    [
        (lambda t, case: flip(t[UP], touched(case)), "weights", "expected in .* the merged "),
        (lambda t, case: flip(t[UP], untouched(case)), "weights", "expected in .* the base's "),
        (lambda t, _: flip(t["untouched.weight"], 14), "weights", "index 14, found .*1 of its"),
        (lambda t, _: swap(t), "weights", "untouched.weight: "),
        (lambda t, _: add(t), "layout", "found it with 'another.weight'"),
        (lambda t, _: t.pop("untouched.weight"), "layout", "found it without 'untouched.weight'"),
        (lambda t, _: reshape(t), "layout", r"float32 \[3, 5\] .* found float32 \[5, 3\]"),
        (lambda t, _: widen(t), "layout", "bfloat16 .* found float32"),
    ],
    ids=["touched entry", "entry beside it", "bit", "order", "extra", "missing", "shape", "dtype"],
)
def test_one_change_of_a_merged_model_fails(
    edit: Callable[[Tensors, Case], object], check: str, complaint: str, case: Case
) -> None:
    change(case.out, lambda tensors: edit(tensors, case))
    report = verify_all(case)
    assert report.verdict is Verdict.FAILED
    assert report.checks[-1].name == check
    assert re.search(complaint, report.checks[-1].detail)


def test_a_zero_of_the_other_sign_fails(tmp_path: Path) -> None:
    case = Case(tmp_path, plain_layout("float32"))
    case.change_base(lambda tensors: tensors.update(zero=np.zeros(2, np.float32)))
    merge(case.base, case.patch, case.out)
    change(case.out, lambda tensors: tensors.update(zero=-tensors["zero"]))
    assert verify_all(case).checks[-1].name == "weights"


def test_the_base_itself_is_not_the_merged_model(case: Case) -> None:
    report = verify(case.patch, case.base, case.base)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "weights")


def test_base_and_merged_model_given_for_each_other_fail(case: Case) -> None:
    report = verify(case.patch, case.out, case.base)
    assert report.verdict is Verdict.FAILED
    assert (
        "expected the base with the safety patch merged in, found it without"
        in report.checks[-1].detail
    )


@pytest.mark.parametrize(
    "patches", [[("second", 1)], [("patch", 1), ("second", 1)], [("patch", 0.5)]]
)
def test_another_adapter_or_scale_or_one_more_fails(
    patches: list[tuple[str, float]], case: Case
) -> None:
    case.add_patch()
    chosen = [(case.patch.with_name(name), scale) for name, scale in patches]
    merge(case.base, chosen, case.out, overwrite=True)
    report = verify_all(case)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "weights")


def test_the_base_of_one_and_the_other_entries_of_another_fail(case: Case) -> None:
    """The digests cover the adapter's entries alone; the rest is compared entry by entry."""
    case.change_base(lambda tensors: flip(tensors["untouched.weight"], 0))
    assert verify(case.patch, case.base).ok
    report = verify_all(case)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "weights")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", '{"rope_theta": 1}', "config.json changed in 'rope_theta'"),
        ("tokenizer.json", '{"a": 1, "b": true}', "tokenizer.json changed in 'a', 'b'"),
        ("chat_template.jinja", "{{ other }}", "chat_template.jinja changed"),
        ("chat_template.jinja", None, "chat_template.jinja missing"),
        ("modeling_other.py", "", "modeling_other.py added"),
        ("adapter_config.json", "{}", "adapter_config.json added"),
        ("config.json", "{", "config.json: expected JSON"),
    ],
)
def test_another_file_that_loading_reads_fails(
    name: str, content: str | None, complaint: str, case: Case
) -> None:
    if content is None:
        (case.out / name).unlink()
    else:
        (case.out / name).write_text(content)
    report = verify_all(case)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "files")
    assert complaint in report.checks[-1].detail


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{\n"transformers_version": "9", "_name_or_path": "/home"}\n'),
        ("README.md", "# Another card"),
        ("LICENSE", "not free"),
        ("run.log", "done"),
    ],
)
def test_a_file_that_changes_nothing_may_differ(name: str, content: str, case: Case) -> None:
    (case.out / name).write_text(content)
    assert verify_all(case).ok


def test_a_number_that_only_python_thinks_equal_is_a_change(case: Case) -> None:
    (case.base / "config.json").write_text('{"tie": 1}')
    (case.out / "config.json").write_text('{"tie": true}')
    assert "changed in 'tie'" in verify_all(case).checks[-1].detail


def test_a_tensor_that_hides_from_the_index_fails(case: Case) -> None:
    change(case.out, add, shards=2)
    index = case.out / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["another.weight"]
    index.write_text(json.dumps(content))
    report = verify_all(case)
    assert report.verdict is Verdict.FAILED
    assert "found it with 'another.weight'" in report.checks[-1].detail


@pytest.mark.parametrize("head", [True, False])
def test_a_tied_copy_may_be_saved_or_not(head: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"), head=head)
    merge(case.base, case.patch, case.out)

    def toggle(tensors: Tensors) -> None:
        if head:
            del tensors["lm_head.weight"]
        else:
            tensors["lm_head.weight"] = tensors[EMBEDDINGS].copy()

    change(case.out, toggle)
    assert verify_all(case).ok


@pytest.mark.parametrize("head", [True, False])
def test_a_tied_copy_that_is_no_copy_fails(head: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"), head=head)
    merge(case.base, case.patch, case.out)

    def untie(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDINGS].copy()
        flip(tensors["lm_head.weight"], 80)

    change(case.out, untie)
    report = verify_all(case)
    assert report.verdict is Verdict.FAILED
    assert report.checks[-1].detail.startswith("lm_head.weight: ")


def test_an_adapter_that_calls_two_tensors_tied_hides_neither(tmp_path: Path) -> None:
    """Where it changes them they may agree; elsewhere they don't."""
    case = Case(tmp_path, plain_layout("bfloat16"))
    case.change_base(lambda tensors: tensors.update(other=tensors[UP].copy()))
    case.change_base(lambda tensors: flip(tensors["other"], untouched(case)))
    edit_config(case.patch, lambda config: config["tensors"][UP].update(tied_keys=["other"]))
    merge(case.base, case.patch, case.out)
    assert verify_all(case).ok
    change(case.out, lambda tensors: tensors.pop("other"))
    report = verify_all(case)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "weights")


def test_a_patchs_entries_are_read_and_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, tied_layout("bfloat16"), head=True)
    merge(case.base, case.patch, case.out)
    reads, hashes = count_work(monkeypatch)
    assert verify_all(case).ok
    assert reads == {f"base: {key}": 1 for key in case.tensors if key != "untouched.weight"}
    records = read_metadata(case.patch).tensors.values()
    digests = [(record.base_digest, record.merged_digest) for record in records]
    assert hashes == Counter(part for pair in digests for part in pair)


def test_tensors_are_compared_window_by_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, plain_layout("bfloat16"))
    case.change_base(lambda tensors: tensors.update(large=np.zeros(500_000, np.float32)))
    merge(case.base, case.patch, case.out)
    monkeypatch.setattr("safeweights_peft.checkpoint.reader.WINDOW_BYTES", 64)
    assert verify_all(case).ok
    monkeypatch.setattr("safeweights_peft.checkpoint.reader.WINDOW_BYTES", 4096)
    change(case.out, lambda tensors: flip(tensors["large"], 499_999))
    tracemalloc.start()
    report = verify_all(case)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "at index 499999, found" in report.checks[-1].detail
    assert peak_bytes < 1_000_000


def rename_dtype(path: Path, key: str, dtype: str) -> None:
    """Say in a file's header that a tensor has another dtype of the same size."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[key]["dtype"] = dtype
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + size :])


@pytest.mark.parametrize("changed", [True, False])
def test_a_tensor_that_numpy_cannot_read_is_compared_by_its_bytes(
    changed: bool, case: Case
) -> None:
    for path, last in ((case.base, 3), (case.out, 4 if changed else 3)):
        scales = np.array([1, 2, last], np.uint8)
        change(path, lambda tensors, scales=scales: tensors.update(scales=scales))
        rename_dtype(path / "model.safetensors", "scales", "F8_E8M0")
    assert verify_all(case).ok is not changed


def test_an_adapter_alone_is_not_verified(case: Case) -> None:
    report = verify(case.patch)
    assert report.verdict is Verdict.UNKNOWN
    assert [check.verdict for check in report.checks] == ["verified", "verified", "unknown"]
    assert report.checks[-1].detail == "not checked: no base was given"


def test_an_adapter_is_verified_with_its_base(case: Case) -> None:
    report = verify(case.patch, case.base)
    assert report.ok
    assert [check.name for check in report.checks] == ["config", "tensors", "base", "result"]


def test_a_base_that_is_merged_already_proves_nothing(case: Case) -> None:
    report = verify(case.patch, case.out)
    assert report.verdict is Verdict.UNKNOWN
    assert report.checks[-1].detail.startswith("holds the merged values")


def test_a_merged_model_without_the_base_is_checked_as_far_as_possible(case: Case) -> None:
    report = verify(case.patch, None, case.out)
    assert report.verdict is Verdict.UNKNOWN
    assert [check.name for check in report.checks[2:]] == ["base", "merged", "weights"]
    change(case.out, lambda tensors: flip(tensors[UP], touched(case)))
    report = verify(case.patch, None, case.out)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "merged")


def test_another_base_fails(case: Case) -> None:
    case.change_base(lambda tensors: flip(tensors[UP], touched(case)))
    report = verify_all(case)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "base")


def test_a_base_without_a_tensor_fails(case: Case) -> None:
    case.change_base(lambda tensors: tensors.pop(UP))
    report = verify(case.patch, case.base)
    assert report.verdict is Verdict.FAILED
    assert report.checks[-1].detail.startswith(f"{UP}: expected bfloat16 [8, 9]")


def test_a_false_promise_of_the_result_fails(case: Case) -> None:
    def forge(config: dict) -> None:
        config["tensors"][UP]["merged_digest"] = digest(np.zeros(1))

    edit_config(case.patch, forge)
    report = verify(case.patch, case.base)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "result")
    assert "contradicts itself" in report.checks[-1].detail


def test_changed_values_fail(case: Case) -> None:
    edit_tensors(case.patch, lambda tensors: [value.__imul__(2) for value in tensors.values()])
    report = verify(case.patch, case.base)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "tensors")
    assert report.content_id is None


def test_the_tensors_of_another_adapter_fail(case: Case) -> None:
    case.add_patch()
    name = "adapter_model.safetensors"
    shutil.copy(case.patch.with_name("second") / name, case.patch / name)
    report = verify(case.patch, case.base)
    assert (report.verdict, report.checks[-1].name) == (Verdict.FAILED, "tensors")


def cut(patch: Path) -> None:
    file = patch / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda patch: (patch / "adapter_model.safetensors").write_bytes(b"not a file of tensors"),
        lambda patch: (patch / "adapter_model.safetensors").unlink(),
        lambda patch: (patch / "adapter_config.json").write_text("{"),
        lambda patch: edit_config(patch, lambda config: config.update(format_version=99)),
        lambda patch: edit_config(patch, lambda config: config.update(peft_type="LORA")),
        shutil.rmtree,
    ],
    ids=["cut", "no tensors", "missing tensors", "no JSON", "newer", "a LoRA", "nothing"],
)
def test_what_is_no_adapter_is_unreadable(damage: Callable[[Path], object], case: Case) -> None:
    damage(case.patch)
    report = verify_all(case)
    assert report.verdict is Verdict.UNREADABLE
    assert [check.name for check in report.checks] == ["config"]


@pytest.mark.parametrize(("place", "check"), [("base", "base"), ("out", "layout")])
def test_what_is_no_checkpoint_is_unreadable(place: str, check: str, case: Case) -> None:
    (case.base.with_name(place) / "model.safetensors").write_bytes(b"not a model")
    report = verify_all(case)
    assert (report.verdict, report.checks[-1].name) == (Verdict.UNREADABLE, check)


def test_a_file_that_may_not_be_read_is_unreadable(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(filecmp, "cmp", refuse)
    report = verify_all(case)
    assert (report.verdict, report.checks[-1].name) == (Verdict.UNREADABLE, "files")


@pytest.mark.parametrize(
    ("recorded", "verdict", "names"),
    [
        (COMMIT, Verdict.VERIFIED, ["base", "commit", "result"]),
        (COMMIT[::-1], Verdict.UNKNOWN, ["base", "commit", "result"]),
        ("main", Verdict.VERIFIED, ["base", "result"]),
        (None, Verdict.VERIFIED, ["base", "result"]),
    ],
)
def test_the_commit_is_compared_where_both_are_known(
    recorded: str | None, verdict: Verdict, names: list[str], case: Case, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / COMMIT
    shutil.copytree(case.base, snapshot)
    edit_config(case.patch, lambda config: config.update(revision=recorded))
    report = verify(case.patch, snapshot)
    assert report.verdict is verdict
    assert [check.name for check in report.checks[2:]] == names


def test_a_map_is_verified_with_its_base_and_changes_nothing(case: Case, tmp_path: Path) -> None:
    write_map(tmp_path / "map", as_map(case.adapter))
    assert verify(tmp_path / "map", case.base).ok
    assert verify(tmp_path / "map", case.base, case.base).ok
    assert verify(tmp_path / "map", case.out).verdict is Verdict.FAILED
    assert verify(tmp_path / "map", case.base, case.out).verdict is Verdict.FAILED
    assert verify(tmp_path / "map", None, case.base).verdict is Verdict.UNKNOWN


def test_progress_is_told_in_bytes_of_the_merged_model(case: Case) -> None:
    told: list[tuple[int, int]] = []
    verify(case.patch, case.base, case.out, progress=lambda *at: told.append(at))
    size = sum(tensor.nbytes for tensor in load_checkpoint(case.out).values())
    assert told[-1] == (size, size)
    assert told == sorted(told)


def test_two_parameters_that_would_share_a_tensor_of_the_base_are_refused(case: Case) -> None:
    adapter = read_adapter(case.patch)
    record = adapter.metadata.tensors[UP]
    (block,) = record.blocks
    double = replace(record, blocks=(replace(block, key=f"model.{block.key}"),))
    if block.key.startswith("model."):
        double = replace(record, blocks=(replace(block, key=block.key.removeprefix("model.")),))
    metadata = replace(
        adapter.metadata, tensors=adapter.metadata.tensors | {"other.weight": double}
    )
    both = Adapter(metadata, adapter.deltas | {"other.weight": adapter.deltas[UP]})
    write_adapter(case.patch, both, overwrite=True)
    with pytest.raises(MergeError, match="expected a tensor of its own"):
        merge(case.base, case.patch, case.out.with_name("again"))
    found = verify_all(case).checks[-1]
    assert (found.name, found.verdict) == ("result", Verdict.FAILED)
