"""Build of the native kernel, run by the installation or with ``python -m layerwise.sparse.build``."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernel.cpp", "ranking.cpp"))
LIBRARY = Path(__file__).with_name("kernel.so")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # timeout of the compiler, which needs about 5 s


class NoKernel(RuntimeError):
    """The kernel could not be compiled; the message gives the reason. Everything else works without it."""


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``$CXX`` if it is set, otherwise the first of ``COMPILERS`` found.

    Raises:
        NoKernel: a compiler was not found.
    """
    wanted = shlex.split(os.environ.get("CXX", "")) or next(
        ([name] for name in COMPILERS if shutil.which(name)), []
    )
    if not wanted or not shutil.which(wanted[0]):
        tried = wanted[0] if wanted else ", ".join(COMPILERS)
        raise NoKernel(f"a C++ compiler was not found ({tried}). Install one, or set CXX to its command")
    return wanted


def compile_kernel(
    library: Path, options: Sequence[str] = ("-O2",), sources: Sequence[Path] = SOURCES
) -> None:
    """Compile ``sources`` to ``library``, atomically.

    Args:
        library: file to write.
        options: additional compiler options.
        sources: C++ files.

    Raises:
        NoKernel: a compiler was not found, or it failed.
    """
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")
    command = [
        *compiler(),
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-fopenmp",
        *options,
        "-o",
        str(unfinished),
        *map(str, sources),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise NoKernel(f"{shlex.join(command)} failed: {done.stderr.strip()[:2000]}")
        os.replace(unfinished, library)  # a process that uses the old library keeps it
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernel(f"{shlex.join(command)} could not be run: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        compile_kernel(LIBRARY)
    except NoKernel as reason:
        sys.exit(f"no sparse kernel: {reason}")
