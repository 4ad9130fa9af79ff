"""Loading by a repository's name, in whole processes that know of the Hub by the environment alone.

So huggingface_hub, transformers and PEFT are as anyone has them, from their import on.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from safeweights_peft.hub.push import push_to_hub
from safeweights_peft.patch.io import read_adapter
from tests.hub.conftest import BASE, REPO, TOKEN
from tests.hub_server import HubServer

PROLOGUE = f"""
import warnings
warnings.filterwarnings("error", message=".*tip of main.*")
import torch
import safeweights_peft
from peft import AutoPeftModelForCausalLM, PeftModel
from safeweights_peft import load_model
from transformers import AutoModelForCausalLM

BASE, REPO = {BASE!r}, {REPO!r}

def weights(model):
    return {{name: weight.clone() for name, weight in model.state_dict().items()}}

def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
"""

ROUTES = """
merged = weights(load_model(None, REPO))
assert same(merged, weights(load_model(BASE, f"{REPO}@main")))
plain = AutoModelForCausalLM.from_pretrained(BASE)
assert not same(merged, weights(plain))
assert same(merged, weights(PeftModel.from_pretrained(plain, REPO).merge_and_unload()))
auto = AutoPeftModelForCausalLM.from_pretrained(REPO)
assert same(merged, weights(auto.merge_and_unload()))
"""

PUSH = """
import sys
model = load_model(sys.argv[1], sys.argv[2], merge=False)
model.push_to_hub("ann/by-peft")
again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "ann/by-peft")
assert same(weights(model.merge_and_unload()), weights(again.merge_and_unload()))
"""

MOVED = """
try:
    load_model(None, REPO)
except UserWarning as warning:
    print(warning)
"""


def environment(server: HubServer, cache: Path, offline: bool = False) -> dict[str, str]:
    """What tells a process of the Hub."""
    ours = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_TOKEN": TOKEN,
    }
    return os.environ | ours


def run_afresh(code: str, variables: dict[str, str], *arguments: object) -> str:
    """Run code in a new interpreter, and return what it prints."""
    command = [sys.executable, "-c", PROLOGUE + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pushed(hub: HubServer, run: Path) -> HubServer:
    push_to_hub(run, REPO)
    return hub


def test_every_route_loads_a_patch_by_its_name_and_again_without_a_network(
    pushed: HubServer, tmp_path: Path
) -> None:
    cache = tmp_path / "home"
    run_afresh(ROUTES, environment(pushed, cache))
    pushed.reset_count()
    run_afresh(ROUTES, environment(pushed, cache, offline=True))
    assert pushed.log == []


def test_of_a_base_that_has_moved_on_the_recorded_commit_is_loaded_and_it_is_told(
    pushed: HubServer, base: str, tmp_path: Path
) -> None:
    config = pushed.repos[BASE].files()["config.json"]
    latest = pushed.repos[BASE].put({"model.safetensors": b"\0other", "config.json": config}).oid
    printed = run_afresh(MOVED, environment(pushed, tmp_path / "home"))
    assert f"{BASE}: expected commit {base}, which the patch was made for" in printed
    assert f"found {latest}" in printed


def test_peft_s_own_push_gives_a_repository_that_loads(
    hub: HubServer, made: Path, tiny_llama_bf16: Path, tmp_path: Path
) -> None:
    run_afresh(PUSH, environment(hub, tmp_path / "home"), tiny_llama_bf16, made / "patch")
    files = hub.repos["ann/by-peft"].files()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).write_bytes(files[name])
    there, here = read_adapter(out).metadata, read_adapter(made / "patch").metadata
    assert there.content_id == here.content_id
