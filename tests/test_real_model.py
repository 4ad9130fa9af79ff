"""The demo's patch of SmolLM2-135M-Instruct: every way of using it says the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import safeweights_peft  # noqa: F401 - registers the method with PEFT
from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.cli import main
from safeweights_peft.errors import BaseMismatchError
from safeweights_peft.patch.io import read_adapter

ROOT = Path(__file__).parents[1]
BASE, RUN = ROOT / "demo" / "base", ROOT / "demo" / "run"
PATCH = RUN / "patch"
REQUEST = "What should I see in Paris?"

pytestmark = pytest.mark.real_model


@pytest.fixture(autouse=True)
def _demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch names its base as `make demo` did, from the root of the checkout."""
    for path in (BASE, RUN / "result.json"):
        assert path.exists(), f"{path}: expected what `make demo` leaves, found none; run it"
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the patch, as `safeweights merge` writes it."""
    out = tmp_path_factory.mktemp("merged") / "checkpoint"
    assert call("merge", BASE, PATCH, "--out", out).exit_code == 0
    return out


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((RUN / "result.json").read_text())


@pytest.fixture
def wrong_base(tmp_path: Path) -> Path:
    """The base with one bit turned over, in one entry that the patch changes."""
    out = shutil.copytree(BASE, tmp_path / "wrong")
    adapter = read_adapter(PATCH)
    name, delta = next(iter(adapter.deltas.items()))
    (block,) = adapter.metadata.tensors[name].blocks
    info = CheckpointReader(BASE).info(block.key)
    with (out / info.shard).open("r+b") as file:
        file.seek(info.offset + 2 * int(delta.indices[0]))  # bfloat16: two bytes an entry
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return out


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def load_by_peft() -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), PATCH)


def load_by_auto_peft() -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(PATCH)


def load_by_transformers() -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.load_adapter(PATCH)
    return model


def load_by_auto_model() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(PATCH)


ROUTES = [load_by_peft, load_by_auto_peft, load_by_transformers, load_by_auto_model]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    turn = [{"role": "user", "content": REQUEST}]
    inputs = AutoTokenizer.from_pretrained(BASE).apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("load", ROUTES)
def test_every_way_of_loading_runs_the_merged_model(
    load: Callable[[], nn.Module], merged: Path
) -> None:
    assert torch.equal(logits(load()), logits(AutoModelForCausalLM.from_pretrained(merged)))


def test_the_patch_changes_what_the_model_says() -> None:
    assert not torch.equal(
        logits(load_by_peft()), logits(AutoModelForCausalLM.from_pretrained(BASE))
    )


def test_peft_and_the_command_line_merge_to_the_same_bits(merged: Path) -> None:
    found = load_by_peft().merge_and_unload().state_dict()
    expected = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_taking_a_merge_back_restores_the_base_bit_by_bit() -> None:
    model = load_by_peft()
    model.merge_adapter()
    model.unmerge_adapter()
    found = model.unload().state_dict()
    expected = AutoModelForCausalLM.from_pretrained(BASE).state_dict()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_verify_knows_the_base() -> None:
    called = call("verify", PATCH, "--base", BASE)
    assert called.exit_code == 0
    assert "holds the base values" in called.stdout


def test_verify_knows_the_merged_model(merged: Path) -> None:
    called = call("verify", PATCH, "--base", BASE, "--merged", merged)
    assert called.exit_code == 0, called.output


def test_verify_does_not_take_the_merged_model_for_the_base(merged: Path) -> None:
    assert call("verify", PATCH, "--base", merged).exit_code == 3


def test_verify_notices_one_bit_of_another_base(wrong_base: Path) -> None:
    assert call("verify", PATCH, "--base", wrong_base).exit_code == 1


def test_merge_refuses_another_base(wrong_base: Path, tmp_path: Path) -> None:
    called = call("merge", wrong_base, PATCH, "--out", tmp_path / "merged")
    assert called.exit_code == 1
    assert not (tmp_path / "merged").exists()


def test_peft_refuses_another_base(wrong_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(wrong_base)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(model, PATCH)


def test_the_attack_success_rate_fell_beyond_doubt(result: dict[str, Any]) -> None:
    before, after = (result[stage]["attack_success_rate"] for stage in ("before", "after"))
    assert after["high"] < before["low"]


def test_most_benign_requests_are_still_answered(result: dict[str, Any]) -> None:
    assert result["after"]["over_refusal_rate"]["rate"] < 0.5


def test_every_rate_lies_in_its_interval(result: dict[str, Any]) -> None:
    for stage in ("before", "after"):
        for name in ("attack_success_rate", "over_refusal_rate"):
            rate = result[stage][name]
            assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
            assert rate["rate"] == rate["count"] / rate["n"]


def test_the_patch_holds_the_share_of_weights_that_was_asked_for(result: dict[str, Any]) -> None:
    share, density = result["patch"]["share_of_weights"], result["settings"]["score"]["density"]
    assert share == pytest.approx(density, rel=1e-5)


def test_the_patch_takes_six_bytes_an_entry(result: dict[str, Any]) -> None:
    """Four for an index and two for a bfloat16 value; the header is below a twentieth of it."""
    patch = result["patch"]
    assert patch["size_bytes"] == (PATCH / "adapter_model.safetensors").stat().st_size
    assert 6 < patch["size_bytes"] / patch["entries"] < 6.3
