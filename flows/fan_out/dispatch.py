"""Fan-out: have other processes do the steps of a search, and those that died be taken up by others."""

import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from uuid import UUID, uuid4

import httpx
from prefect import Task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.states import Pending

from layerwise.flows.fan_out.executor import Place
from layerwise.flows.fan_out.liveness import Watch, Work, has_ended
from layerwise.flows.fan_out.step import Step, StepFailed
from layerwise.flows.fan_out.steps_table import StepsShown
from layerwise.flows.orchestration.cancellation import CANCELLED, was_cancelled
from layerwise.flows.orchestration.embedded_server import death_of_embedded_server
from layerwise.flows.orchestration.server_check import server_problem
from layerwise.storage.files.credentials import without_secrets
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.store import ArtifactStore

POLL = 2.0  # seconds between two looks
BEGUN_AT_A_TIME = 10  # between two looks; each is some requests
PAGE = 200  # flow runs that the server gives at a time, at most
PASSING = (408, 429)  # refusals that go away by themselves


class FanOut:
    """The parent's side of a search whose steps run elsewhere.

    Args:
        tag: marks all flow runs of this search, in whatever run of the parent they were begun.
    """

    def __init__(self, client: SyncPrefectClient, store: ArtifactStore, place: Place, tag: str) -> None:
        context = FlowRunContext.get()
        assert context is not None, "only flows fan out"
        assert context.flow_run is not None, "a flow that runs has a run"
        self._client, self._place, self._tag = client, place, tag
        self._parent = context.flow_run.id
        self._answering = True
        self._shown = StepsShown()
        self._watch = Watch(client, store, place, self._shown.say)

    def run(self, steps: Sequence[Step]) -> None:
        """Have all ``steps`` done, and return when the store has what they make.

        Raises:
            StepFailed: one failed for a reason that will not go away, or died at the same place again and again.
            CancelledRun: the parent's own run, or one of the steps', was cancelled.
        """
        works = self._taken_up(steps)
        try:
            with self._shown as shown:
                waiting = deque(work for work in works if work.run is None)
                active = [work for work in works if work.run is not None]
                while waiting or active:
                    self._begin(waiting, active)
                    shown.show([work.row for work in works])
                    time.sleep(POLL)
                    self._look(active)
                    waiting.extend(work for work in active if work.run is None)
                    active = [work for work in active if work.run is not None and not work.done]
                shown.show([work.row for work in works])
        except (StepFailed, CancelledRun, KeyboardInterrupt):
            self._cancel(works)
            raise
        except TerminationSignal:
            if was_cancelled():
                self._cancel(works)
            raise

    def _cancel(self, works: Iterable[Work]) -> None:
        """Have everything stopped that is under way."""
        runs = [work.run for work in works if work.run is not None and not work.done]
        try:
            self._place.cancel([run for run in runs if not has_ended(run)])
        except httpx.HTTPError as error:  # what has ended the search is to be known, not this
            self._shown.say(
                f"not all that runs could be stopped: {without_secrets(repr(error))}", logging.WARNING
            )

    def under_way(self, flow: str) -> list[FlowRun]:
        """Flow runs of this search that an earlier parent has sent to a pool, and that have not ended.

        Args:
            flow: a step's.
        """
        return [run for run in self._begun_before() if not has_ended(run) and flow in run.tags]

    def _begun_before(self) -> list[FlowRun]:
        runs = self._read(FlowRunFilter(tags=FlowRunFilterTags(all_=[self._tag])))
        return [run for run in runs if run.idempotency_key]

    def _taken_up(self, steps: Iterable[Step]) -> list[Work]:
        """Every step, with its flow run if an earlier parent has begun one that has not ended."""
        before: dict[str, list[FlowRun]] = {}
        for run in self._begun_before():
            before.setdefault(_key_and_number(run)[0], []).append(run)
        works = []
        for step in steps:
            runs = before.get(step.key, [])
            living = [run for run in runs if not has_ended(run)]
            number = 1 + max((_key_and_number(run)[1] for run in runs), default=-1)
            works.append(Work(step, number, living[-1] if living else None, None, time.monotonic()))
            if living:
                self._shown.say(
                    f"{step.title}: goes on in flow run {living[-1].name!r}, which was begun before"
                )
        return works

    def _begin(self, waiting: deque[Work], active: list[Work]) -> None:
        """Begin as many as there is room for, but only some before the others are looked at again."""
        for _ in range(min(len(waiting), BEGUN_AT_A_TIME)):
            if not self._place.has_room(len(active)):
                return
            work = waiting.popleft()
            if time.monotonic() < work.not_before:
                waiting.append(work)
                continue
            try:
                work.run = self._begun(work)
            except httpx.HTTPError as error:
                self._outage(error)
                waiting.appendleft(work)
                return
            (waiting if work.run is None else active).append(work)

    def _begun(self, work: Work) -> FlowRun | None:
        """A new flow run; None if there was one of that number, and it has ended: then it is the next number's turn."""
        work.placeholder = work.placeholder or self._placeholder(work.step)
        tags, key = ["layerwise", work.step.flow, self._tag], f"{work.step.key}-{work.number}"
        run = self._place.begin(work.step, work.placeholder, tags, key)
        work.number += 1
        if has_ended(run):
            return None
        work.placeholder, work.sign, work.changed = None, None, time.monotonic()
        return run

    def _placeholder(self, step: Step) -> UUID:
        """A task run that stands for the step's flow run in the graph of the parent's."""
        task = Task(lambda: None, name=step.title)
        task.task_key = f"layerwise.{step.flow}"
        return self._client.create_task_run(
            task, self._parent, dynamic_key=uuid4().hex, name=step.title, state=Pending()
        ).id

    def _look(self, active: Collection[Work]) -> None:
        """See how everything is that is under way.

        Nothing is judged while Prefect's server or the storage does not answer, nor by what was not heard meanwhile.
        """
        try:
            self._refresh(active)
            if self._answering:
                for work in active:
                    self._watch.judge(work)
                return
            self._answering = True
            self._shown.say("Prefect's server answers again")
        except httpx.HTTPError as error:
            self._outage(error)
        except Unreachable as error:
            self._shown.say(f"signs of life cannot be read now: {error}", logging.WARNING)
        for work in active:
            work.changed = time.monotonic()

    def _refresh(self, active: Collection[Work]) -> None:
        """Ask the server for the states of all that is under way.

        Raises:
            CancelledRun: the parent's own run was cancelled, or one of the others deleted.
        """
        works = {work.run.id: work for work in active if work.run is not None}
        ids = [self._parent, *works]
        for start in range(0, len(ids), PAGE):
            for run in self._read(FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))):
                if run.id == self._parent:
                    if run.state_type in CANCELLED:
                        raise CancelledRun(
                            "the search was cancelled; the same settings go on from what was finished"
                        )
                    continue
                work = works.pop(run.id)
                if work.run is None or work.run.state_type != run.state_type:
                    work.changed = time.monotonic()
                work.run = run
        if deleted := next(iter(works.values()), None):
            raise CancelledRun(
                f"the flow run of {deleted.step.title} was deleted; the same settings go on from there"
            )

    def _read(self, which: FlowRunFilter) -> list[FlowRun]:
        runs: list[FlowRun] = []
        while True:
            page = self._client.read_flow_runs(flow_run_filter=which, limit=PAGE, offset=len(runs))
            runs += page
            if len(page) < PAGE:
                return runs

    def _outage(self, error: httpx.HTTPError) -> None:
        """Wait for a server that does not answer.

        Raises:
            StepFailed: it does answer, and refuses; or it is the embedded one, and has ended.
        """
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        if status is not None and status < 500 and status not in PASSING:
            raise StepFailed(server_problem(error)) from None
        if death := death_of_embedded_server():
            raise StepFailed(death) from None
        if self._answering:
            self._shown.say(
                f"Prefect's server does not answer ({without_secrets(repr(error))}): "
                "what runs goes on, the rest waits for it",
                logging.WARNING,
            )
        self._answering = False


def _key_and_number(run: FlowRun) -> tuple[str, int]:
    """Of which step a flow run is, and the how manieth."""
    key, _, number = str(run.idempotency_key).partition("-")
    return key, int(number) if number.isdigit() else -1
