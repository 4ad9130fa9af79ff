"""Every attack through every way into a model: an error, no output, and the base as it was.

PEFT and transformers read the config before this package is asked. Where that is no config of ours
(``UNKNOWN``), their own errors are what there is; they too leave the model alone.
"""

import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from safeweights_peft import preserve
from safeweights_peft.errors import BaseMismatchError, FormatError, ModelError
from safeweights_peft.jobs.load import load_model
from tests.hostile.attacks import ATTACKS, OTHER_BASE, UNKNOWN, Attack
from tests.hostile.conftest import Broken
from tests.tuner.patches import load_base, logits, same_weights

State = dict[str, torch.Tensor]
Load = Callable[[nn.Module, Path], nn.Module]

STUMBLES = (ValueError, KeyError, TypeError, RecursionError)
"""What a config that is none of ours, or no JSON, makes PEFT and transformers raise."""


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> nn.Module:
    """One base for all attacks: none may change it."""
    return load_base(tiny_llama)


@pytest.fixture(scope="module")
def original(base: nn.Module) -> nn.Module:
    return deepcopy(base)


def by_peft(base: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder)


def by_peft_to_protect(base: nn.Module, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def by_auto_peft(base: nn.Module, folder: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(folder)


def by_transformers(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(folder)
    return base


def by_auto_model(base: nn.Module, folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def by_load_model(base: nn.Module, folder: Path) -> nn.Module:
    return load_model(None, folder)


def by_preserve(base: nn.Module, folder: Path) -> nn.Module:
    with preserve(base, folder):
        return base


def refusal(load: Load, base: nn.Module, folder: Path, attack: Attack) -> BaseException:
    """Load, and run what was loaded; give the error."""
    expected: tuple[type[Exception], ...] = (FormatError,)
    if attack.name in OTHER_BASE:
        expected += (BaseMismatchError,)
    if attack.name == "base of a number" and load is by_load_model:
        expected += (ModelError,)  # asked for before all else
    if attack.name in UNKNOWN and load not in (by_load_model, by_preserve):
        expected += STUMBLES
    with pytest.raises(expected) as caught:
        logits(load(base, folder))
    return caught.value


def check_message(error: BaseException, attack: Attack) -> None:
    """A message of ours names the tensor or the file, as PEFT's loading or as the file has it."""
    if isinstance(error, FormatError):
        _, _, pattern = attack.message.partition(".*")
        assert re.search(pattern, str(error))
        assert str(error).isprintable()


def cases(kind: str) -> list[Attack]:
    return [attack for attack in ATTACKS if kind in attack.kinds]


def ids(attack: object) -> str:
    return attack.name if isinstance(attack, Attack) else attack.__name__


@pytest.mark.parametrize("attack", cases("patch"), ids=ids)
@pytest.mark.parametrize("load", [by_peft, by_load_model, by_preserve], ids=ids)
def test_a_broken_patch_leaves_the_model_alone(
    load: Load, attack: Attack, base: nn.Module, original: nn.Module, broken: Broken
) -> None:
    check_message(refusal(load, base, broken("patch", attack), attack), attack)
    assert same_weights(base, original)


@pytest.mark.parametrize("attack", cases("map"), ids=ids)
@pytest.mark.parametrize("load", [by_peft_to_protect, by_preserve], ids=ids)
def test_a_broken_map_leaves_the_model_alone(
    load: Load, attack: Attack, base: nn.Module, original: nn.Module, broken: Broken
) -> None:
    check_message(refusal(load, base, broken("map", attack), attack), attack)
    assert same_weights(base, original)
    base(input_ids=torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("attack", cases("patch"), ids=ids)
@pytest.mark.parametrize("load", [by_auto_peft, by_auto_model], ids=ids)
def test_a_broken_patch_that_brings_its_base_gives_no_output(
    load: Load, attack: Attack, base: nn.Module, broken: Broken
) -> None:
    if attack.name == "base of a number" and load is by_auto_model:
        pytest.skip("transformers looks for that base on the Hub first")
    check_message(refusal(load, base, broken("patch", attack), attack), attack)


@pytest.mark.parametrize("attack", cases("patch"), ids=ids)
def test_transformers_loads_nothing_of_a_broken_patch(
    attack: Attack, tiny_llama: Path, original: nn.Module, sound: dict[str, Path], broken: Broken
) -> None:
    model = load_base(tiny_llama)
    check_message(refusal(by_transformers, model, broken("patch", attack), attack), attack)
    if getattr(model, "peft_config", None):  # the content is looked at when the model first runs
        model.delete_adapter("default")
    assert torch.equal(logits(model), logits(original))
    kept = {key: each for key, each in model.state_dict().items()}
    assert all(torch.equal(kept[key], each) for key, each in original.state_dict().items())


def put_on_the_hub(folder: Path, cache: Path) -> str:
    """Put an adapter into a cache as the Hub's client does: links to blobs. Give its id."""
    commit = "0" * 40
    repo = cache / "models--someone--adapter"
    for name in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    return "someone/adapter"


def by_peft_from_the_hub(base: nn.Module, name: str, cache: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, name, cache_dir=str(cache))


def by_transformers_from_the_hub(base: nn.Module, name: str, cache: Path) -> nn.Module:
    base.load_adapter(name, adapter_kwargs={"cache_dir": str(cache)})
    return base


@pytest.mark.parametrize("load", [by_peft_from_the_hub, by_transformers_from_the_hub], ids=ids)
def test_links_into_the_cache_of_the_hub_are_read(
    load: Callable[..., nn.Module], tiny_llama: Path, sound: dict[str, Path], tmp_path: Path
) -> None:
    name = put_on_the_hub(sound["patch"], tmp_path)
    expected = logits(PeftModel.from_pretrained(load_base(tiny_llama), sound["patch"]))
    assert torch.equal(logits(load(load_base(tiny_llama), name, tmp_path)), expected)


@pytest.mark.parametrize("attack", ["a weight of the base", "a record less", "only pickles"])
@pytest.mark.parametrize("load", [by_peft_from_the_hub, by_transformers_from_the_hub], ids=ids)
def test_what_comes_from_the_hub_is_checked_before_it_is_loaded(
    load: Callable[..., nn.Module],
    attack: str,
    base: nn.Module,
    original: nn.Module,
    broken: Broken,
    tmp_path: Path,
) -> None:
    (found,) = [entry for entry in ATTACKS if entry.name == attack]
    name = put_on_the_hub(broken("patch", found), tmp_path)
    with pytest.raises(FormatError, match=r"expected (only tensors|adapter_model)"):
        load(base, name, tmp_path)
    assert same_weights(base, original)


def test_after_all_attacks_the_same_model_takes_the_sound_patch(
    base: nn.Module, tiny_llama: Path, sound: dict[str, Path]
) -> None:
    expected = logits(PeftModel.from_pretrained(load_base(tiny_llama), sound["patch"]))
    assert torch.equal(logits(PeftModel.from_pretrained(base, sound["patch"])), expected)
