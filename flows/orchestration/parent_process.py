"""A process that was started by a search on the same machine ends with it."""

import os
import signal
import threading
import time
from math import inf

# Set by the parent, which then holds the other end of our standard input.
ENDS_WITH_PARENT = "LAYERWISE_ENDS_WITH_PARENT"


def stop_with_parent() -> None:
    """Treat the death of the process that started this one as SIGTERM, if it asked for that.

    Otherwise its groups would hold the devices against those of the search that goes on.
    """
    if ENDS_WITH_PARENT in os.environ:
        end_with_parent()


def end_with_parent(grace: float = inf) -> None:
    """Treat the end of our standard input as SIGTERM: all processes that hold its other end have ended.

    Args:
        grace: seconds after which this process is killed if it has not ended.
    """
    threading.Thread(target=_wait_for_the_end, args=[grace], name="parent process", daemon=True).start()


def _wait_for_the_end(grace: float) -> None:
    while os.read(0, 1):  # standard input; ends when the other end is closed, however its process ended
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    if grace < inf:
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)
