"""The floors: imports point downwards only, and everything can be imported."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "flows": {"tasks", "layerwise", "storage"},
    "tasks": {"layerwise", "storage"},
    "layerwise": set(),
    "storage": set(),
}
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in BELOW
    for file in (ROOT / package).rglob("*.py")
    if file.stem != "__init__"
)


def imported_modules(module: str, nested: bool = True) -> Iterator[str]:
    """Full names of what a module imports; with ``nested``, inside of its functions too."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            yield str(node.module)


@pytest.mark.parametrize("package", BELOW)
def test_imports_point_downwards_only(package):
    for module in (name for name in MODULES if name.startswith(f"{package}.")):
        floors = {name.partition(".")[0] for name in imported_modules(module)} & set(BELOW)
        assert floors <= BELOW[package] | {package}, f"{module} imports from {sorted(floors)}"


@pytest.mark.parametrize("package", ["layerwise", "storage"])
def test_numerics_and_bytes_do_not_know_prefect(package):
    for module in (name for name in MODULES if name.startswith(f"{package}.")):
        assert "prefect" not in {name.partition(".")[0] for name in imported_modules(module)}, module


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: set(imported_modules(module, nested=False)) & set(MODULES) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_opens_a_pickle(module):
    imported = {name.partition(".")[0] for name in imported_modules(module)}
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert "torch.load" not in text
    assert "allow_pickle" not in text
    assert "trust_remote_code=True" not in text


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("package", ["tasks", "layerwise", "layerwise/sparse", "storage"])
def test_a_package_s_own_file_is_one_docstring(package):
    """That of flows sets Prefect's environment too, as any of its modules may be the first to import Prefect."""
    (statement,) = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
