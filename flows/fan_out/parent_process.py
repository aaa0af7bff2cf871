"""End a process together with the process that started it."""

import os
import signal
import threading
import time
from math import inf

# Set by a parent process that holds the other end of this process's standard input.
ENDS_WITH_PARENT = "LAYERWISE_ENDS_WITH_PARENT"


def stop_with_parent() -> None:
    """Treat the death of the parent process as SIGTERM, if the parent asked for that.

    Otherwise the lane groups of a dead search would occupy the devices that the resumed search needs.
    """
    if ENDS_WITH_PARENT in os.environ:
        end_with_parent()


def end_with_parent(grace: float = inf) -> None:
    """Treat the end of standard input as SIGTERM. It ends when no process holds its other end any more.

    Args:
        grace: seconds after which this process is killed if it has not ended.
    """
    threading.Thread(target=_terminate_after_input, args=[grace], name="parent process", daemon=True).start()


def _terminate_after_input(grace: float) -> None:
    while os.read(
        0, 1
    ):  # standard input; returns nothing once the other end is closed, however its process ended
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    if grace < inf:
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)
