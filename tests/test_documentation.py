"""Links, module names and the folder tree of README.md and of the pages in docs/ and deployments/."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "deployments" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def test_the_pages_of_options_and_settings_are_those_of_the_code():
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "make_reference.py", "--check"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr


def test_the_readme_lists_every_folder_of_the_code():
    block = re.search(
        r"^## How the code is laid out\n\n```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
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
