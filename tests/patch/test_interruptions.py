"""Writing that ends anywhere leaves the old adapter or the new one, whole."""

from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.errors import FormatError
from safeweights_peft.files import check_target
from safeweights_peft.patch.io import read_adapter
from tests.killing import Ending, end_at_every_write

IMPORTS = """
from safeweights_peft import read_adapter, write_adapter
from safeweights_peft import convert
from tests.tiny_files import dense, random_checkpoint, random_patch
records = {"model.up.weight": dense("model.up.weight", (60, 80), "bfloat16")}
old, new = (random_patch(records, random_checkpoint(records), seed=seed) for seed in (1, 2))
write_adapter(Path(root, "template"), old)
Path(root, "template", "kept").touch()
write_adapter(Path(root, "other"), new)
"""
PREPARE = "shutil.copytree(Path(root, 'template'), folder / 'patch')"
WRITE = "write_adapter(folder / 'patch', new, overwrite=True)"
CONVERT = "convert(Path(root, 'other'), 'compact', folder / 'patch', overwrite=True)"
SIZES = range(0, 5000, 700)  # of a config of 900 bytes, and tensors of 4,200
WITHOUT_EXCHANGE = "import safeweights_peft.files; safeweights_peft.files._exchange = lambda *_: 0"


def ended(
    tmp_path: Path, ending: Ending, script: str = WRITE, imports: str = IMPORTS
) -> list[Path]:
    """Give the folders in which a patch was to be written over another."""
    return end_at_every_write(tmp_path, ending, imports, PREPARE, script, SIZES)


def is_old(folder: Path) -> bool:
    """Read the patch, with all checks; tell the old one by a file that only it has."""
    patch = read_adapter(folder / "patch")
    old = read_adapter(folder.parent / "template")
    same = [
        np.array_equal(delta.indices, old.deltas[name].indices)
        for name, delta in patch.deltas.items()
    ]
    assert all(same) == (folder / "patch" / "kept").exists()
    return all(same)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "error")


@pytest.mark.parametrize("script", [WRITE, CONVERT], ids=["write", "convert"])
def test_a_writer_that_is_killed_leaves_the_old_patch_or_the_new_one(
    script: str, tmp_path: Path
) -> None:
    folders = ended(tmp_path, "kill", script)
    outcomes = [is_old(folder) for folder in folders]
    assert len(folders) > 15
    assert 0 < sum(outcomes) < len(outcomes)


@pytest.mark.parametrize("script", [WRITE, CONVERT], ids=["write", "convert"])
def test_a_full_disk_is_an_error_that_leaves_the_old_patch(script: str, tmp_path: Path) -> None:
    folders = ended(tmp_path, "full", script)
    refused = [folder for folder in folders if (folder / "error").exists()]
    assert 10 < len(refused) < len(folders)
    for folder in folders:
        assert is_old(folder) == (folder in refused)
        assert names(folder) == ["patch"]
    for folder in refused:
        assert (folder / "error").read_text().startswith("FormatError: ")


def test_without_an_exchange_of_names_the_next_writer_finds_the_old_patch(tmp_path: Path) -> None:
    folders = ended(tmp_path, "kill", imports=IMPORTS + WITHOUT_EXCHANGE)
    lost = [folder for folder in folders if not (folder / "patch").exists()]
    assert lost
    for folder in folders:
        with pytest.raises(FormatError, match="found files; give --overwrite to replace it"):
            check_target(folder / "patch", False, FormatError)
        assert is_old(folder) or folder not in lost


def test_without_an_exchange_of_names_a_full_disk_leaves_the_old_patch(tmp_path: Path) -> None:
    for folder in ended(tmp_path, "full", imports=IMPORTS + WITHOUT_EXCHANGE):
        assert is_old(folder) == (folder / "error").exists()
        assert names(folder) == ["patch"]
