"""Every attack is seen by whatever reads as far as it, and told in one line."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from safeweights_peft.errors import FormatError
from safeweights_peft.patch.io import inspect, read_artifact, read_metadata, validate
from tests.hostile.attacks import ATTACKS, Attack, Stage
from tests.hostile.conftest import Broken
from tests.hostile.edits import CONTENT, Edit, coded, float_planes, frame, gap_frame

CASES = [(kind, attack) for attack in ATTACKS for kind in attack.kinds]
IDS = [f"{attack.name}-{kind}" for kind, attack in CASES]
READERS = {
    read_metadata: Stage.CONFIG,
    inspect: Stage.HEADER,
    validate: Stage.TENSORS,
    read_artifact: Stage.TENSORS,
}


def all_planes(array: np.ndarray) -> list[bytes]:
    return [frame(plane) for plane in float_planes(array)]


def test_the_attacks_have_names_of_their_own() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_what_is_attacked_is_sound(kind: str, sound: dict[str, Path]) -> None:
    for read in READERS:
        read(sound[kind])


@pytest.mark.parametrize("edit", [gap_frame(frame), coded(CONTENT, all_planes, "planes")])
@pytest.mark.parametrize("kind", ["patch", "map"])
def test_streams_are_sound_until_they_are_attacked(
    kind: str, edit: Edit, sound: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound[kind], tmp_path / kind))
    edit(folder)
    found, expected = read_artifact(folder), read_artifact(sound[kind])
    for name, indices in expected.indices.items():
        np.testing.assert_array_equal(found.indices[name], indices)


@pytest.mark.parametrize(("kind", "attack"), CASES, ids=IDS)
def test_an_attack_is_told_by_every_reader_that_comes_to_it(
    kind: str, attack: Attack, broken: Broken
) -> None:
    folder = broken(kind, attack)
    for read, reach in READERS.items():
        if reach < attack.stage:
            read(folder)
            continue
        with pytest.raises(FormatError) as caught:
            read(folder)
        message = str(caught.value)
        assert re.search(attack.message, message)
        assert str(folder) in message
        assert message.isprintable()
        assert len(message) < 1000 + len(str(folder))
