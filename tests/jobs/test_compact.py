"""Jobs on a compact patch: each does what it does with the plain one."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from safeweights_peft import convert, create_adapter, load_model, merge, preserve, protect
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.jobs.export import export_supertuning
from safeweights_peft.merging.gather import gather_entries
from safeweights_peft.patch.io import (
    read_adapter,
    read_artifact,
    read_map,
    read_metadata,
    write_map,
)
from safeweights_peft.patch.records import Encoding
from safeweights_peft.study.report import report_map
from tests.jobs.test_export import save_linear_patch
from tests.tiny_files import as_map
from tests.tiny_jobs import content
from tests.tuner.patches import load_base, same_weights


@pytest.fixture
def patch(tiny_llama_bf16: Path, tmp_path: Path) -> Path:
    return save_linear_patch(tiny_llama_bf16, tmp_path / "patch")


@pytest.fixture
def compact(tiny_llama_bf16: Path, patch: Path, tmp_path: Path) -> Path:
    convert(patch, "compact", tmp_path / "compact", tiny_llama_bf16)
    assert read_metadata(tmp_path / "compact").needs_base
    return tmp_path / "compact"


@pytest.fixture
def merged(tiny_llama_bf16: Path, patch: Path, tmp_path: Path) -> Path:
    merge(tiny_llama_bf16, patch, tmp_path / "merged")
    return tmp_path / "merged"


def test_a_compact_patch_is_merged_while_its_base_loads(
    tiny_llama_bf16: Path, compact: Path, merged: Path
) -> None:
    assert same_weights(load_model(tiny_llama_bf16, compact), load_base(merged))


def test_a_compact_patch_is_exported_with_the_values_that_its_base_gives(
    tiny_llama_bf16: Path, compact: Path, tmp_path: Path
) -> None:
    export_supertuning(compact, tmp_path / "supertuning")
    stored = load_file(tmp_path / "supertuning" / "adapter_model.safetensors")
    deltas = read_adapter(
        compact, partial(gather_entries, CheckpointReader(tiny_llama_bf16))
    ).deltas
    for name, delta in deltas.items():
        module = name.removesuffix(".weight")
        held = [value.reshape(-1) for key, value in stored.items() if f".{module}." in key]
        assert np.isin(delta.values, np.concatenate(held)).all()


def test_a_compact_patch_protects_as_the_plain_one_does(
    tiny_llama_bf16: Path, patch: Path, compact: Path, merged: Path, tmp_path: Path
) -> None:
    for each in (patch, compact):
        protect(tiny_llama_bf16, merged, each, tmp_path / f"protected-{each.name}")
    assert content(tmp_path / "protected-patch") == content(tmp_path / "protected-compact")


def test_a_merged_compact_patch_is_preserved_in_training(compact: Path, merged: Path) -> None:
    model = load_base(merged).requires_grad_(True)
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    indices = read_artifact(compact).indices
    with preserve(model, compact):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
    for name in indices:
        after = model.get_parameter(name)
        assert not torch.equal(after, before[name])
        changed = (after != before[name]).flatten().nonzero().flatten().numpy()
        assert not np.intersect1d(changed, indices[name]).size


def test_a_compact_patch_is_reported(compact: Path, patch: Path, tmp_path: Path) -> None:
    found = [report_map(each, tmp_path / f"report-{each.name}") for each in (compact, patch)]
    assert [each.pop("map") for each in found] == [str(compact), str(patch)]
    assert found[0] == found[1]


def test_a_patch_is_made_for_a_compact_map(
    tiny_llama_bf16: Path, patch: Path, tmp_path: Path
) -> None:
    safety_map = as_map(read_adapter(patch))
    write_map(tmp_path / "map", safety_map)
    convert(tmp_path / "map", "compact", tmp_path / "compact-map")
    found = read_map(tmp_path / "compact-map")
    assert {record.encoding for record in found.metadata.tensors.values()} == {Encoding.COMPACT}
    model = create_adapter(load_base(tiny_llama_bf16), found.metadata, found.indices)
    model.save_pretrained(tmp_path / "new")
    written = read_adapter(tmp_path / "new")
    assert {record.encoding for record in written.metadata.tensors.values()} == {Encoding.PLAIN}
    assert content_bytes(written.indices) == content_bytes(found.indices)


def content_bytes(indices: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: each.tobytes() for name, each in indices.items()}
