"""How a command ends that could not go on: with what resumes it."""

import shlex
import sys
from typing import NoReturn


def stop(why: str, status: int) -> NoReturn:
    """End the process with one line, and the command that goes on from there."""
    sys.stderr.write(f"layerwise: {why}. Resume with:\n  {shlex.join(['layerwise', *sys.argv[1:]])}\n")
    sys.exit(status)
