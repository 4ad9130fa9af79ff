"""What a user gets: the wheel holds the package, and its light half works where no torch is."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from safeweights_peft.delta import SparseDelta, digest
from safeweights_peft.patch.artifacts import Adapter
from safeweights_peft.patch.io import write_adapter
from safeweights_peft.patch.metadata import AdapterMetadata
from safeweights_peft.patch.placement import Block
from safeweights_peft.patch.records import Mode, TensorRecord

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "safeweights_peft"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What inspecting, verifying and merging need, of all the dependencies.
LIGHT = {
    *("click", "jinja2", "lazy-loader", "ml_dtypes", "numpy", "rich", "safetensors", "wrapt"),
    "zstandard",
}
PARAMETER = "model.layers.1.mlp.up_proj.weight"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command outside the checkout, without this process's import paths."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def interpreter(version: str) -> str:
    """Finds a Python that can make environments, or skips the test and says why there is none."""
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    path = shutil.which(f"python{version}")
    if path is None:
        pytest.skip(f"python{version} is not on PATH")
    command = [path, "-c", "import ensurepip, venv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        pytest.skip(f"python{version} is on PATH but cannot make an environment: {reason}")
    return path


def write_patch(base: Path, path: Path) -> np.ndarray:
    """Writes a safety patch of three entries and tells what they are once merged."""
    dense = load_file(base / "model.safetensors")[PARAMETER]
    values = np.array([0.5, -0.25, 0.125], np.float32)
    delta = SparseDelta(dense.shape, np.array([0, 7, 100], np.int32), values)
    record = TensorRecord(
        shape=dense.shape,
        dtype="float32",
        blocks=(Block(key=PARAMETER, shape=dense.shape, offset=0, strides=(dense.shape[1], 1)),),
        base_digest=digest(delta.gather(dense)),
        merged_digest=digest(delta.gather(delta.apply(dense))),
    )
    metadata = AdapterMetadata(mode=Mode.SET, tensors={PARAMETER: record})
    write_adapter(path, Adapter(metadata, {PARAMETER: delta}))
    return delta.apply(dense)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built out of the source distribution, as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module", params=["3.11", "3.12", "3.13"])
def scripts(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the commands of a fresh environment: the wheel and its light dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    run(interpreter(request.param), "-m", "venv", folder / "venv", cwd=folder)
    commands = folder / "venv" / "bin"
    light = [
        line for line in PROJECT["dependencies"] if re.split("[<>=]", line, maxsplit=1)[0] in LIGHT
    ]
    assert len(light) == len(LIGHT)
    pip = [commands / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, *light, cwd=folder)
    run(*pip, "--no-deps", wheel, cwd=folder)
    return commands


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files
    assert "safeweights_peft/py.typed" in packed


def test_the_command_line_answers_without_torch(scripts: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('peft'))"
    assert run(scripts / "python", "-c", code, cwd=tmp_path) == "None None\n"
    assert "enhance" in run(scripts / "safeweights", "--help", cwd=tmp_path)
    assert PROJECT["version"] in run(scripts / "safeweights", "--version", cwd=tmp_path)


def test_a_patch_is_inspected_verified_and_merged_without_torch(
    scripts: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    patch, out, safeweights = tmp_path / "patch", tmp_path / "merged", scripts / "safeweights"
    merged = write_patch(tiny_llama, patch)
    seen = json.loads(run(safeweights, "inspect", patch, "--json", cwd=tmp_path))
    assert seen["entries"] == 3
    run(safeweights, "verify", patch, "--base", tiny_llama, cwd=tmp_path)
    run(safeweights, "merge", tiny_llama, patch, "--out", out, cwd=tmp_path)
    assert np.array_equal(load_file(out / "model.safetensors")[PARAMETER], merged)
