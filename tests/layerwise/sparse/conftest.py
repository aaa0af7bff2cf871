"""The kernel compiled from the current source, at every level of this CPU and with emulated AVX-512."""

from pathlib import Path

import pytest

from layerwise.sparse.build import compile_kernel
from layerwise.sparse.native import LEVELS, Kernel, load

EMULATION = Path(__file__).with_name("emulated_avx512.h")


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
