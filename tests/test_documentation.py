"""Links, module names and commands of README.md and of the pages in docs/ and deployments/, and the tree of folders."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.flows.cli.parser import parse_command
from layerwise.flows.options import read_options
from layerwise.flows.settings import Search

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "deployments" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages whose commands are checked; docs/cli.md has none, and its options come from the parser itself.
SCRIPTS = [*sorted((ROOT / "examples").glob("*.sh")), *sorted((ROOT / "deployments" / "slurm").iterdir())]
COMMANDS_IN = [*PAGES, *SCRIPTS]
NEEDS_A_MODEL = ("search", "plan", "compare", "theory", "generate-calibration")
PACKAGES = ["flows", "tasks", "layerwise", "storage"]


def anchors(page: Path) -> set[str]:
    """Names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target:
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), target
            assert not heading or heading in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_and_functions_exist(page):
    for name in re.findall(r"\blayerwise(?:\.\w+){2,}", page.read_text()):
        path, _, member = name.replace(".", "/").rpartition("/")
        if not (ROOT / f"{path}/{member}.py").is_file():
            module = ast.parse((ROOT / f"{path}.py").read_text())
            assert member in {getattr(node, "name", None) for node in module.body}, name


def commands_in(page: Path) -> list[list[str]]:
    """Arguments of every `layerwise ...` in the code blocks of a page; for an example, of the whole script."""
    text = page.read_text()
    blocks = [text] if page in SCRIPTS else re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    starts = re.compile(
        r"\s*(?:srun .* )?layerwise (.*?)(?: &)?"
    )  # a script starts some of them in the background
    commands = [match[1] for line in lines if (match := starts.fullmatch(line))]
    return [shlex.split(command, comments=True) for command in commands]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("page", COMMANDS_IN, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted_by_the_parser(page, capsys):
    """`...` stands for the required options, and `a|b` for one of two commands."""
    for words in commands_in(page):
        for command in words[0].split("|"):
            arguments = [word for word in words[1:] if word not in ("...", "[KEY]")]
            if "..." in words and command in NEEDS_A_MODEL:
                given = {"--model": "demo", "--sparsity": "0.5", "--store": "s"}
                arguments += [part for name in given if name not in words for part in (name, given[name])]
            try:
                parsed = parse_command([command, *arguments])
            except SystemExit:
                pytest.fail(f"layerwise {' '.join(words)}: {capsys.readouterr().err}")
            if command in ("search", "plan") and not any("..." in word for word in arguments):
                read_options(parsed, Search)


def test_the_pages_of_options_and_settings_are_those_of_the_code():
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_reference.py", "--check"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


def test_the_page_for_developers_lists_every_folder_of_the_code():
    block = re.search(
        r"^## How the code is laid out\n\n```\n(.*?)^```",
        (ROOT / "docs" / "development.md").read_text(),
        re.M | re.S,
    )
    assert block
    listed, package = set(), ""
    for indent, name in re.findall(r"^( *)(\w+)/", block[1], re.MULTILINE):
        package = package if indent else name
        listed.add(f"{package}/{name}" if indent else name)
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("__init__.py")}
    assert {name for name in listed if name.partition("/")[0] in PACKAGES} == {
        str(folder.relative_to(ROOT)) for folder in folders
    }
