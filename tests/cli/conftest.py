"""One whole run by the command line on a tiny model, and ways to call a command."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result

from safeweights_peft.cli import main
from tests.tiny_jobs import Requests

Call = Callable[..., Result]


class Run(NamedTuple):
    """A finished `enhance`.

    Attributes:
        base: the base model.
        out: the run's directory.
        options: the options with which it was called, all but --json.
        called: what the command printed, and how it ended.
    """

    base: Path
    out: Path
    options: list[str]
    called: Result


def call(*arguments: object) -> Result:
    """Calls a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def call_afresh(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """Calls a command in a process of its own, which then runs some code."""
    script = (
        "import sys\n"
        "from safeweights_peft.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        f"    {code or 'pass'}\n"
    )
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="session")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Requests:
    return Requests(tmp_path_factory.mktemp("requests"))


@pytest.fixture(scope="session")
def options(requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Options of each kind that keep a job short."""
    harmful = ["--harmful", requests.harmful]
    score = ["--density", "0.1", "--movement-steps", "2"]
    train = ["--benign", requests.benign, "--steps", "2", "--lr", "0.01"]
    evaluate = ["--eval-harmful", requests.harmful, "--eval-benign", requests.benign]
    evaluate += ["--limit", "3"]
    settings = tmp_path_factory.mktemp("settings") / "short.toml"
    settings.write_text(
        "score.examples = 4\ntrain.retain_weight = 1\nevaluate.max_new_tokens = 4\n"
    )
    return {
        "score": [*harmful, "--benign", requests.benign, *score, "--examples", "4"],
        "train": [*harmful, *train, "--retain-weight", "1"],
        "preserve": [
            *("--data", requests.lessons, "--steps", "2", "--batch-size", "2", "--lr", "0.01"),
            "--no-anchor",
        ],
        "probe": ["--draws", "1", *evaluate, "--max-new-tokens", "4"],
        "eval": [*evaluate, "--max-new-tokens", "4"],
        "enhance": [
            *("--settings", str(settings)),
            *(*harmful, *score, *train, *evaluate),
        ],
    }


@pytest.fixture(scope="session")
def run(
    tiny_llama_bf16: Path,
    options: dict[str, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--out", str(out), *options["enhance"]]
    called = call("enhance", tiny_llama_bf16, *arguments, "--json")
    return Run(tiny_llama_bf16, out, arguments, called)


@pytest.fixture
def corrupted(run: Run, tmp_path: Path) -> Path:
    """The run's patch with one byte of its last value turned over."""
    patch = tmp_path / "corrupted"
    patch.mkdir()
    for path in (run.out / "patch").iterdir():
        (patch / path.name).write_bytes(path.read_bytes())
    file = patch / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    return patch
