"""One whole run on a tiny model, made once for all tests of the jobs."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from safeweights_peft.jobs.enhance import enhance_model
from tests.tiny_jobs import Requests


class Run(NamedTuple):
    """A finished run.

    Attributes:
        base: the base model.
        out: the run's directory.
        result: what the job returned.
    """

    base: Path
    out: Path
    result: dict[str, Any]


@pytest.fixture(scope="session")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Requests:
    return Requests(tmp_path_factory.mktemp("requests"))


@pytest.fixture(scope="session")
def run(tiny_llama_bf16: Path, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Long enough for the tiny model to learn to refuse."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = requests.score(), requests.train(steps=20), requests.evaluate()
    return Run(tiny_llama_bf16, out, enhance_model(str(tiny_llama_bf16), out, *settings))
