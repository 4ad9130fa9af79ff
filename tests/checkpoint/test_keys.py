"""One key under several prefixes: one model, saved by classes with a head and without."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from safeweights_peft.checkpoint.reader import CheckpointReader
from safeweights_peft.errors import CheckpointError
from safeweights_peft.merging.merge import merge
from safeweights_peft.modeling.layout import describe
from safeweights_peft.patch.io import write_adapter
from tests.tiny_files import load_checkpoint, random_patch, save_checkpoint

PARTS = st.sampled_from(["model", "transformer", "h", "layers", "0", "1", "up", "gpt_neox"])
KEYS = st.lists(PARTS, max_size=4).map(lambda parts: ".".join([*parts, "weight"]))


def reader_of(folder: Path, keys: set[str]) -> CheckpointReader:
    return CheckpointReader(save_checkpoint(folder, {key: np.zeros(1, "f4") for key in keys}))


def is_prefix(path: str) -> bool:
    """Tell whether a dotted path names modules alone."""
    return path.endswith(".") and not any(part.isdigit() for part in path.split("."))


def slow_matches(key: str, keys: set[str]) -> set[str]:
    """Find all keys that another prefix away are this one, by trying each."""
    return {
        other
        for other in keys
        for short, long in [sorted((key, other), key=len)]
        if long.endswith(short) and is_prefix(long.removesuffix(short))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@given(key=KEYS, keys=st.sets(KEYS, min_size=1))
def test_a_key_is_found_under_any_prefix_unless_that_is_ambiguous(
    folder: Path, key: str, keys: set[str]
) -> None:
    reader, matches = reader_of(folder, keys), slow_matches(key, keys)
    if key in keys:
        assert reader.find_key(key) == key
    elif len(matches) > 1:
        with pytest.raises(CheckpointError, match=" and ".join(sorted(matches))):
            reader.find_key(key)
    else:
        assert {reader.find_key(key)} - {None} == matches


def test_an_ambiguous_key_is_refused_by_name(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, {"text.layers.0.up.weight", "vision.layers.0.up.weight"})
    message = (
        rf"^{tmp_path}: expected one tensor layers.0.up.weight, whatever its prefix, found "
        "text.layers.0.up.weight and vision.layers.0.up.weight; use the model class"
    )
    with pytest.raises(CheckpointError, match=message):
        reader.find_key("layers.0.up.weight")


@pytest.fixture(scope="module")
def gpt2(folder: Path) -> dict[str, tuple[PreTrainedModel, Path]]:
    """The same weights, saved with a head and without."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=20)
    whole = GPT2LMHeadModel(config)
    found = {}
    for name, model in {"GPT2LMHeadModel": whole, "GPT2Model": whole.transformer}.items():
        model.save_pretrained(folder / name)
        found[name] = model, folder / name
    return found


@pytest.mark.parametrize(
    ("source", "target"), [("GPT2LMHeadModel", "GPT2Model"), ("GPT2Model", "GPT2LMHeadModel")]
)
def test_a_patch_merges_into_the_same_weights_saved_by_another_class(
    gpt2: dict[str, tuple[PreTrainedModel, Path]], tmp_path: Path, source: str, target: str
) -> None:
    (model, own), (_, other) = gpt2[source], gpt2[target]
    names = [name for name, _ in model.named_parameters() if name.endswith("c_attn.weight")]
    adapter = random_patch(describe(model, names, own), load_checkpoint(own))
    write_adapter(tmp_path / "patch", adapter)
    merge(own, tmp_path / "patch", tmp_path / "own")
    merge(other, tmp_path / "patch", tmp_path / "other")
    expected, found, before = map(load_checkpoint, (tmp_path / "own", tmp_path / "other", other))
    assert expected.keys() != found.keys()
    for key, tensor in expected.items():
        bare = key.removeprefix("transformer.")
        same = bare if bare in found else f"transformer.{bare}"
        assert found[same].tobytes() == tensor.tobytes()
        assert (before[same].tobytes() != tensor.tobytes()) == key.endswith("c_attn.weight")
