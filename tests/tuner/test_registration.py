"""Importing the package is light, and enough for PEFT to know the method, in either order."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import safeweights_peft
from safeweights_peft import SafeWeightsConfig, UnsupportedFeatureError
from safeweights_peft.tuner.model import register

HEAVY = "{'torch', 'peft', 'transformers', 'numpy'}"


def run(code: str) -> str:
    """Run code in a fresh process in which warnings are errors."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert not result.returncode, result.stderr
    return result.stdout.strip()


KNOWN = "print(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING['SAFEWEIGHTS'].__name__)"


@pytest.mark.parametrize(
    "code",
    [
        f"import safeweights_peft, peft; {KNOWN}",
        f"import peft, safeweights_peft; {KNOWN}",
        f"import safeweights_peft.tuner.config; import peft; {KNOWN}",
    ],
)
def test_peft_knows_the_method_whichever_is_imported_first(code):
    assert run(code) == "SafeWeightsModel"


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, safeweights_peft; print(sorted({HEAVY} & set(sys.modules)))"
    assert run(code) == "[]"


def test_the_test_of_heavy_imports_can_fail():
    code = f"import sys, safeweights_peft, peft; print(sorted({HEAVY} & set(sys.modules)))"
    assert run(code) == "['numpy', 'peft', 'torch', 'transformers']"


def test_numpy_is_all_that_reading_an_adapter_needs():
    code = "import sys; from safeweights_peft import read_adapter, merge; {}"
    assert run(code.format(f"print(sorted({HEAVY} & set(sys.modules)))")) == "['numpy']"


def test_a_model_loads_in_a_process_that_only_imported_the_package(tiny_llama, tmp_path):
    from tests.tuner.patches import save_patch

    patch = save_patch(tiny_llama, tmp_path)
    code = (
        "import safeweights_peft, warnings; warnings.simplefilter('ignore')\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(patch)!r})\n"
        "print(type(model.lm_head.safeweights_values__weight).__name__)"
    )
    assert run(code) == "SafeWeightsLayer"


def test_without_the_import_peft_ends_with_the_error_that_the_pages_name(tiny_llama, tmp_path):
    from tests.tuner.patches import save_patch

    patch = save_patch(tiny_llama, tmp_path)
    code = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"base = AutoModelForCausalLM.from_pretrained({str(tiny_llama)!r})\n"
        "try:\n"
        f"    PeftModel.from_pretrained(base, {str(patch)!r})\n"
        "except KeyError as error:\n"
        "    print(repr(error))"
    )
    assert run(code) == "KeyError('SAFEWEIGHTS')"


def test_registering_again_does_no_harm():
    register()
    register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["SAFEWEIGHTS"] is SafeWeightsConfig


def test_a_name_that_is_taken_is_an_error(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "SAFEWEIGHTS", dict)
    with pytest.raises(
        UnsupportedFeatureError, match=r"expected a free name .* found builtins.dict"
    ):
        register()


def test_every_public_name_can_be_imported():
    for name in safeweights_peft.__all__:
        assert getattr(safeweights_peft, name).__name__ == name
    assert set(safeweights_peft.__all__) <= set(dir(safeweights_peft))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = safeweights_peft.no_such_name
