"""A pytest plugin for PEFT's own tests: our rows, models from configs, and nothing fetched."""

import json
import os
import re
import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.peer.rows import PeerConfig, draw_when_injected, replace_rows
from tests.zoo.architectures import build_config

# By the name that PEFT's tests ask for: a folder of that name, below the one in which they run.
MODELS = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3_text",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "gptj",
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "trl-internal-testing/tiny-GptOssForCausalLM": "gpt_oss",
    "trl-internal-testing/tiny-Llama4ForCausalLM": "llama4_text",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
}
# Tests that are written for LoRA but ask little of it: our config takes its name there. The others
# of these files need modules_to_save, LoRA's tensors, other methods or the Hub.
STAND_IN = {
    "test_low_level_api.py": r"TestPeftStateDict::test_get_and_set|TestGetBaseModelStateDict",
    "test_tuners_utils.py": (
        r"TestModelAndLayerStatus::test_(model_)?(layer_names|enabled|active_adapters|"
        r"merged?_adapters|requires_grad|available_adapters|devices_all_cpu|num_adapter_layers|"
        r"quantization_backend|disabled|base_model_type)_(model_)?(small|large)$"
    ),
}
# Other methods' tests that have a row for every method.
ELSEWHERE = re.compile("prompt_|modules_to_save|shared_state_tuners|cat_with_rank|DefaultTarget")
# What PEFT's tests import for others of their rows.
ABSENT = {"diffusers": "StableDiffusionPipeline", "parameterized": "parameterized"}

_outcomes: dict[str, tuple[str, str]] = {}


def pytest_configure() -> None:
    """Get everything ready before PEFT's tests are imported."""
    for name, content in ABSENT.items():
        if find_spec(name) is None:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update({content: _Anything, "__version__": "0"})
            sys.modules[name] = module
    for path, architecture in MODELS.items():
        torch.manual_seed(0)
        config = build_config(architecture)
        config.dropout = 0.0  # OPT's leaves too few gradients in layers so small
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    draw_when_injected()


class _Anything:
    """Stands for what is not installed; tests that use it are not run."""

    @staticmethod
    def expand(*_args: Any) -> Any:
        """Give back the test that is decorated."""
        return lambda test: test


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the rows of a test, and what its module would fetch or skip our method for."""
    plain = metafunc.parametrize

    def parametrize(names: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
        separate = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
        plain(names, replace_rows(separate, list(rows)), *args, **kwargs)

    metafunc.parametrize = parametrize
    package, _, name = metafunc.module.__name__.rpartition(".")
    shared = sys.modules.get(f"{package}.testing_common", metafunc.module)
    for module in (metafunc.module, shared):
        _replace(module, "hub_online_once", nullcontext)
        for skip in ("_skip_if_not_conv1d_supported", "_skip_if_conv1d_not_supported"):
            _replace(module, skip, lambda *_: None)
    if f"{name}.py" in STAND_IN:
        _replace(metafunc.module, "LoraConfig", PeerConfig)


def _replace(module: ModuleType, name: str, new: Any) -> None:
    if hasattr(module, name):
        setattr(module, name, new)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave only tests of our method."""
    ours = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


def _is_ours(item: pytest.Item) -> bool:
    if re.search(STAND_IN.get(item.path.name, "$^"), item.nodeid):
        return True
    cells = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(cell is PeerConfig for cell in cells) and not ELSEWHERE.search(item.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a test's outcome: the worst of its set-up, its call and its end."""
    name = report.nodeid.removeprefix("peft_tests/")
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        _outcomes[name] = ("failed", str(crash.message if crash else report.longrepr))
    elif report.skipped or report.when == "call":
        _outcomes.setdefault(name, (report.outcome, ""))


def pytest_sessionfinish() -> None:
    """Write the outcomes for the test that has started this run."""
    Path(os.environ["PEER_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=1))
