"""Small files that ask for much: what reading them costs, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.attacks import ATTACKS
from tests.hostile.conftest import Broken
from tests.hostile.edits import CONFIG, TENSORS

_READ = """
import json, os, resource, sys
import safeweights_peft.patch.io as format
from safeweights_peft.errors import FormatError


def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cost(folder):
    before = peak_bytes()
    try:
        format.read_artifact(folder)
        error_name = None
    except FormatError as error:
        error_name = type(error).__name__
    return peak_bytes() - before, error_name


for folder in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        try:
            print(json.dumps(cost(folder)), flush=True)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
"""

MB = 10**6


def costs(folders: list[Path]) -> list[tuple[int, str | None]]:
    """Read adapters, each in a process of its own: how far memory grew, and the error."""
    command = [sys.executable, "-c", _READ]
    given = json.dumps([str(folder) for folder in folders])
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(folders), done.stderr
    return [(size, error_name) for size, error_name in found]


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_no_attack_takes_much_memory(kind: str, broken: Broken) -> None:
    attacks = [attack for attack in ATTACKS if kind in attack.kinds]
    found = costs([broken(kind, attack) for attack in attacks])
    for attack, (size, error_name) in zip(attacks, found, strict=True):
        assert error_name is not None, attack.name
        assert size < 30 * MB, attack.name


def test_a_config_of_many_lists_costs_memory_in_proportion(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    """An empty list takes three bytes in the file, and 64 in memory."""
    folders = []
    for count in (0, 10**6):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / TENSORS).symlink_to(sound["patch"] / TENSORS)
        many = b'"selection": {"a": [' + b",".join([b"[]"] * count) + b"]}"
        config = (sound["patch"] / CONFIG).read_bytes()
        (folder / CONFIG).write_bytes(config.replace(b'"selection": {}', many))
        folders.append(folder)
    (small, error_name), (large, other_name) = costs(folders)
    assert error_name is other_name is None
    assert large - small < 40 * (folders[1] / CONFIG).stat().st_size
