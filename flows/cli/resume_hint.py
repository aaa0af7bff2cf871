"""Ends of a command that cannot go on: one line on stderr, and the command that resumes it."""

import shlex
import sys
from typing import NoReturn

from layerwise.tasks.running.printable import one_line, printable


def fail(why: str, status: int = 1) -> NoReturn:
    """End the process with one line."""
    sys.stderr.write(f"layerwise: {one_line(why)}\n")
    sys.exit(status)


def stop(why: str, status: int) -> NoReturn:
    """End the process with one line, and the command that goes on from there."""
    command = printable(shlex.join(["layerwise", *sys.argv[1:]]))
    sys.stderr.write(f"layerwise: {one_line(why)}. Resume with:\n  {command}\n")
    sys.exit(status)
