"""The first process of a container: brings SIGTERM to the processes that compute.

A container's end is told to its first process only. Asked to end, ``prefect flow-run execute`` and ``prefect worker
start`` kill the process of the flow at once (Prefect 3.8.8, with every PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR),
and it loses what it did since its last resume point. A flow of layerwise that gets SIGTERM itself finishes its layer,
commits, and ends. So the children of the command are told first, and the command when they have ended.
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
    """Run ``command`` and end with its exit code; processes that lost their parents are buried on the way."""
    child = subprocess.Popen(command).pid

    def on_sigterm(*_: object) -> None:
        threading.Thread(target=end, args=[child], daemon=True).start()

    signal.signal(signal.SIGTERM, on_sigterm)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code  # a signal's number, as shells tell it


def end(command: int) -> None:
    """Tell the children of a process to end, wait for them, then tell the process itself."""
    try:
        watching = psutil.Process(command)
        while computing := watching.children():  # a worker may have taken up another flow meanwhile
            for process in computing:
                process.terminate()
            psutil.wait_procs(computing)
            time.sleep(REPORTING)
        watching.terminate()
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
