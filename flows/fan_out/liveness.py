"""Watch: whether a step that others do goes on, is done, or has died.

The store is the truth. Prefect tells how a flow run ended, but not that a whole machine is gone: such a run stays
Running for ever. So each run leaves signs of life in the store, and one that falls silent is taken for dead.
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

from layerwise.flows.fan_out.executor import Place
from layerwise.flows.fan_out.step import Step, StepFailed
from layerwise.flows.fan_out.steps_table import Row
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.signs_of_life import EVERY, SILENT, Sign, read_sign, remove_sign
from layerwise.storage.store import ArtifactStore

# Seconds before a dead step is taken up, by how often it has died at the same place before; then it is given up.
PAUSES = (0.0, 10.0)
ALIVE = (StateType.RUNNING, StateType.CANCELLING)
ENDED = (StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED)


@dataclass(eq=False)
class Work:
    """A step on its way.

    Attributes:
        number: of flow runs that there were for it.
        run: the present one; None before it is begun, and after it has died.
        sign: the last one that was heard.
        changed: when something new was last heard of it, by ``time.monotonic``.
        not_before: when it may be begun.
        placeholder: a task run of the parent that will stand for its next flow run.
        deaths: how often it has died, by what it was doing.
    """

    step: Step
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
        return None if self.run is None else self.run.state

    @property
    def row(self) -> Row:
        """As people see it."""
        alive = self.sign is not None and self.state is not None and self.state.type in ALIVE
        state = "done" if self.done else "waiting" if self.state is None else str(self.state.name).lower()
        sign = self.sign if alive else None
        return Row(
            self.step.title,
            state,
            sign.doing if sign else "",
            sign.host if sign else "",
            self.deaths.total(),
        )


class Watch:
    """Watches steps that others do.

    Args:
        say: tells people a line, with its logging level.
    """

    def __init__(
        self, client: SyncPrefectClient, store: ArtifactStore, place: Place, say: Callable[[str, int], None]
    ) -> None:
        self._client, self._store, self._place, self._say = client, store, place, say

    def judge(self, work: Work) -> None:
        """Whether ``work`` is done, has died (its run is None then), or goes on.

        Raises:
            StepFailed: it failed for good.
            CancelledRun: somebody has cancelled it.
            Unreachable: the storage does not answer.
        """
        assert work.run is not None, "it was begun"
        state = work.run.state
        assert state is not None, "a flow run has a state as soon as it is there"
        if state.type in ENDED:
            if work.step.is_done():
                work.done = True
            elif state.type == StateType.CANCELLED:
                raise CancelledRun(f"{work.step.title} was cancelled; the same settings go on from there")
            elif state.type == StateType.FAILED:
                raise StepFailed(f"{_reason(state)} ({work.step.title}, flow run {work.run.name!r})")
            elif state.type == StateType.COMPLETED:
                raise StepFailed(
                    f"{work.step.title} says that it is done, but {self._store.url} does not have what it was to make. "
                    "Do its process and this one see the same store, the same model and the same texts?"
                )
            else:
                self._bury(work, str(state.message))
            return
        pending = time.monotonic() - work.changed if state.type == StateType.PENDING else 0.0
        if death := self._place.death_of(work.run, pending):
            self._end(work, death)
        elif state.type in ALIVE:
            self._listen(work)

    def _listen(self, work: Work) -> None:
        """Look for a sign of life of a run that is said to be at work.

        Raises:
            Unreachable: the storage is too slow to tell silence from an outage.
        """
        assert work.run is not None
        began = time.monotonic()
        sign = read_sign(self._store, work.run.id.hex)
        if (took := time.monotonic() - began) > EVERY:
            raise Unreachable(f"it took {took:.0f} s to answer")
        if sign is not None and (work.sign is None or sign.token != work.sign.token):
            work.sign, work.changed = sign, began
        elif began - work.changed > SILENT:
            self._end(work, f"no sign of life for {SILENT:.0f} s")

    def _end(self, work: Work, death: str) -> None:
        """Tell Prefect what became of a run whose process is gone: it would be Running for ever.

        Raises:
            StepFailed, CancelledRun: as for ``judge``.
        """
        assert work.run is not None
        self._place.end(work.run.id)
        with suppress(ObjectNotFound):
            run = self._client.read_flow_run(work.run.id)
            if has_ended(run):  # since it was looked at; the next look judges how
                work.run = run
                return
        is_done = work.step.is_done()
        done: State = Completed(message="The store has its result.")
        crashed: State = Crashed(message=death)
        with suppress(ObjectNotFound):  # somebody has deleted it
            self._client.set_flow_run_state(work.run.id, done if is_done else crashed, force=True)
        # Not before the server knows it: if it does not answer, all of this is done again.
        work.done = is_done
        if not is_done and work.run.state_type == StateType.CANCELLING:
            raise CancelledRun(f"{work.step.title} was cancelled; the same settings go on from there")
        if not is_done:
            self._bury(work, death)

    def _bury(self, work: Work, death: str) -> None:
        """Have a step that died taken up elsewhere.

        Raises:
            StepFailed: it has died at this place before, as often as there are pauses.
        """
        assert work.run is not None
        with suppress(Unreachable):
            work.sign = read_sign(self._store, work.run.id.hex) or work.sign
            remove_sign(self._store, work.run.id.hex)
        doing = work.sign.doing if work.sign else ""
        at = f"at {doing!r}" if doing else "before it began"
        work.deaths[doing] += 1
        times = work.deaths[doing]
        if times > len(PAUSES):
            raise StepFailed(
                f"{death} ({work.step.title} died {times} times {at}, flow run {work.run.name!r})"
            )
        self._say(
            f"{work.step.title} died {at}: {death.rstrip('.')}. It goes on from its last resume point.",
            logging.WARNING,
        )
        work.not_before = time.monotonic() + PAUSES[times - 1]
        work.run = None


def has_ended(run: FlowRun) -> bool:
    """Whether nothing can change the state of ``run`` any more."""
    return run.state_type in ENDED


def _reason(state: State) -> str:
    """What the exception said that made a flow run fail."""
    text = str(state.message)
    return text.removeprefix("Flow run encountered an exception: ")
