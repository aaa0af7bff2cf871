"""Worker: run the parts of searches that a store publishes, until no search is running (`layerwise work`)."""

import contextlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from prefect.client.schemas.objects import StateType

from layerwise.flows.fan_out import part_flows
from layerwise.flows.fan_out.published_parts import (
    DESCRIPTION,
    PartEnd,
    PublishedPart,
    claim_part,
    list_parts,
    read_part,
    report_end,
)
from layerwise.flows.fan_out.work_pool import FLOWS
from layerwise.flows.runtime import WorkerRuntime
from layerwise.flows.settings import Search
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.signs_of_life import EVERY, NEEDS_WORKERS, WORKER, announced, doing, living_processes
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.stopping import Withdrawn, withdrawable

logger = logging.getLogger(__name__)

POLL = 2.0  # seconds between two looks for a part
FIRST_SEARCH = 600.0  # seconds to wait for the first search


def work(runtime: WorkerRuntime, say: Callable[[str], None]) -> int:
    """Run parts of the searches in a store that are spread over workers. Returns the number of parts.

    Args:
        say: reports a line to the user.

    Raises:
        ValueError: torch cannot compute on this device here.
        OSError: the storage cannot be written.
        Stopped: the process was asked to stop; the resume point is committed.
    """
    runtime.execution()  # before any part is claimed: raises if the device is not there
    store, sign = runtime.open_store(), uuid.uuid4().hex
    done, seen, idle_since = 0, False, time.monotonic()
    with announced(store, "worker", sign, WORKER):
        while True:
            try:
                searches = {each.name for each in living_processes(store, NEEDS_WORKERS)}
                found = _claim_next(store, searches, sign)
            except Unreachable as error:
                logger.warning("%s", error)
                time.sleep(POLL)
                continue
            seen = seen or bool(searches)
            if found is not None:
                name, part = found
                say(f"{part.title}: starts")
                end = _run(store, name, part, runtime)
                say(f"{part.title}: {end}")
                done, idle_since = done + 1, time.monotonic()
                continue
            idle = time.monotonic() - idle_since
            if runtime.idle_minutes is not None:
                if idle > 60 * runtime.idle_minutes:
                    return done
            elif not searches and (seen or idle > FIRST_SEARCH):
                return done
            doing("waits for a part of a search" if searches else "waits for a search")
            time.sleep(POLL)


def _claim_next(store: ArtifactStore, searches: set[str], sign: str) -> tuple[str, PublishedPart] | None:
    """Claim the first open part of a running search."""
    if not searches:
        return None
    for name, kinds in list_parts(store).items():
        if kinds != {DESCRIPTION}:
            continue
        part = read_part(store, name)
        if part is None or part.search not in searches or part.flow not in FLOWS:
            continue
        if claim_part(store, name, sign):
            return name, part
    return None


def _run(store: ArtifactStore, name: str, part: PublishedPart, runtime: WorkerRuntime) -> str:
    """Run a claimed part, and report its end to the search.

    Returns:
        How it ended, for the user.

    Raises:
        OSError: the end cannot be reported. The search notices that this process ends.
    """
    host = socket.gethostname()
    doing("")  # it does not wait any more
    try:
        with withdrawable() as withdraw, _watched(store, name, withdraw):
            parameters = {**part.parameters, "settings": Search(**part.parameters["settings"])}
            state = getattr(part_flows, part.flow)(**parameters, runtime=runtime.alone, return_state=True)
        end = PartEnd(state.type, str(state.message or state.name))
    except Withdrawn as withdrawn:
        # Reported only if the part still exists, and a listing was wrong: its search would wait for ever.
        report_end(store, name, PartEnd(StateType.CRASHED, f"{withdrawn} ({host})"))
        return "stopped, because its search does not need it any more"
    except (ValueError, TypeError) as error:  # settings or parameters of another version
        end = PartEnd(StateType.FAILED, f"{type(error).__name__}: {error}")
    except BaseException as stopped:
        with contextlib.suppress(OSError):
            report_end(
                store, name, PartEnd(StateType.CRASHED, f"{str(stopped) or type(stopped).__name__} ({host})")
            )
        raise
    report_end(store, name, end)
    return end.state.value.lower() + ("" if end.state == StateType.COMPLETED else f": {end.message}")


@contextlib.contextmanager
def _watched(store: ArtifactStore, name: str, withdraw: Callable[[], None]) -> Iterator[None]:
    """Withdraw the work of this block when its search removes the part."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            with contextlib.suppress(OSError):  # an outage is not the end of a search
                if DESCRIPTION not in list_parts(store).get(name, set()):
                    withdraw()

    threading.Thread(target=watch, name="published part", daemon=True).start()
    try:
        yield
    finally:
        done.set()
