"""Every attack through everything that makes something of an adapter: nothing is made of it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from safeweights_peft.errors import FormatError
from safeweights_peft.jobs.diff import diff
from safeweights_peft.jobs.export import export_supertuning
from safeweights_peft.jobs.job import Job
from safeweights_peft.merging.convert import convert
from safeweights_peft.merging.in_place import merge_in_place
from safeweights_peft.merging.merge import merge, plan
from safeweights_peft.merging.protect import protect
from safeweights_peft.merging.verify import verify
from safeweights_peft.study.compare import compare
from safeweights_peft.study.report import report_map
from tests.cli.conftest import call
from tests.hostile.attacks import ATTACKS, Attack, Stage
from tests.hostile.conftest import Broken
from tests.hostile.edits import top
from tests.tiny_jobs import content

Make = Callable[[Path, Path, Path], object]

MAKERS: dict[str, Make] = {
    "merge": lambda base, adapter, out: merge(base, adapter, out),
    "merge in place": lambda base, adapter, out: merge_in_place(base, adapter),
    "plan": lambda base, adapter, out: plan(base, [(adapter, 1.0)], out),
    "protect": lambda base, adapter, out: protect(base, base, adapter, out),
    "convert": lambda base, adapter, out: convert(adapter, "compact", out, base),
    "export": lambda base, adapter, out: export_supertuning(adapter, out, str(base)),
    "report": lambda base, adapter, out: report_map(adapter, out, str(base)),
    "compare": lambda base, adapter, out: compare([adapter, adapter]),
    "diff": lambda base, adapter, out: diff(Job(base), str(base), out, map_dir=adapter),
}
TAKE_MAPS = ("protect", "convert", "report", "compare", "diff")
ONLY_MAPS = ("diff",)

COMMANDS = {
    "inspect": "inspect {adapter}",
    "verify": "verify {adapter} --base {base}",
    "merge": "merge {base} {adapter} --out {out}",
    "merge in place": "merge {base} {adapter} --in-place",
    "convert": "convert {adapter} --encoding compact --base {base} --out {out}",
    "export": "export {adapter} --to supertuning --base {base} --out {out}",
    "report": "report {adapter} --base {base} --out {out}",
    "compare": "compare {adapter} {adapter}",
}


def cases(kind: str) -> list[Attack]:
    return [attack for attack in ATTACKS if kind in attack.kinds]


def is_told(attack: Attack, text: str) -> bool:
    """Tell whether the file or the tensor, and what is wrong, stand in one line."""
    return re.search(attack.message, text) is not None


@pytest.fixture(scope="module")
def files(tiny_llama: Path) -> dict[str, bytes]:
    """The base's files, which stay as they are."""
    return content(tiny_llama)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("patch", name) for name in MAKERS if name not in ONLY_MAPS]
    + [("map", name) for name in TAKE_MAPS],
)
def test_nothing_is_made_of_a_broken_adapter(
    kind: str, name: str, tiny_llama: Path, files: dict[str, bytes], broken: Broken, tmp_path: Path
) -> None:
    for attack in cases(kind):
        folder = broken(kind, attack)
        with pytest.raises(FormatError) as caught:
            MAKERS[name](tiny_llama, folder, tmp_path / "out")
        assert is_told(attack, str(caught.value)), attack.name
        assert list(tmp_path.iterdir()) == [], attack.name
    assert content(tiny_llama) == files


@pytest.mark.parametrize("kind", ["patch", "map"])
def test_verifying_tells_what_is_broken(kind: str, tiny_llama: Path, broken: Broken) -> None:
    for attack in cases(kind):
        report = verify(broken(kind, attack), tiny_llama)
        assert not report.ok, attack.name
        assert is_told(attack, report.checks[-1].detail), attack.name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_tells_of_a_broken_patch_in_one_line(
    command: str, tiny_llama: Path, files: dict[str, bytes], broken: Broken, tmp_path: Path
) -> None:
    for attack in cases("patch"):
        if command == "inspect" and attack.stage is Stage.TENSORS:
            continue  # it reads no tensors
        places = {"adapter": broken("patch", attack), "base": tiny_llama, "out": tmp_path / "out"}
        called = call(*(part.format(**places) for part in COMMANDS[command].split()))
        assert called.exit_code in (1, 2, 3), attack.name
        (line,) = [line for line in called.output.splitlines() if is_told(attack, line)]
        assert line.isprintable(), attack.name
        assert "Traceback" not in called.output
        assert list(tmp_path.iterdir()) == [], attack.name
    assert content(tiny_llama) == files


def test_a_sound_patch_whose_base_clears_the_screen_is_shown_in_letters(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound["patch"], tmp_path / "patch"))
    top(base_model_name_or_path="\x1b[2Jbase", revision="\x1b]0;root\a")(folder)
    for command in ("inspect", "report --out out", "convert --encoding compact --out out"):
        name, *options = command.split()
        called = call(name, folder, *options)
        assert "\x1b" not in called.output
        assert "\\x1b[2Jbase" in called.output
