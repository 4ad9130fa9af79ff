"""What the pages and the examples say is true: links resolve, and what they show to run does run.

In a page, the line ``<!-- runs: tiny -->`` right above a fenced block (python, bash or console) has
this file run the block, and ``<!-- runs: tiny $ COMMAND -->`` has it run a command that readers
don't see. All of a page runs from top to bottom in one folder, where `demo/base` is a tiny model.
Of a console block the lines after ``$`` run, and the rest is what they print. An example runs as
its docstring says, in such a folder too.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in {".py", ".sh"})

CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
MARKED = re.compile(
    r"^<!-- runs: tiny(?: \$ (?P<command>[^\n]+))? -->$"
    r"(?(command)|\n+^```(?P<language>\w+)\n(?P<body>.*?)^```$)",
    re.MULTILINE | re.DOTALL,
)
COMMAND = re.compile(r"^\$ ((?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
USAGE = re.compile(r"^ {4}((?:python|bash|safeweights) .+)$", re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def marked_scripts(text: str) -> list[str]:
    """Finds what a page wants run, as bash scripts in order."""
    return [
        match["command"] or as_bash(match["language"], match["body"])
        for match in MARKED.finditer(text)
    ]


def as_bash(language: str, body: str) -> str:
    """Turns a fenced block into a bash script."""
    if language == "python":
        return f"python - <<'END_OF_BLOCK'\n{body}END_OF_BLOCK\n"
    if language == "console":
        return "\n".join(COMMAND.findall(body))
    assert language == "bash", f"don't know how to run {language}"
    return body


def usage(example: Path) -> list[str]:
    """Reads how an example is run: the indented commands of its docstring or opening comment."""
    text = example.read_text()
    if example.suffix == ".py":
        return USAGE.findall(ast.get_docstring(ast.parse(text)) or "")
    return USAGE.findall(re.sub("^# ?", "", text, flags=re.MULTILINE))


def run(script: str, folder: Path) -> None:
    """Runs a bash script where `python` and `safeweights` are the ones under test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def folder(tiny_tied_llama: Path, tmp_path: Path) -> Path:
    """What a reader has before the first command: a base model and the examples."""
    shutil.copytree(tiny_tied_llama, tmp_path / "demo/base")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def test_the_page_on_the_command_line_is_the_help_of_every_command() -> None:
    command = [sys.executable, "docs/generate_cli.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = LINK.findall(CODE.sub("", page.read_text()))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_guide_for_contributors_shows_every_room() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = [path for path in (ROOT / "safeweights_peft").iterdir() if path.name[0] not in "_."]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in rooms]
    code = [name for name in names if name.endswith((".py", "/")) and name != "prompts/"]
    assert [name for name in code if f"\n  {name} " not in guide] == []


def test_the_changelog_names_the_versions_that_the_code_has() -> None:
    from safeweights_peft.patch.metadata import FORMAT_VERSION

    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"### {package} " in changelog
    assert f"### {FORMAT_VERSION} " in changelog


def test_marked_blocks_are_found_in_order_and_others_left_alone() -> None:
    page = (
        "<!-- runs: tiny $ mkdir made -->\n\n```bash\nexit 1\n```\n"
        "<!-- runs: tiny -->\n\n```console\n$ echo a \\\n    b\na b\n$ echo c\n```\n"
        "<!-- runs: tiny -->\n```bash\ntrue\n```\n"
    )
    assert marked_scripts(page) == ["mkdir made", "echo a \\\n    b\necho c", "true\n"]


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    (script,) = marked_scripts("<!-- runs: tiny -->\n```python\nraise SystemExit(1)\n```\n")
    with pytest.raises(AssertionError, match="SystemExit"):
        run(script, tmp_path)


def test_the_readme_shows_something_that_runs() -> None:
    assert marked_scripts((ROOT / "README.md").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if marked_scripts(page.read_text())], ids=relative
)
def test_the_marked_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    for script in marked_scripts(page.read_text()):
        run(script, folder)


@pytest.mark.parametrize("example", EXAMPLES, ids=relative)
def test_an_example_says_how_it_is_run(example: Path) -> None:
    assert any(relative(example) in command for command in usage(example))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=relative)
def test_an_example_runs_as_it_says(example: Path, folder: Path) -> None:
    for command in usage(example):
        run(command, folder)
