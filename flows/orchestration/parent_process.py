"""End this process when its parent process ends."""

import os
import signal
import threading
import time
from math import inf

# Set by a parent process that holds the other end of our standard input.
ENDS_WITH_PARENT = "LAYERWISE_ENDS_WITH_PARENT"


def stop_with_parent() -> None:
    """Treat the end of the parent process as SIGTERM, if the parent asked for that.

    Otherwise the groups of a killed search would occupy the devices that the resumed search needs.
    """
    if ENDS_WITH_PARENT in os.environ:
        end_with_parent()


def end_with_parent(grace: float = inf) -> None:
    """Treat the end of our standard input as SIGTERM: then all processes that hold its other end have ended.

    SIGUSR1 and SIGUSR2 are ignored from now on. SLURM sends them to all processes of a job step; only the parent process
    (``--on-signal``) knows what they mean.

    Args:
        grace: seconds after SIGTERM until this process is killed.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_wait_for_end_of_input, args=[grace], name="parent process", daemon=True).start()


def _wait_for_end_of_input(grace: float) -> None:
    while os.read(0, 1):  # standard input; the system closes its other end, however the parent ended
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    if grace < inf:
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)
