"""huggingface_hub's own client, led to a Hub on loopback; and patches and maps to share there."""

import json
import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from safeweights_peft.patch.io import read_adapter, write_map
from tests.hub_server import HubServer
from tests.tiny_files import as_map, edit_config
from tests.tiny_jobs import content
from tests.tuner.patches import save_patch

BASE = "someone/tiny"
REPO = "ann/patch"
TOKEN = "hf_" + "a" * 34


@pytest.fixture
def server() -> Iterator[HubServer]:
    """A Hub on which ann has a token and someone has a base model."""
    server = HubServer()
    server.add_user("ann", TOKEN)
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Skip the waits before retries, and record how long they would have been.

    The back-offs of huggingface_hub and of the package call ``time.sleep`` of their own modules; in
    these modules alone it is another function.
    """
    waited: list[float] = []
    clock = types.SimpleNamespace(sleep=waited.append)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", clock)
    monkeypatch.setattr("safeweights_peft.fetching.time", clock)
    return waited


@pytest.fixture
def hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> HubServer:
    """The Hub, with the client in this process led to it, logged in as ann, its cache empty.

    The client reads HF_ENDPOINT and its like when it is imported, and the tests' other parts have
    imported it; so what it has read is set. What it does is not touched: `test_routes` has whole
    processes do the same by the environment alone.
    """
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    return server


@pytest.fixture(scope="session")
def made(tiny_llama_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random patch of the tiny base, and a map of the same entries, as `enhance` leaves them."""
    run = tmp_path_factory.mktemp("made") / "run"
    save_patch(tiny_llama_bf16, run / "patch")
    write_map(run / "map", as_map(read_adapter(run / "patch")))
    return run


@pytest.fixture
def base(server: HubServer, tiny_llama_bf16: Path) -> str:
    """The base model on the Hub; its commit."""
    server.add_repo(BASE, content(tiny_llama_bf16))
    return server.repos[BASE].refs["main"]


@pytest.fixture
def run(made: Path, base: str, tmp_path: Path) -> Path:
    """A run's directory whose patch and map name the base on the Hub."""
    out = tmp_path / "run"
    shutil.copytree(made, out)
    named = {"base_model_name_or_path": BASE, "revision": base}
    for folder in ("patch", "map"):
        edit_config(out / folder, lambda config: config.update(named))
    settings = {"base": BASE, "seed": 0}
    (out / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (out / "result.png").write_bytes(b"\x89PNG\r\n\x1a\n\0picture")
    return out
