"""End this process when its parent process ends."""

import os
import signal
import threading

# Set by a parent process that holds the other end of our standard input.
ENDS_WITH_PARENT = "LAYERWISE_ENDS_WITH_PARENT"


def stop_with_parent() -> None:
    """Treat the end of the parent process as SIGTERM, if the parent asked for that.

    Otherwise the groups of a killed search would occupy the devices that the resumed search needs.

    SIGUSR1 and SIGUSR2 are ignored from now on. SLURM sends them to all processes of a job step; only the parent process
    (``--on-signal``) knows what they mean.
    """
    if ENDS_WITH_PARENT not in os.environ:
        return
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def end() -> None:
        wait_for_end_of_parent()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, name="parent process", daemon=True).start()


def wait_for_end_of_parent() -> None:
    """Wait until all processes that hold the other end of our standard input have ended."""
    while os.read(0, 1):  # the system closes the other end, however the parent ended
        pass
