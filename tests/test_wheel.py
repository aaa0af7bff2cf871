"""The wheel in a clean environment: it installs one name, and works next to a user's own ``tasks.py`` and ``flows/``."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

ROOT = Path(__file__).parents[1]
BUILT_FROM = ["layerwise", "flows", "tasks", "storage", "pyproject.toml", "hatch_build.py"]
BUILT_FROM += ["README.md", "CHANGELOG.md", "LICENSE", "constraints.txt"]
KERNEL = "layerwise/sparse/kernel.so"
SCRIPT = """
from layerwise import Runtime, Search, search
import layerwise, tasks

print(layerwise.__file__, layerwise.__version__)
print(search.name, Search(model="demo", sparsity=0.5).title, Runtime(store="store").store)
print(tasks.OWNER)
"""
PROJECT = {
    "tasks.py": "OWNER = 'the user'\n",
    "storage.py": "OWNER = 'the user'\n",
    "flows/__init__.py": "raise ImportError('the flows of the user were imported')\n",
    "script.py": SCRIPT,
}


class Environment(NamedTuple):
    """A virtual environment with the wheel and the dependencies of this one, but without the checkout."""

    folder: Path

    def run(self, *command: str, cwd: Path, **variables: str) -> str:
        """Run a program of the environment, and return its standard output."""
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=cwd,
            env=inherited | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the wheel is built from: the build writes the kernel, which other tests use in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    # A line of a .pth file adds a folder without reading the .pth files in it, such as that of an editable checkout.
    [packages] = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    return Environment(folder)


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's folder whose modules have the names of our folders."""
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def pip(*arguments: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    process = subprocess.run(
        [sys.executable, "-m", "pip", *quiet, *arguments], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr


def build_wheel(source: Path, folder: Path) -> Path:
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    pip("wheel", *offline, "--wheel-dir", str(folder), str(source))
    [wheel] = folder.glob("*.whl")
    return wheel


def files_of(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist()) - {KERNEL}


def test_the_wheel_holds_one_package_with_every_file_of_the_repository(wheel):
    names = files_of(wheel)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"layerwise", "layerwise_pruning"}
    folders = {
        "layerwise": "layerwise",
        **{name: f"layerwise/{name}" for name in ("flows", "tasks", "storage")},
    }
    for folder, inside in folders.items():
        for path in (ROOT / folder).rglob("*"):  # does not follow links
            if path.is_file() and path.suffix not in (".pyc", ".so"):
                assert f"{inside}/{path.relative_to(ROOT / folder)}" in names


def test_a_wheel_built_from_the_sdist_has_the_same_files(source, wheel, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    monkeypatch.setenv("CXX", "no-compiler")  # the kernel was compiled once already
    [unpacked] = (path for path in tmp_path.iterdir() if path.is_dir())
    assert files_of(build_wheel(unpacked, tmp_path)) == files_of(wheel)


def test_the_checkout_is_not_importable_in_the_clean_environment(installed, tmp_path):
    imports = "import layerwise, layerwise.flows, layerwise.storage; print(layerwise.__file__)"
    module = Path(installed.run("python", "-c", imports, cwd=tmp_path).strip())
    assert module.is_relative_to(installed.folder)
    for name in ("flows", "tasks", "storage"):
        code = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
        assert installed.run("python", "-c", code, cwd=tmp_path) == "None\n"


def test_a_script_next_to_a_tasks_module_of_the_user_gets_both(installed, project):
    lines = installed.run("python", "script.py", cwd=project, PYTHONPATH=".").splitlines()
    assert Path(lines[0].split()[0]).is_relative_to(installed.folder)
    assert lines[1:] == ["search demo at 0.5 store", "the user"]


@pytest.mark.parametrize("command", [["python", "-m", "layerwise"], ["layerwise"]], ids=["module", "command"])
def test_the_command_runs_next_to_a_flows_package_of_the_user(installed, project, command):
    assert "--beta-step" in installed.run(*command, "search", "--help", cwd=project, PYTHONPATH=".")


def test_prefect_deploys_from_a_project_that_has_a_flows_package(installed, project, prefect_backend):
    shutil.copy(ROOT / "deployments" / "prefect.yaml", project)
    variables = {
        "PREFECT_API_URL": prefect_backend,
        "LAYERWISE_STORE": "s3://bucket/prefix",
        "LAYERWISE_WORK_POOL": "devices-of-the-wheel",
        "LAYERWISE_CONTROL_POOL": "control-of-the-wheel",
    }
    with get_client(sync_client=True) as client:
        for name in ("devices-of-the-wheel", "control-of-the-wheel"):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        installed.run("python", "-m", "prefect", "--no-prompt", "deploy", "--all", cwd=project, **variables)
        deployment = client.read_deployment_by_name("search/search")
    assert deployment.entrypoint == "layerwise.flows.search.search"
    assert deployment.work_pool_name == "control-of-the-wheel"
