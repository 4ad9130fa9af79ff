"""PEFT's own tests with our method as a row: does a release of PEFT still work with this package?

None of PEFT's code is kept here. `make peer PEFT_SOURCE=DIR` takes its tests from a checkout, or an
unpacked source distribution, of the release that is installed, and runs each file in a process of
its own: with our rows in place of all others (`rows.py`), on tiny models built from configs, and
without a network (`plugin.py`). What must fail is declared in `REFUSALS`; all else must pass.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import peft
import pytest

pytestmark = pytest.mark.peer

ROOT = Path(__file__).parents[2]
SOURCE = os.environ.get("PEFT_SOURCE")
SECONDS = 900  # for a file
FILES = [
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_low_level_api.py",
    "test_target_parameters.py",
    "test_tuners_utils.py",
]


class Refusal(NamedTuple):
    """Tests that can't pass, by design."""

    test: str  # a regular expression found in "file::class::test[row]"
    message: str  # one found in what they fail with
    reason: str


REFUSALS = [
    Refusal("_pickle", "safe_serialization: expected True, found False", "no pickles"),
    Refusal("test_merge_layers_nan", "NaNs detected in the merged", "an error in our own words"),
    Refusal(
        r"test_adapter_dtype_autocast\[\w+-False-dtype[01]|test_add_adapter_no_autocast",
        "[Aa]ssert",
        "values stay in float32, whatever the base's dtype",
    ),
    Refusal(
        r"test_prepare_for_training.*(config_kwargs1-|config_kwargs[89]\])",
        "AssertionError",
        "embeddings are trained",
    ),
    Refusal("test_in_features_out", "assert False", "layers stand for parameters of any kind"),
    Refusal(
        "test_only_params_are_updated",
        "assert False",
        "entries stand in the base's parameters between forwards",
    ),
    Refusal(
        "test_save_load_roundtrip_fsdp_wrapped",
        "expected the parameter that the adapter was loaded for",
        "FSDP1 puts views in the place of parameters",
    ),
    Refusal(
        "test_multiple_active_adapters_forward",
        "combination_type: expected 'linear', found 'cat'",
        "weighted sums are linear",
    ),
    Refusal(
        "test_set_adapter_non_overlapping_modules|test_set_requires_grad",
        "'Linear' object has no attribute",
        "no module is replaced by a layer of PEFT's",
    ),
    Refusal("LayerStatus::test_layer_names", "AssertionError", "layers are named by parameter"),
    Refusal("test_loading_model_requires_grad", "BaseMismatchError", "the test's base changes"),
]


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's tests as a package with a name of its own, beside an empty configuration."""
    if not SOURCE:
        pytest.skip("PEFT_SOURCE is not set: expected a checkout of PEFT's source")
    source = Path(SOURCE)
    text = (source / "src/peft/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.+)"', text)
    found = version and version[1]
    assert found == peft.__version__, f"PEFT_SOURCE: expected {peft.__version__}, found {found}"
    folder = tmp_path_factory.mktemp("peer")
    (folder / "peft_tests").mkdir()
    (folder / "peft_tests/__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\n")
    for path in source.glob("tests/test*.py"):
        shutil.copy(path, folder / "peft_tests")
    return folder


@pytest.mark.parametrize("file", FILES)
def test_our_method_does_what_peft_asks_of_every_method(tests: Path, file: str) -> None:
    outcomes = run(tests, file)
    counts = Counter(outcome for outcome, _ in outcomes.values())
    logging.getLogger(__name__).info("%s: %s", file, dict(counts))
    assert counts["passed"], f"{file}: expected tests of our method, found none"
    wrong = []
    for name, (outcome, message) in outcomes.items():
        refusals = [refusal for refusal in REFUSALS if re.search(refusal.test, name)]
        is_expected = any(re.search(refusal.message, message) for refusal in refusals)
        if outcome == "failed" and not is_expected:
            wrong.append(f"{name}: {message.splitlines()[0]}")
        elif outcome == "passed" and refusals:
            wrong.append(f"{name}: passed; take it off the list")
    assert not wrong, f"{len(wrong)} of {len(outcomes)}:\n" + "\n".join(wrong)


def run(tests: Path, file: str) -> dict[str, tuple[str, str]]:
    """Run one of PEFT's files, and return the outcome and the error of each test."""
    report = tests / f"{file}.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.peer.plugin", "--tb=short"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"peft_tests/{file}"],
        cwd=tests,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PEER_OUTCOMES": str(report)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert report.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(report.read_text())
