"""Streams that break a rule: on every route an error that names the tensor, and nothing loaded."""

import json
import shutil

import numpy as np
import pytest
import torch
import zstandard
from safetensors.numpy import load_file, save_file

from safeweights_peft import (
    AlreadyMergedError,
    BaseMismatchError,
    CorruptAdapterError,
    UnsupportedVersionError,
    merge,
)
from safeweights_peft.delta import digest
from safeweights_peft.patch.records import indices_key, values_key
from tests.tiny_models import save_tiny_llama
from tests.tuner.patches import (
    ROUTES,
    compact,
    edit_config,
    load_base,
    load_by_peft,
    load_by_transformers,
    logits,
    save_patch,
)

VICTIM = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tiny_llama_bf16, tmp_path_factory):
    """A good compact patch; copy it before breaking it."""
    folder = tmp_path_factory.mktemp("good")
    return compact(tiny_llama_bf16, save_patch(tiny_llama_bf16, folder / "plain"), folder / "good")


@pytest.fixture
def patch(good, tmp_path):
    """A compact patch to break."""
    return shutil.copytree(good, tmp_path / "patch")


def rewrite(patch, kind, edit):
    """Change the frames of one stream, and (like a careful forger) all that the config says."""
    key = {"indices": indices_key, "values": values_key}[kind](VICTIM)
    config = json.loads((patch / "adapter_config.json").read_text(encoding="utf-8"))
    record = config["tensors"][VICTIM]
    stream = record["streams"][kind]
    tensors = load_file(patch / "adapter_model.safetensors")
    frames = np.split(tensors[key], np.cumsum(stream["bytes"])[:-1])
    frames = edit([frame.tobytes() for frame in frames])
    stream["bytes"] = [len(frame) for frame in frames]
    tensors[key] = np.frombuffer(b"".join(frames), np.uint8)
    record["digest"] = digest(tensors[indices_key(VICTIM)], tensors[values_key(VICTIM)])
    record["content_digest"] = None
    save_file(tensors, patch / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_config(patch, **config)


def bomb(frames):
    return [zstandard.compress(bytes(2**20)), *frames[1:]]


def truncate(frames):
    return [frames[0][:-3], *frames[1:]]


def noise(frames):
    return [bytes(range(1, 60)), *frames[1:]]


def refill(byte):
    def edit(frames):
        size = zstandard.frame_content_size(frames[0])
        return [zstandard.compress(bytes([byte]) * size), *frames[1:]]

    return edit


ATTACKS = {
    "a bomb for indices": ("indices", bomb),
    "a bomb for values": ("values", bomb),
    "truncated indices": ("indices", truncate),
    "truncated values": ("values", truncate),
    "noise for indices": ("indices", noise),
    "noise for values": ("values", noise),
    "indices past the end": ("indices", refill(254)),
    "nothing but escapes": ("indices", refill(255)),
}


def weights(model):
    """Give a model's own weights, by their names without adapters."""
    return {
        key: tensor.clone()
        for key, tensor in model.state_dict().items()
        if "safeweights" not in key
    }


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_stream_is_named_on_every_route(tiny_llama_bf16, patch, load, attack):
    rewrite(patch, *ATTACKS[attack])
    with pytest.raises(CorruptAdapterError, match=r"layers.1.mlp.up_proj.*expected"):
        logits(load(tiny_llama_bf16, patch))


@pytest.mark.parametrize("load", [load_by_peft, load_by_transformers])
def test_a_bad_stream_leaves_the_weights_of_the_model_as_they_were(tiny_llama_bf16, patch, load):
    rewrite(patch, "values", truncate)
    model = load_base(tiny_llama_bf16)
    with pytest.MonkeyPatch.context() as context:
        context.setattr("tests.tuner.patches.load_base", lambda base: model)
        with pytest.raises(CorruptAdapterError, match="up_proj"):
            load(tiny_llama_bf16, patch)
    expected = weights(load_base(tiny_llama_bf16))
    assert expected.keys() == weights(model).keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(model).items())
    if load is load_by_peft:
        assert torch.equal(logits(model), logits(load_base(tiny_llama_bf16)))
        return
    with pytest.raises(CorruptAdapterError, match=r"expected (loaded indices|a whole zstd frame)"):
        logits(model)  # transformers gives no chance to take the patch out; it doesn't run


@pytest.mark.parametrize("load", ROUTES)
def test_a_flipped_byte_gives_no_output_on_any_route(tiny_llama_bf16, patch, load):
    path = patch / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[values_key(VICTIM)][-1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CorruptAdapterError, match=r"up_proj.*expected"):
        logits(load(tiny_llama_bf16, patch))


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize("kind", ["indices", "values"])
def test_a_stream_of_another_size_gives_no_output_on_any_route(tiny_llama_bf16, patch, load, kind):
    config = json.loads((patch / "adapter_config.json").read_text(encoding="utf-8"))
    config["tensors"][VICTIM]["streams"][kind]["bytes"][0] += 1
    edit_config(patch, **config)
    with pytest.raises((CorruptAdapterError, RuntimeError), match=r"up_proj|mismatch"):
        logits(load(tiny_llama_bf16, patch))


@pytest.mark.parametrize("load", ROUTES)
def test_no_room_is_made_for_more_bytes_than_a_stream_can_have(tiny_llama_bf16, patch, load):
    config = json.loads((patch / "adapter_config.json").read_text(encoding="utf-8"))
    config["tensors"][VICTIM]["streams"]["values"]["bytes"][0] = 10**15
    edit_config(patch, **config)
    with pytest.raises(CorruptAdapterError, match="up_proj"):
        load(tiny_llama_bf16, patch)


@pytest.mark.parametrize("load", ROUTES)
@pytest.mark.parametrize("key", [indices_key(VICTIM), values_key(VICTIM)])
def test_a_missing_stream_gives_no_output_on_any_route(tiny_llama_bf16, patch, load, key):
    path = patch / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CorruptAdapterError, match="up_proj"):
        logits(load(tiny_llama_bf16, patch))


@pytest.mark.parametrize("load", ROUTES)
def test_an_unknown_coding_is_refused_on_every_route(tiny_llama_bf16, patch, load):
    config = json.loads((patch / "adapter_config.json").read_text(encoding="utf-8"))
    config["tensors"][VICTIM]["streams"]["values"]["coding"] = "pickle"
    edit_config(patch, **config)
    with pytest.raises(UnsupportedVersionError, match="coding"):
        load(tiny_llama_bf16, patch)


@pytest.mark.parametrize("load", ROUTES)
def test_a_wrong_base_gives_no_output_on_any_route(patch, load, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    with pytest.raises(BaseMismatchError, match="expected the base that the adapter was made for"):
        logits(load(other, patch))


@pytest.mark.parametrize("load", ROUTES)
def test_a_merged_base_is_called_merged_on_every_route(tiny_llama_bf16, patch, load, tmp_path):
    plain = load_by_peft(tiny_llama_bf16, patch)
    plain.save_pretrained(tmp_path / "plain")
    merge(tiny_llama_bf16, tmp_path / "plain", tmp_path / "merged")
    with pytest.raises(AlreadyMergedError, match="found the adapter's merged ones"):
        logits(load(tmp_path / "merged", patch))


def test_a_bad_second_patch_leaves_the_first_in_use(tiny_llama_bf16, good, patch):
    rewrite(patch, "indices", truncate)
    model = load_by_peft(tiny_llama_bf16, good)
    expected = logits(model)
    with pytest.raises(CorruptAdapterError, match="up_proj"):
        model.load_adapter(patch, "bad")
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]
