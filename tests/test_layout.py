"""Direction of imports between packages and between their sub-packages, and one name for every module."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {  # what each floor may import besides itself
    "flows": {"tasks", "numerics", "storage"},
    "tasks": {"numerics", "storage"},
    "numerics": set(),
    "storage": set(),
}
LINKED = ("flows", "tasks", "storage")  # folders of the repository that are packages below layerwise
MOST_MODULES = 15  # in one folder
# The settings of the flows lie next to the flows that have them, and below everything else of the package.
SETTINGS = {f"layerwise.flows.{name}" for name in ("options", "runtime", "setting_types", "settings")}


def names_below(folder: Path, name: str) -> Iterator[str]:
    for file in folder.rglob("*.py"):
        if file.stem not in (
            "__init__",
            "__main__",
        ):  # the public entry and `python -m layerwise` look up to the flows
            yield ".".join([name, *file.relative_to(folder).with_suffix("").parts])


MODULES = sorted(
    [
        *names_below(ROOT / "layerwise", "layerwise"),  # does not follow links
        *(name for package in LINKED for name in names_below(ROOT / package, f"layerwise.{package}")),
    ]
)
FOLDERS = sorted({name.rpartition(".")[0] for name in MODULES})


def source_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def floor_of(module: str) -> str:
    second = module.split(".")[1]
    return second if second in LINKED else "numerics"


def imported_modules(module: str, nested: bool = True) -> Iterator[str]:
    """Full names of what a module imports; with ``nested``, inside of its functions too."""
    tree = ast.parse(source_of(module).read_text())
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in within if name in MODULES)
            yield str(node.module)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_downwards_only(floor):
    for module in (name for name in MODULES if floor_of(name) == floor):
        ours = [name for name in imported_modules(module) if name.startswith("layerwise.")]
        floors = {floor_of(name) for name in ours}
        assert floors <= FLOORS[floor] | {floor}, f"{module} imports from {sorted(floors)}"


def folder_of(module: str) -> str:
    return "settings of the flows" if module in SETTINGS else module.rpartition(".")[0]


def test_imports_between_folders_point_one_way():
    """The modules directly in a package, and its sub-packages, are folders of their own."""
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        imported = set(imported_modules(module)) & set(MODULES)
        below = {folder_of(name) for name in imported} - {folder_of(module)}
        graph.setdefault(folder_of(module), set()).update(below)
    assert set(TopologicalSorter(graph).static_order()) == graph.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_one_name(module):
    """Its name in the wheel; ``flows``, ``tasks`` and ``storage`` at the top are packages of the user's."""
    assert not {name.partition(".")[0] for name in imported_modules(module)} & set(LINKED)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_small_enough_to_be_read(folder):
    assert len([name for name in MODULES if name.rpartition(".")[0] == folder]) <= MOST_MODULES


@pytest.mark.parametrize("floor", ["numerics", "storage"])
def test_numerics_and_bytes_do_not_know_prefect(floor):
    for module in (name for name in MODULES if floor_of(name) == floor):
        assert "prefect" not in {name.partition(".")[0] for name in imported_modules(module)}, module


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: set(imported_modules(module, nested=False)) & set(MODULES) for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_opens_a_pickle(module):
    imported = {name.partition(".")[0] for name in imported_modules(module)}
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    text = source_of(module).read_text()
    assert "torch.load" not in text
    assert "allow_pickle" not in text
    assert "trust_remote_code=True" not in text


@pytest.mark.parametrize("module", MODULES)
def test_every_module_can_be_imported(module):
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize(
    "folder", [folder for folder in FOLDERS if folder not in ("layerwise", "layerwise.flows")]
)
def test_a_package_s_own_file_is_one_docstring(folder):
    """The file of flows also sets Prefect's environment, because any of its modules may be the first to import Prefect."""
    (statement,) = ast.parse((ROOT / folder.replace(".", "/") / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
