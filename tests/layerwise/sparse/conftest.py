"""Fixtures with the kernel compiled from the current source: at every level of this CPU, and with emulated AVX-512."""

from pathlib import Path

import pytest

from layerwise.sparse import native
from layerwise.sparse.build import NoKernel, compile_kernel
from layerwise.sparse.native import LEVELS, Kernel, load

EMULATION = Path(__file__).with_name("emulated_avx512.h")


@pytest.fixture(scope="session")
def library_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kernel") / "kernel.so"
    try:
        compile_kernel(path)
    except NoKernel as reason:
        pytest.skip(str(reason))
    return path


@pytest.fixture(scope="session")
def emulating_path(library_path) -> Path:
    path = library_path.with_name("emulating.so")
    compile_kernel(path, ("-O1", "-w", "-include", str(EMULATION)))
    return path


@pytest.fixture(params=[*LEVELS, "avx512 emulated", "avx512_bf16 emulated"])
def kernel(request, library_path) -> Kernel:
    """Return the kernel at every level. Levels that this CPU lacks are skipped; AVX-512 is also run with emulation."""
    level, _, emulated = request.param.partition(" ")
    library = load(request.getfixturevalue("emulating_path") if emulated else library_path)
    if LEVELS.index(level) > library.layerwise_level():
        pytest.skip(f"this CPU supports levels up to {LEVELS[library.layerwise_level()]}, not {level}")
    return Kernel(library, level)


@pytest.fixture
def best_kernel(library_path, monkeypatch) -> Kernel:
    """Make linears and ``accelerate`` use the kernel at the highest level of this CPU."""
    monkeypatch.setattr(native, "LIBRARY", library_path)
    native.kernel.cache_clear()
    found = native.kernel()
    assert found is not None
    yield found
    native.kernel.cache_clear()


@pytest.fixture
def no_kernel(tmp_path, monkeypatch) -> None:
    """Make the kernel unavailable, as on a machine without a compiler."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "kernel.so")
    native.kernel.cache_clear()
    yield
    native.kernel.cache_clear()
