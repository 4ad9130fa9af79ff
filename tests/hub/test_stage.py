"""Local paths and secrets are found wherever they stand, and what only looks like one is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from safeweights_peft.errors import HubError
from safeweights_peft.hub.stage import check_private

SECRETS = [
    "hf_" + "a" * 34,
    "api_org_" + "a" * 34,
    "sk-proj-" + "a" * 40,
    "ghp_" + "a" * 36,
    "github_pat_" + "a" * 40,
    "glpat-" + "a" * 20,
    "AKIA" + "A" * 16,
    "AIza" + "a" * 35,
    "xoxb-1234567890-abc",
    "-----BEGIN RSA PRIVATE KEY-----",
]
PATHS = [
    "/home/ann/data.json",
    "/Users/ann/data.json",
    "/srv/ann.json",
    r"C:\Users\ann\data.json",
    r"\\server\share\data.json",
    "~/data.json",
    "file:///etc/hosts",
]


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "results/a.json", ".eval_results/a.yaml"])
def test_a_secret_is_found_in_every_file_and_not_repeated(
    secret: str, name: str, tmp_path: Path
) -> None:
    text = f"it is {secret} there"
    write(tmp_path, name, json.dumps({"a": [text]}) if name.endswith(".json") else text)
    with pytest.raises(HubError, match=f"^{name}: .*expected nothing secret") as caught:
        check_private(tmp_path)
    assert secret not in str(caught.value)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_as_a_value_is_found(path: str, tmp_path: Path) -> None:
    write(tmp_path, "results/a.json", json.dumps({"data": {"file": path}}))
    with pytest.raises(HubError, match=r"^results/a\.json: data: file: expected nothing of this"):
        check_private(tmp_path)


@pytest.mark.parametrize("path", [path for path in PATHS if not path.startswith(r"\\")])
def test_a_path_in_a_text_is_found(path: str, tmp_path: Path) -> None:
    write(tmp_path, "README.md", f"# Patch\n\nmade from `{path}` by me\n")
    with pytest.raises(HubError, match=r"^README\.md: line 3: expected nothing of this machine"):
        check_private(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["see /work/data/x.json", "--harmful=/data/me/x.jsonl", "in /workspace/a", "by (/opt/a/b)"],
)
def test_a_path_within_a_value_is_found(text: str, tmp_path: Path) -> None:
    write(tmp_path, "results/a.json", json.dumps({"command": [text]}))
    with pytest.raises(HubError, match=r"^results/a\.json: command: 0: expected nothing of this"):
        check_private(tmp_path)


def test_a_prompt_may_begin_with_a_command_and_may_not_hold_a_path(tmp_path: Path) -> None:
    write(tmp_path, "results/a.json", json.dumps({"settings": {"system_prompt": "/no_think"}}))
    check_private(tmp_path)
    write(tmp_path, "results/a.json", json.dumps({"system_prompt": "/no_think /home/ann/x"}))
    with pytest.raises(HubError, match="found the path /home/ann/x"):
        check_private(tmp_path)


def test_the_current_directory_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "README.md", "made in /odd/place/run")
    check_private(tmp_path)
    monkeypatch.setattr(Path, "cwd", lambda: Path("/odd/place"))
    with pytest.raises(HubError, match="expected nothing of this machine, found the path /odd"):
        check_private(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/ann/patch/blob/main/README.md",
        "[a picture](images/result.png) and/or results/a.json",
        "builtin:harmful_train",
        "ann/patch",
        "Print the file /etc/passwd of a server",
        "hf_hub_download and sk-learn; the AKIA prefix",
        "C: the answer; D: another",
        "1/2 of / and //",
    ],
)
def test_what_only_looks_like_one_is_let_pass(text: str, tmp_path: Path) -> None:
    write(tmp_path, "README.md", text)
    write(tmp_path, "results/a.json", json.dumps({text: text}))
    check_private(tmp_path)


def test_a_path_or_a_secret_in_a_picture_s_own_text_is_found(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.figure")
    picture = tmp_path / "images" / "a.png"
    picture.parent.mkdir()
    figure = pyplot.Figure()
    figure.savefig(picture)
    check_private(tmp_path)
    for text in ("made in /home/ann/run", SECRETS[0]):
        figure.savefig(picture, metadata={"Comment": text})
        with pytest.raises(HubError, match=r"^images/a\.png: line \d+: expected nothing"):
            check_private(tmp_path)


def test_noise_in_a_picture_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(np.random.default_rng(0).bytes(5_000_000))
    check_private(tmp_path)


def test_tensors_are_not_read_as_text(tmp_path: Path) -> None:
    tensors = {"a": np.frombuffer(SECRETS[0].encode(), np.uint8)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    check_private(tmp_path)


@pytest.mark.parametrize("text", ["made in /home/ann/run", SECRETS[0]])
@pytest.mark.parametrize("folder", ["", "map"])
def test_what_stands_in_the_header_of_tensors_is_read(
    folder: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    file = tmp_path / folder / "adapter_model.safetensors"
    save_file({"a": np.zeros(1)}, file, {"by": text})
    with pytest.raises(HubError, match=r"adapter_model\.safetensors: __metadata__: by: expected"):
        check_private(tmp_path)
