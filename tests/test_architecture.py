"""The house keeps its shape: which room may import which, what loads when, how code is laid out."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "safeweights_peft"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "datasets", "accelerate", "matplotlib"}
NUMPY_ROOMS = (
    "delta",
    "progress",
    "rates",
    "scales",
    "schema",
    "settings",
    "tables",
    "cards",
    "files",
    "patch",
    "checkpoint",
    "merging",
    "signing",
    "study.compare",
)
CARDS = ("lora", "merged", "patch", "preserved", "shared")
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 100

SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]


def top_level_modules(code: str) -> set[str]:
    """Runs code in a fresh interpreter and tells which top-level modules it has loaded."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Checks the import contracts of a checkout."""
    command = [LINT_IMPORTS, "--no-cache", "--no-logo"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


def module_names(room: str) -> Iterator[str]:
    """Names the modules of a room: itself, and for a folder each file in it."""
    yield f"safeweights_peft.{room}"
    for path in sorted((PACKAGE / room.replace(".", "/")).glob("[!_]*.py")):
        yield f"safeweights_peft.{room}.{path.stem}"


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Finds every function and class of a file, however deep."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def undocumented(body: list[ast.stmt]) -> Iterator[str]:
    """Finds public functions, classes and methods that have no docstring."""
    for node in body:
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not (is_function or isinstance(node, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{node.name} (line {node.lineno})"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("delta.py", "def late():\n    import torch\n", "safeweights_peft.delta -> torch"),
        (
            "errors.py",
            "import safeweights_peft.delta\n",
            "safeweights_peft.errors -> safeweights_peft.delta",
        ),
        ("attic.py", "", "safeweights_peft.attic"),
        (
            "tuner/parameter.py",
            "if TYPE_CHECKING:\n    import safeweights_peft.tuner.layer\n",
            "safeweights_peft.tuner.parameter -> safeweights_peft.tuner.layer",
        ),
    ],
    ids=[
        "torch in a numpy room",
        "an import upwards",
        "a file without a room",
        "a circle for the types alone",
    ],
)
def test_a_broken_import_contract_is_noticed(
    tmp_path: Path, file: str, code: str, complaint: str
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    with (tmp_path / PACKAGE.name / file).open("a") as source:
        source.write(code)
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert complaint in done.stdout


def test_the_contract_on_torch_covers_the_rooms_that_are_tried_without_it() -> None:
    light = next(contract for contract in CONTRACTS if contract["id"] == "light")
    assert light["source_modules"] == [f"safeweights_peft.{room}" for room in NUMPY_ROOMS]


def test_the_package_holds_code_prompts_templates_and_the_typing_marker_only() -> None:
    others = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".pyi"}
    }
    templates = {f"templates/{name}.md.jinja" for name in CARDS} | {"templates/report.html.jinja"}
    named = {path.as_posix() for path in others if path.parts[0] != "prompts"}
    assert named == {*templates, "py.typed"}


def test_the_probe_for_loaded_modules_notices_torch() -> None:
    assert "torch" in top_level_modules("import torch")


@pytest.mark.parametrize("room", NUMPY_ROOMS)
def test_a_numpy_room_loads_nothing_heavy(room: str) -> None:
    code = "\n".join(f"import {name}" for name in module_names(room))
    assert not top_level_modules(code) & {*HEAVY, "click"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not top_level_modules("import safeweights_peft") & HEAVY


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = (
        "import click\n"
        "from safeweights_peft.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "for name in main.list_commands(click.Context(main)):\n"
        "    main([name, '--help'], standalone_mode=False)\n"
    )
    assert not top_level_modules(code) & HEAVY


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=relative)
def test_a_file_fits_one_reading(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=relative)
def test_no_function_is_long(path: Path) -> None:
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in definitions(path)
        if not isinstance(node, ast.ClassDef) and node.end_lineno is not None
    }
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_name_says_what_is_inside(path: Path) -> None:
    words = {
        word for part in path.relative_to(PACKAGE).with_suffix("").parts for word in part.split("_")
    }
    assert not words & VAGUE_NAMES


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=relative)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the module has none"
    assert list(undocumented(tree.body)) == []


def test_the_checkout_runs_the_same_command_line_as_the_installed_script() -> None:
    done = subprocess.run(
        [sys.executable, "cli.py", "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "enhance" in done.stdout
