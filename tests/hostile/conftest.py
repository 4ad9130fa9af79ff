"""A sound patch and a sound map of the tiny Llama, and copies, each broken by one attack."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safeweights_peft.patch.io import read_adapter, write_map
from tests.hostile.attacks import Attack
from tests.hostile.edits import OTHER, UNPICKLED, VICTIM
from tests.tiny_files import as_map
from tests.tuner.patches import save_patch

Broken = Callable[[str, Attack], Path]


@pytest.fixture(scope="session")
def sound(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of a patch and a map."""
    folder = tmp_path_factory.mktemp("sound")
    patch = save_patch(tiny_llama, folder / "patch", names=[VICTIM, OTHER])
    write_map(folder / "map", as_map(read_adapter(patch)))
    return {"patch": patch, "map": folder / "map"}


@pytest.fixture(scope="session")
def broken(sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Broken:
    """Copies, each made when it is first asked for; nothing may write to them."""
    folder = tmp_path_factory.mktemp("broken")
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, attack: Attack) -> Path:
        key = kind, attack.name
        if key not in made:
            made[key] = shutil.copytree(sound[kind], folder / str(len(made)) / kind)
            attack.edit(made[key])
        return made[key]

    return get


@pytest.fixture(autouse=True)
def unpickled(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """No pickle may run: where one does, it makes this directory."""
    mark = tmp_path_factory.getbasetemp() / "unpickled"
    monkeypatch.setenv(UNPICKLED, str(mark))
    yield
    assert not mark.exists()
