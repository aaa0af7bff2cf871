"""Start-up of the commands: those that people run often import none of the packages that take seconds."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "prefect", "datasets"]
RUN = """
import json, sys
from layerwise.__main__ import main

sys.argv[0] = "layerwise"
try:
    main()
except SystemExit as ending:
    assert not ending.code, ending.code
print(json.dumps([name for name in %r if name in sys.modules]), file=sys.stderr)
"""


@pytest.fixture
def imported_by(pytestconfig):
    """Run a command, and return the heavy packages that it imported."""

    def run(*arguments: str) -> list[str]:
        process = subprocess.run(
            [sys.executable, "-c", RUN % HEAVY, *arguments],
            cwd=pytestconfig.rootpath,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stderr.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in ("ls", "gc", "bench", "doctor"))]
)
def test_help_of_commands_without_settings_imports_nothing_heavy(imported_by, arguments):
    assert imported_by(*arguments) == []


@pytest.mark.parametrize("command", ["search", "plan"])
def test_help_with_settings_imports_torch_only(imported_by, command):
    """The pruners and allocators are their own settings, and compute with torch."""
    assert imported_by(command, "--help") == ["torch"]


@pytest.mark.parametrize("command", ["ls", "show", "status", "gc", "verify"])
def test_commands_on_a_store_import_nothing_heavy(imported_by, finished, command):
    assert imported_by(command, finished[1].store) == []


def test_the_package_imports_nothing_heavy_before_its_names_are_used(pytestconfig):
    code = f"import layerwise, sys; print([name for name in {HEAVY} if name in sys.modules], layerwise.__version__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True)
    assert done.stdout == "[] 0.1.0\n"
