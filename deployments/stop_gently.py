"""First process of a container: passes SIGTERM on to the processes that compute.

Only the first process of a container gets SIGTERM. ``prefect flow-run execute`` and ``prefect worker start`` react by
killing the process of the flow at once (Prefect 3.8.8, with every PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR), which
loses its work since the last resume point. A flow of layerwise that gets SIGTERM itself finishes its layer, commits a
resume point and ends. Therefore the children of the command get SIGTERM first, and the command after they have ended.
"""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil

REPORTING = 2.0  # seconds for the command to tell Prefect how its children ended


def main(command: list[str]) -> int:
    """Run ``command`` and return its exit code; also reap orphaned processes, as a first process must."""
    child = subprocess.Popen(command).pid

    def on_sigterm(*_: object) -> None:
        threading.Thread(target=end, args=[child], daemon=True).start()

    signal.signal(signal.SIGTERM, on_sigterm)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code  # as shells report a signal


def end(command: int) -> None:
    """Terminate the children of a process, wait until they have ended, then terminate the process."""
    try:
        watching = psutil.Process(command)
        while computing := watching.children():  # a worker may have started another flow meanwhile
            for process in computing:
                process.terminate()
            psutil.wait_procs(computing)
            time.sleep(REPORTING)
        watching.terminate()
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
