"""Compile the kernel; run by the installation, and by hand as ``python -m layerwise.sparse.build``."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
LIBRARY = Path(__file__).with_name("kernel.so")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300  # that a compiler may take: it needs 5


class NoKernel(RuntimeError):
    """The kernel could not be compiled here; the message says why. Everything else works without it."""


def compiler() -> list[str]:
    """The command of the C++ compiler: ``$CXX`` if that is set, else the first of the usual ones.

    Raises:
        NoKernel: there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", "")) or next(
        ([name] for name in COMPILERS if shutil.which(name)), []
    )
    if not wanted or not shutil.which(wanted[0]):
        tried = wanted[0] if wanted else ", ".join(COMPILERS)
        raise NoKernel(f"there is no C++ compiler ({tried}); install one, or name it in CXX")
    return wanted


def compile_kernel(library: Path, options: Sequence[str] = ("-O2",), source: Path = SOURCE) -> None:
    """Make ``library`` from ``source``; it appears whole or not at all.

    Args:
        options: for the compiler, beside those that make a library.

    Raises:
        NoKernel: no compiler, or it fails.
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
        str(source),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise NoKernel(f"{shlex.join(command)} failed: {done.stderr.strip()[:2000]}")
        os.replace(unfinished, library)  # a process that uses the old one keeps it
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoKernel(f"{shlex.join(command)} could not be run: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        compile_kernel(LIBRARY)
    except NoKernel as reason:
        sys.exit(f"no sparse kernel: {reason}")
