"""Dispatch: start the parts of a search on an executor, wait for them, and restart those that die."""

import logging
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from uuid import UUID, uuid4

import httpx
from prefect import Task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.states import Pending

from layerwise.flows.fan_out.executor import Executor
from layerwise.flows.fan_out.liveness import LivenessMonitor, TrackedPart, has_ended
from layerwise.flows.fan_out.part import Part, PartFailed
from layerwise.flows.fan_out.parts_table import PartsTable
from layerwise.flows.orchestration.cancellation import CANCELLED, was_cancelled
from layerwise.flows.orchestration.embedded_server import death_of_embedded_server
from layerwise.flows.orchestration.server_check import server_problem
from layerwise.storage.files.credentials import without_secrets
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.store import ArtifactStore

POLL = 2.0  # seconds between two polls of Prefect's server
STARTED_PER_POLL = 10  # maximum number of parts started between two polls; each start takes several requests
PAGE = 200  # maximum number of flow runs in one answer of the server
TRANSIENT = (408, 429)  # HTTP statuses below 500 that a retry can remove


class FanOut:
    """Runs the parts of one search on an executor.

    Args:
        tag: tag of all flow runs of this search, including those that an earlier run of it started.
    """

    def __init__(self, client: SyncPrefectClient, store: ArtifactStore, executor: Executor, tag: str) -> None:
        context = FlowRunContext.get()
        assert context is not None, "only a flow fans out"
        assert context.flow_run is not None, "a flow that is running has a run"
        self._client, self._executor, self._tag = client, executor, tag
        self._parent = context.flow_run.id
        self._server_answers = True
        self._table = PartsTable()
        self._monitor = LivenessMonitor(client, store, executor, self._table.say)

    def run(self, parts: Sequence[Part]) -> None:
        """Run all parts, and return when the store has their artifacts.

        Raises:
            PartFailed: a part failed, or died at the same place again and again.
            CancelledRun: the run of the search or of a part was cancelled.
        """
        all_parts = self._track(parts)
        try:
            with self._table as table:
                waiting = deque(each for each in all_parts if each.run is None)
                active = [each for each in all_parts if each.run is not None]
                while waiting or active:
                    self._start(waiting, active)
                    table.show([each.row for each in all_parts])
                    time.sleep(POLL)
                    self._poll(active)
                    waiting.extend(each for each in active if each.run is None)
                    active = [each for each in active if each.run is not None and not each.done]
                table.show([each.row for each in all_parts])
        except (PartFailed, CancelledRun, KeyboardInterrupt):
            self._cancel(all_parts)
            raise
        except TerminationSignal:
            if was_cancelled():
                self._cancel(all_parts)
            raise

    def running(self, flow: str) -> list[Mapping[str, object]]:
        """Return the parameters of a flow's runs that an earlier run of this search started and that have not ended."""
        runs = [run for run in self._earlier_runs() if not has_ended(run) and flow in run.tags]
        return [*(run.parameters for run in runs), *self._executor.taken(flow)]

    def _cancel(self, parts: Iterable[TrackedPart]) -> None:
        """Stop all flow runs that have not ended."""
        runs = [each.run for each in parts if each.run is not None and not each.done]
        try:
            self._executor.cancel([run for run in runs if not has_ended(run)])
        except httpx.HTTPError as error:  # must not hide the error that ended the search
            self._table.say(
                f"not all flow runs could be stopped: {without_secrets(repr(error))}", logging.WARNING
            )

    def _earlier_runs(self) -> list[FlowRun]:
        runs = self._read(FlowRunFilter(tags=FlowRunFilterTags(all_=[self._tag])))
        return [run for run in runs if run.idempotency_key]

    def _track(self, parts: Iterable[Part]) -> list[TrackedPart]:
        """Return every part, with the flow run that an earlier run of the search started, if that has not ended."""
        earlier: dict[str, list[FlowRun]] = {}
        for run in self._earlier_runs():
            earlier.setdefault(_key_and_number(run)[0], []).append(run)
        tracked = []
        for part in parts:
            runs = earlier.get(part.key, [])
            living = [run for run in runs if not has_ended(run)]
            number = 1 + max((_key_and_number(run)[1] for run in runs), default=-1)
            tracked.append(TrackedPart(part, number, living[-1] if living else None, None, time.monotonic()))
            if living:
                self._table.say(f"{part.title}: continues in the running flow run {living[-1].name!r}")
        return tracked

    def _start(self, waiting: deque[TrackedPart], active: list[TrackedPart]) -> None:
        """Start waiting parts while the executor has room, up to ``STARTED_PER_POLL``."""
        for _ in range(min(len(waiting), STARTED_PER_POLL)):
            if not self._executor.has_room(len(active)):
                return
            tracked = waiting.popleft()
            if time.monotonic() < tracked.not_before:
                waiting.append(tracked)
                continue
            try:
                tracked.run = self._start_run(tracked)
            except httpx.HTTPError as error:
                self._handle_outage(error)
                waiting.appendleft(tracked)
                return
            (waiting if tracked.run is None else active).append(tracked)

    def _start_run(self, tracked: TrackedPart) -> FlowRun | None:
        """Start a flow run of a part.

        Returns:
            The run; None if a run with this number exists already and has ended, so that the next number is due.
        """
        tracked.placeholder = tracked.placeholder or self._placeholder(tracked.part)
        tags, key = ["layerwise", tracked.part.flow, self._tag], f"{tracked.part.key}-{tracked.number}"
        run = self._executor.start(tracked.part, tracked.placeholder, tags, key)
        tracked.number += 1
        if has_ended(run):
            return None
        tracked.placeholder, tracked.sign, tracked.changed = None, None, time.monotonic()
        return run

    def _placeholder(self, part: Part) -> UUID:
        """Create a task run that represents the part's flow run in the graph of the search."""
        task = Task(lambda: None, name=part.title)
        task.task_key = f"layerwise.{part.flow}"
        return self._client.create_task_run(
            task, self._parent, dynamic_key=uuid4().hex, name=part.title, state=Pending()
        ).id

    def _poll(self, active: Collection[TrackedPart]) -> None:
        """Update the state of all active parts.

        While Prefect's server or the storage does not answer, no part is considered dead; afterwards the time of the
        outage does not count as silence.
        """
        try:
            self._executor.update([each.run for each in active if each.run is not None])
            self._refresh(active)
            if self._server_answers:
                for tracked in active:
                    self._monitor.check(tracked)
                return
            self._server_answers = True
            self._table.say("Prefect's server answers again")
        except httpx.HTTPError as error:
            self._handle_outage(error)
        except Unreachable as error:
            self._table.say(f"signs of life cannot be read now: {error}", logging.WARNING)
        for tracked in active:
            tracked.changed = time.monotonic()

    def _refresh(self, active: Collection[TrackedPart]) -> None:
        """Read the states of all active flow runs from the server.

        Raises:
            CancelledRun: the run of the search was cancelled, or the run of a part was deleted.
        """
        by_run = {each.run.id: each for each in active if each.run is not None}
        ids = [self._parent, *by_run]
        for start in range(0, len(ids), PAGE):
            for run in self._read(FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))):
                if run.id == self._parent:
                    if run.state_type in CANCELLED:
                        raise CancelledRun(
                            "the search was cancelled; a search with the same settings continues from here"
                        )
                    continue
                tracked = by_run.pop(run.id)
                if tracked.run is None or tracked.run.state_type != run.state_type:
                    tracked.changed = time.monotonic()
                tracked.run = run
        if deleted := next(iter(by_run.values()), None):
            raise CancelledRun(
                f"the flow run of {deleted.part.title} was deleted; a search with the same settings continues from here"
            )

    def _read(self, which: FlowRunFilter) -> list[FlowRun]:
        runs: list[FlowRun] = []
        while True:
            page = self._client.read_flow_runs(flow_run_filter=which, limit=PAGE, offset=len(runs))
            runs += page
            if len(page) < PAGE:
                return runs

    def _handle_outage(self, error: httpx.HTTPError) -> None:
        """Note that the server does not answer, so that the next polls wait for it.

        Raises:
            PartFailed: the server refuses the request, or the embedded server has ended.
        """
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        if status is not None and status < 500 and status not in TRANSIENT:
            raise PartFailed(server_problem(error)) from None
        if death := death_of_embedded_server():
            raise PartFailed(death) from None
        if self._server_answers:
            self._table.say(
                f"Prefect's server does not answer ({without_secrets(repr(error))}): "
                "running parts continue, the others wait for the server",
                logging.WARNING,
            )
        self._server_answers = False


def _key_and_number(run: FlowRun) -> tuple[str, int]:
    """Return the key of a flow run's part, and the number of the run among those of the part."""
    key, _, number = str(run.idempotency_key).partition("-")
    return key, int(number) if number.isdigit() else -1
