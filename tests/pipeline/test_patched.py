"""Loading a patched model: the weights are those of the merged checkpoint, bit by bit."""

from pathlib import Path

import pytest
import torch

from safeweights_peft.merge import merge
from safeweights_peft.modeling import load_model, resolve_base
from safeweights_peft.pipeline import load_patched
from tests.pipeline.conftest import Run

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_a_patched_model_has_the_weights_of_the_merged_checkpoint(
    dtype: str | torch.dtype, run: Run, tmp_path: Path
) -> None:
    merge(run.base, run.out / "patch", tmp_path / "merged")
    patched = load_patched(resolve_base(str(run.base)), run.out / "patch", dtype, CPU)
    merged = load_model(resolve_base(str(tmp_path / "merged")), dtype)
    expected, found = dict(merged.named_parameters()), dict(patched.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].dtype is parameter.dtype
        assert torch.equal(found[name], parameter), name


def test_a_patched_model_differs_from_its_base(run: Run) -> None:
    base = load_model(resolve_base(str(run.base)))
    patched = load_patched(resolve_base(str(run.base)), run.out / "patch", "auto", CPU)
    expected = dict(base.named_parameters())
    assert any(not torch.equal(each, expected[n]) for n, each in patched.named_parameters())
