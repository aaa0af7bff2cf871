"""Build of the kernel, and errors without a working compiler."""

import subprocess
import sys

import pytest

from layerwise.sparse.build import NoKernel, compile_kernel, compiler
from layerwise.sparse.native import INTERFACE, load


@pytest.fixture
def needs_compiler():
    try:
        compiler()
    except NoKernel as reason:
        pytest.skip(str(reason))


def test_the_library_appears_atomically(needs_compiler, tmp_path):
    compile_kernel(tmp_path / "kernel.so")
    assert load(tmp_path / "kernel.so").layerwise_interface() == INTERFACE
    assert [file.name for file in tmp_path.iterdir()] == ["kernel.so"]


def test_a_compiler_named_by_the_user_is_used(monkeypatch):
    monkeypatch.setenv("CXX", "env g++ -g0")
    assert compiler() == ["env", "g++", "-g0"]


@pytest.mark.parametrize("variables", [{"CXX": "/nonexistent"}, {"CXX": "", "PATH": "/nonexistent"}])
def test_without_a_compiler_the_reason_is_given(tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NoKernel, match="C\\+\\+ compiler was not found"):
        compile_kernel(tmp_path / "kernel.so")
    assert not [*tmp_path.iterdir()]


def test_a_compiler_that_fails_leaves_only_the_old_library(needs_compiler, tmp_path):
    old = tmp_path / "kernel.so"
    old.write_bytes(b"old")
    broken = tmp_path / "broken.cpp"
    broken.write_text("no C++ at all")
    with pytest.raises(NoKernel, match="broken.cpp failed: .*error"):
        compile_kernel(old, sources=[broken])
    assert old.read_bytes() == b"old"
    assert {file.name for file in tmp_path.iterdir()} == {"kernel.so", "broken.cpp"}


def test_the_command_reports_a_failed_build_in_one_line(pytestconfig):
    command = [sys.executable, "-m", "layerwise.sparse.build"]
    done = subprocess.run(
        command, cwd=pytestconfig.rootpath, env={"CXX": "/nonexistent"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("no sparse kernel: a C++ compiler was not found (/nonexistent)")
    assert len(done.stderr.splitlines()) == 1
