"""Training that ends while it saves its patch over an old one: either is there, whole."""

from pathlib import Path

import pytest

from tests.killing import Ending, end_at_every_write
from tests.patch.test_interruptions import PREPARE, is_old

IMPORTS = """
import torch
torch.set_num_threads(1)
from safeweights_peft.jobs.train import _save
from tests.tuner.patches import load_base, patch_model, save_patch
base = Path({base!r})
save_patch(base, Path(root, "template"), seed=1)
Path(root, "template", "kept").touch()
model = patch_model(load_base(base), base, seed=2)
metadata = model.peft_config["default"].to_metadata("here")
"""
SAVE = "_save(model, metadata, folder / 'patch', {'losses': []}, True)"
SIZES = range(1000, 31000, 6000)  # of tensors of 26,000 bytes


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["kill", "full"])
def test_training_that_ends_while_it_saves_leaves_the_old_patch_or_the_new_one(
    ending: Ending, tiny_llama: Path, tmp_path: Path
) -> None:
    imports = IMPORTS.format(base=str(tiny_llama))
    folders = end_at_every_write(tmp_path, ending, imports, PREPARE, SAVE, SIZES)
    outcomes = [is_old(folder) for folder in folders]
    assert 0 < sum(outcomes) < len(outcomes)
    if ending == "full":
        assert outcomes == [(folder / "error").exists() for folder in folders]
        told = {
            (folder / "error").read_text().split(":")[0] for folder in folders if is_old(folder)
        }
        assert told == {"FormatError"}
