"""One whole run on a tiny model, made once for all tests of the jobs."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoModelForCausalLM, GenerationMixin

from safeweights_peft.jobs.enhance import enhance
from safeweights_peft.training import finetune
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


@pytest.fixture(autouse=True)
def _checkpoint_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "SAVE_SECONDS", 0)


@pytest.fixture(scope="session")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Requests:
    return Requests(tmp_path_factory.mktemp("requests"))


@pytest.fixture(scope="session")
def run(tiny_llama_bf16: Path, requests: Requests, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Long enough for the tiny model to learn to refuse."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = requests.run(tiny_llama_bf16, steps=20)
    return Run(tiny_llama_bf16, out, enhance(settings, out))


class Counts:
    """What was done so far.

    Attributes:
        loads: causal language models loaded.
        asked: requests that a model was given to answer.
    """

    def __init__(self) -> None:
        self.loads = 0
        self.asked = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Counts loads and requests from here on."""
    found, generate = Counts(), GenerationMixin.generate
    load = AutoModelForCausalLM.from_pretrained.__func__

    def count_load(cls: type, *arguments: Any, **options: Any) -> Any:
        found.loads += 1
        return load(cls, *arguments, **options)

    def count_requests(model: Any, *arguments: Any, **options: Any) -> Any:
        if not options["generation_config"].output_logits:  # as the check of a layout wants them
            found.asked += len(options["input_ids"])
        return generate(model, *arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(count_load))
    monkeypatch.setattr(GenerationMixin, "generate", count_requests)
    return found
