"""Liveness of the processes that run parts of a search: signs of life, deaths and restarts.

Prefect knows how a flow run ended, but not that a whole machine is gone: such a run stays Running forever. Therefore
every run leaves signs of life in the store, and a run is considered dead when they stop. Whether a part is done is
decided by its artifacts in the store.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import CancelledRun, ObjectNotFound
from prefect.states import Completed, Crashed

from layerwise.flows.fan_out.executor import Executor
from layerwise.flows.fan_out.part import Part, PartFailed
from layerwise.flows.fan_out.parts_table import Row
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.signs_of_life import EVERY, SILENT, Sign, read_sign, remove_sign
from layerwise.storage.store import ArtifactStore

# Seconds before each restart of a part that died at the same place. After these restarts the search fails.
RESTART_DELAYS = (0.0, 10.0)
ALIVE = (StateType.RUNNING, StateType.CANCELLING)
ENDED = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)


@dataclass(eq=False)
class TrackedPart:
    """A part and the state of its work.

    Attributes:
        number: number of flow runs that the part has had.
        run: the current flow run; None before the start and after a death.
        sign: last sign of life.
        changed: time of the last news about the part, on the clock ``time.monotonic``.
        not_before: time from which it may be started, on the same clock.
        placeholder: task run of the search that will represent the next flow run of the part.
        deaths: number of deaths, by what the process was doing.
    """

    part: Part
    number: int
    run: FlowRun | None = None
    sign: Sign | None = None
    changed: float = 0.0
    not_before: float = 0.0
    placeholder: UUID | None = None
    deaths: Counter[str] = field(default_factory=Counter)
    done: bool = False

    @property
    def state(self) -> State | None:
        """Prefect's state of the current flow run; None if there is no run."""
        return None if self.run is None else self.run.state

    @property
    def row(self) -> Row:
        """Row of the part in the table of parts."""
        alive = self.sign is not None and self.state is not None and self.state.type in ALIVE
        state = "done" if self.done else "waiting" if self.state is None else str(self.state.name).lower()
        sign = self.sign if alive else None
        return Row(
            self.part.title,
            state,
            sign.doing if sign else "",
            sign.host if sign else "",
            self.deaths.total(),
        )


class LivenessMonitor:
    """Finds out whether a part is done, still running, or dead.

    Args:
        say: reports a line to the user, with its logging level.
    """

    def __init__(
        self,
        client: SyncPrefectClient,
        store: ArtifactStore,
        executor: Executor,
        say: Callable[[str, int], None],
    ) -> None:
        self._client, self._store, self._executor, self._say = client, store, executor, say

    def check(self, tracked: TrackedPart) -> None:
        """Update ``tracked``: mark it as done, or remove its run if that is dead, so that it is started again.

        Raises:
            PartFailed: the part failed, and a restart would not help.
            CancelledRun: the part was cancelled.
            Unreachable: the storage does not answer.
        """
        part, run = tracked.part, tracked.run
        assert run is not None, "only a part that was started is checked"
        state = run.state
        assert state is not None, "a flow run has a state from its creation"
        if state.type in ENDED:
            if part.is_done():
                tracked.done = True
            elif state.type == StateType.CANCELLED:
                raise CancelledRun(_cancelled(part))
            elif state.type == StateType.FAILED:
                raise PartFailed(f"{_reason(state)} ({part.title}, flow run {run.name!r})")
            elif state.type == StateType.COMPLETED:
                raise PartFailed(
                    f"{part.title} is completed, but {self._store.url} does not have its artifacts. "
                    "Check that its process and this one use the same store, the same model and the same texts."
                )
            else:
                self._restart(tracked, str(state.message))
            return
        pending = time.monotonic() - tracked.changed if state.type == StateType.PENDING else 0.0
        if cause := self._executor.cause_of_death(run, pending):
            self._end_dead_run(tracked, cause)
        elif state.type in ALIVE:
            self._check_sign_of_life(tracked, run)

    def _check_sign_of_life(self, tracked: TrackedPart, run: FlowRun) -> None:
        """Read the sign of life of a run that Prefect considers alive.

        Raises:
            Unreachable: the storage is too slow to tell a silent process from an outage.
        """
        before = time.monotonic()
        name = self._executor.sign_of(run)
        sign = None if name is None else read_sign(self._store, name)
        if (took := time.monotonic() - before) > EVERY:
            raise Unreachable(f"reading a sign of life took {took:.0f} s")
        if sign is not None and (tracked.sign is None or sign.token != tracked.sign.token):
            tracked.sign, tracked.changed = sign, before
        elif before - tracked.changed > SILENT:
            self._end_dead_run(tracked, f"no sign of life for {SILENT:.0f} s")

    def _end_dead_run(self, tracked: TrackedPart, cause: str) -> None:
        """Set the final state in Prefect of a run whose process is dead, which would stay Running forever.

        Raises:
            PartFailed, CancelledRun: as for ``check``.
        """
        part, run = tracked.part, tracked.run
        assert run is not None
        self._executor.kill(run.id)
        with suppress(ObjectNotFound):
            latest = self._client.read_flow_run(run.id)
            if has_ended(latest):  # it ended after it was read; the next check handles its state
                tracked.run = latest
                return
        is_done = part.is_done()
        done: State = Completed(message="The store has its result.")
        crashed: State = Crashed(message=cause)
        with suppress(ObjectNotFound):  # the run was deleted
            self._client.set_flow_run_state(run.id, done if is_done else crashed, force=True)
        # Only once the server has the state: if it does not answer, the next check repeats all of this.
        tracked.done = is_done
        if not is_done and run.state_type == StateType.CANCELLING:
            raise CancelledRun(_cancelled(part))
        if not is_done:
            self._restart(tracked, cause)

    def _restart(self, tracked: TrackedPart, cause: str) -> None:
        """Remove the dead run of a part, so that the part is started again after a delay.

        Raises:
            PartFailed: the part has used up its restarts at this place.
        """
        part, run = tracked.part, tracked.run
        assert run is not None
        if name := self._executor.sign_of(run):
            with suppress(Unreachable):
                tracked.sign = read_sign(self._store, name) or tracked.sign
                remove_sign(self._store, name)
        doing = tracked.sign.doing if tracked.sign else ""
        at = f"at {doing!r}" if doing else "before it started"
        tracked.deaths[doing] += 1
        times = tracked.deaths[doing]
        if times > len(RESTART_DELAYS):
            raise PartFailed(f"{cause} ({part.title} died {times} times {at}, flow run {run.name!r})")
        self._say(
            f"{part.title} died {at}: {cause.rstrip('.')}. It is restarted from its last resume point.",
            logging.WARNING,
        )
        tracked.not_before = time.monotonic() + RESTART_DELAYS[times - 1]
        tracked.run = None


def has_ended(run: FlowRun) -> bool:
    """Return whether the state of ``run`` is final."""
    return run.state_type in ENDED


def _cancelled(part: Part) -> str:
    return f"{part.title} was cancelled; a search with the same settings continues from here"


def _reason(state: State) -> str:
    """Return the message of the exception that made a flow run fail."""
    text = str(state.message)
    return text.removeprefix("Flow run encountered an exception: ")
