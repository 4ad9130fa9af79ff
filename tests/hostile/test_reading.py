"""Every attack is seen by whatever reads as far as it, and told in one line."""

import re
from pathlib import Path

import pytest

from safeweights_peft.errors import FormatError
from safeweights_peft.format import inspect, read_artifact, read_metadata, validate
from tests.hostile.attacks import ATTACKS, Attack, Stage
from tests.hostile.conftest import Broken

CASES = [(kind, attack) for attack in ATTACKS for kind in attack.kinds]
IDS = [f"{attack.name}-{kind}" for kind, attack in CASES]
READERS = {
    read_metadata: Stage.CONFIG,
    inspect: Stage.HEADER,
    validate: Stage.TENSORS,
    read_artifact: Stage.TENSORS,
}


def test_the_attacks_have_names_of_their_own() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_what_is_attacked_is_sound(kind: str, sound: dict[str, Path]) -> None:
    for read in READERS:
        read(sound[kind])


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
