"""Memory safety of the kernel: AddressSanitizer checks all its loads and stores, at every level."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from layerwise.sparse.build import SOURCES, NoKernel, compile_kernel, compiler
from layerwise.sparse.native import LEVELS, load
from tests.layerwise.sparse.conftest import EMULATION

WATCHED = ("-O0", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RUNTIMES = ("libasan.so", "libubsan.so")

Run = Callable[..., subprocess.CompletedProcess[str]]


def watched_library(folder: Path, sources: Sequence[Path] = SOURCES, *options: str) -> Path:
    library = folder / "watched.so"
    try:
        compile_kernel(library, (*WATCHED, *options), sources)
    except NoKernel as reason:
        pytest.skip(f"no library with sanitizers can be made here: {reason}")
    return library


@pytest.fixture(scope="module")
def run(pytestconfig) -> Run:
    """Call a library at some levels, on all weights, in a separate process."""

    def run_watched(library: Path, *levels: str) -> subprocess.CompletedProcess[str]:
        asked = [[*compiler(), f"-print-file-name={name}"] for name in RUNTIMES]
        runtimes = [
            subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in asked
        ]
        watching = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}  # Python leaves many
        threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # other tests need the cores, too
        return subprocess.run(
            [sys.executable, "-m", "tests.layerwise.sparse.sanitized", str(library), *levels],
            cwd=pytestconfig.rootpath,
            env=os.environ | watching | threads,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_watched


def test_the_levels_of_this_cpu_access_only_their_arrays(tmp_path, run, library_path):
    levels = LEVELS[: load(library_path).layerwise_level() + 1]
    done = run(watched_library(tmp_path), *levels)
    assert done.stdout == "all done\n", done.stderr[-2000:]


def test_emulated_avx512_accesses_only_its_arrays(tmp_path, run):
    done = run(watched_library(tmp_path, SOURCES, "-include", str(EMULATION)), "avx512", "avx512_bf16")
    assert done.stdout == "all done\n", done.stderr[-2000:]


def test_a_kernel_that_reads_beyond_the_last_values_is_caught(tmp_path, run, library_path):
    if not load(library_path).layerwise_level():
        pytest.skip("this CPU has no vector level, whose loads could go beyond")
    kernel, *others = SOURCES
    text, guard = kernel.read_text(), "if (end + OVERREAD <= count) return"
    assert text.count(guard) == 1
    careless = tmp_path / "careless.cpp"
    careless.write_text(text.replace(guard, "if (count >= 0) return"))
    done = run(watched_library(tmp_path, [careless, *others]), "avx2")
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert done.returncode
